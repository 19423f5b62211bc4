"""A sweep as a chapter shows it: the recorded table where there is one, and the results computed just now."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from tokensel.benchmarks.statistics import average
from tokensel.figures import curves, style
from tokensel.utils.errors import TokenselError


def recorded_table(path: str | Path, live: pd.DataFrame) -> pd.DataFrame | None:
    """The table at ``path``; ``None`` if there is none, or if it is of another model than ``live``."""
    if not Path(path).is_file():
        return None
    table = pd.read_csv(path)
    return table if set(table["model"]) == set(live["model"]) else None


def provenance(path: str | Path) -> dict[str, Any]:
    """How the recorded table at ``path`` was made: the contents of its provenance file."""
    return json.loads(Path(path).with_suffix(".provenance.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Sweep:
    """Two tables of one experiment, in the long format.

    Attributes:
        live: computed here.
        recorded: computed earlier for the same model, with more questions, if there is such a table.
        path: where the recorded table is, or would be.
        source: a sentence in Markdown that says which is which, and how many questions a point has.
    """

    live: pd.DataFrame
    recorded: pd.DataFrame | None
    path: Path
    source: str

    @property
    def table(self) -> pd.DataFrame:
        """The source of lines and numbers: the recorded table, else the live one."""
        return self.live if self.recorded is None else self.recorded

    @classmethod
    def beside(cls, live: str | Path, recorded: str | Path) -> "Sweep":
        """The table at ``live`` together with the one at ``recorded``, which need not exist.

        Args:
            live: a table that was computed just now.
            recorded: one that ``python -m tokensel evaluate`` wrote earlier, with its provenance file.
        """
        here, path = pd.read_csv(live), Path(recorded)
        now = f"**computed here, now**, {here['n'].min()} questions a point. "
        table = recorded_table(path, here)
        if table is None:
            return cls(here, None, path, f"All of it {now}Bands are 95 % intervals.")
        dated = provenance(path)["date"][:10]
        then = (
            f"**recorded** {dated} by `python -m tokensel evaluate`, "
            f"{table['n'].min()} questions a point{_seeds(table)}, in `{recorded}`. "
        )
        return cls(here, table, path, f"Lines: {then}Open points: {now}Bands and bars are 95 % intervals.")

    def companion(self, kind: str, live: str | Path) -> pd.DataFrame:
        """The recorded ``differences`` or ``categories`` of this evaluation, else the table at ``live``."""
        return pd.read_csv(live if self.recorded is None else self.path.with_suffix(f".{kind}.csv"))

    def plot(self, group: str, methods: Sequence[str]) -> None:
        """The panels of one group of benchmarks, if any: :func:`~tokensel.figures.curves.score_curves`."""
        lines, points = (_rows(table, group=group) for table in (self.table, self.live))
        if len(lines):
            curves.score_curves(lines, live=None if self.recorded is None else points, methods=methods)

    def points(self, group: str, method: str, keep: float | None = None) -> float:
        """Mean score of a method on a group, 0 to 100; over all its budgets if none is given."""
        rows = _rows(self.table, group=group, method=method)
        scores = cast(pd.Series, (rows if keep is None else _rows(rows, keep=keep))["score"])
        return 100 * float(scores.mean())

    def estimate(self, group: str, method: str, keep: float) -> tuple[float, float, float]:
        """Mean score of a group of benchmarks under a method at a budget, 0 to 100, and its 95 % interval.

        Raises:
            TokenselError: there are no such results.
        """
        score, reach = self.points(group, method, keep), self._reach(group, method, keep)
        return score, score - reach, score + reach

    def cost(self, group: str, method: str, keep: float) -> tuple[float, float, float]:
        """Points that a method loses against all tokens, and the 95 % interval.

        The interval is that of a difference of independent means. Both sides answer the same questions, so a
        paired interval would be narrower.

        Raises:
            TokenselError: there are no such results.
        """
        reach = (self._reach(group, "full", 1.0) ** 2 + self._reach(group, method, keep) ** 2) ** 0.5
        lost = self.points(group, "full", 1.0) - self.points(group, method, keep)
        return lost, lost - reach, lost + reach

    def _reach(self, group: str, method: str, keep: float) -> float:
        """Half of the width of the interval of a mean."""
        rows = _rows(self.table, group=group, method=method, keep=keep)
        if rows.empty:
            raise TokenselError(f"no results for {method} on {group} at keep {keep:g}: evaluate them first")
        return float(average(rows, "group")["reach"].iloc[0])


def _seeds(table: pd.DataFrame) -> str:
    """Which methods have several seeds, for the sentence that says where a table is from."""
    seeds = table.groupby("method", sort=False)["seed"].unique()
    several = {method: each for method, each in seeds.items() if len(each) > 1}
    if not several:
        return ""
    names = " and ".join(style.label(str(method)) for method in several)
    values = sorted({int(seed) for each in several.values() for seed in each})
    return f", mean over seeds {', '.join(map(str, values))} of {names}"


def _rows(table: pd.DataFrame, **values: str | float) -> pd.DataFrame:
    """The rows in which each named column has the given value."""
    for column, value in values.items():
        table = cast(pd.DataFrame, table[table[column] == value])
    return table
