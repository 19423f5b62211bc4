"""A sweep as a chapter shows it: the recorded table where there is one, what was computed here and now beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tokensel.figures import curves


@dataclass(frozen=True)
class Sweep:
    """Two tables of one experiment, in the long format.

    Attributes:
        table: what lines and numbers are taken from: the recorded table, else the live one.
        live: what was computed here, where ``table`` is a recorded one.
        source: a sentence in Markdown that says which is which, and how many questions a point has.
    """

    table: pd.DataFrame
    live: pd.DataFrame | None
    source: str

    @classmethod
    def beside(cls, live: str | Path, recorded: str | Path) -> "Sweep":
        """The table at ``live`` beside the one at ``recorded``, which need not exist.

        Args:
            live: a table that this session has written.
            recorded: one that ``python -m tokensel evaluate`` wrote earlier; its provenance lies next to it.
        """
        here, path = pd.read_csv(live), Path(recorded)
        now = f"**computed here, now**, {here['n'].min()} questions a point. "
        if not path.is_file():
            return cls(here, None, f"All of it {now}Bands are 95 % intervals.")
        table, provenance = pd.read_csv(path), path.with_suffix(".provenance.json")
        dated = json.loads(provenance.read_text(encoding="utf-8"))["date"][:10] if provenance.is_file() else "earlier"
        then = f"**recorded** {dated} by `python -m tokensel evaluate`, {table['n'].min()} questions a point, in `{recorded}`. "
        return cls(table, here, f"Lines: {then}Open points: {now}Bands and bars are 95 % intervals.")

    def draw(self, group: str, methods: Sequence[str]) -> None:
        """The panels of one group of benchmarks, if there are any, see :func:`~tokensel.figures.curves.score_curves`."""
        mine = [None if each is None else each[each["group"] == group] for each in (self.table, self.live)]
        if len(mine[0]):
            curves.score_curves(mine[0], live=mine[1], methods=methods)

    def points(self, group: str, method: str, keep: float | None = None) -> float:
        """Mean score of a group of benchmarks, 0 to 100, under a method; over all of its budgets if none is given."""
        rows = self.table[(self.table["group"] == group) & (self.table["method"] == method)]
        return 100 * float((rows if keep is None else rows[rows["keep"] == keep])["score"].mean())
