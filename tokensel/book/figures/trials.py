"""The recorded trials of selectors as a chapter shows them: tables of words, panels of points, curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import pandas as pd

from tokensel.figures import style

__all__ = ["Trials"]


@dataclass(frozen=True)
class Trials:
    """Rows of ``python -m tokensel mini selectors``, of one or several studies.

    Attributes:
        table: method, keep, group, score and reach (half a 95 % interval, both 0 to 100), steps, l_rec,
            place, norm, study, tower, name, seed, n, split.
    """

    table: pd.DataFrame

    @classmethod
    def read(cls, path: str | Path) -> "Trials":
        """The recorded table."""
        return cls(pd.read_csv(path))

    def of(self, study: str, **values: object) -> pd.DataFrame:
        """The selectors of a study at the end of their training, rows with these values only."""
        rows = self.table[(self.table["study"] == study) & (self.table["method"] == "selector")]
        rows = rows[rows["steps"] == rows.groupby(["tower", "name", "seed"])["steps"].transform("max")]
        for column, value in values.items():
            rows = rows[rows[column] == value]
        return cast(pd.DataFrame, rows)

    def towers(self, study: str) -> list[str]:
        """The towers of a study, in the order in which they were recorded."""
        return list(dict.fromkeys(self.table.loc[self.table["study"] == study, "tower"]))

    def baseline(self, tower: str, method: str, keep: float, group: str = "reading") -> float:
        """The score of a method without a selector in front of the model of a tower."""
        rows = self.table[(self.table["tower"] == tower) & (self.table["method"] == method)]
        at = 1.0 if method == "full" else keep  # all tokens leave no choice of a budget
        scores = cast(pd.Series, rows[(rows["keep"] == at) & (rows["group"] == group)]["score"])
        return float(scores.iloc[0])

    def scores(
        self, study: str, keeps: Sequence[float], baselines: Sequence[str] = (), group: str = "reading"
    ) -> pd.DataFrame:
        """A row for each name and baseline, a column for each tower: the scores at the budgets, as text.

        Of several seeds the mean is given.
        """
        rows = self.of(study, group=group)
        cells: dict[str, dict[str, str]] = {}
        for tower in self.towers(study):
            part = rows[rows["tower"] == tower]
            means: Any = part.pivot_table(index="name", columns="keep", values="score", sort=False)
            column = {
                str(name): " · ".join(f"{means.loc[name, keep]:.0f}" for keep in keeps)
                for name in means.index
            }
            column |= {
                method: " · ".join(f"{self.baseline(tower, method, keep, group):.0f}" for keep in keeps)
                for method in baselines
            }
            cells[tower] = column
        return pd.DataFrame(cells).fillna("")

    def panels(self, study: str, keep: float, baselines: Sequence[str], group: str = "reading") -> None:
        """A panel for each tower: the score of every trial at one budget, and lines for the baselines."""
        rows = self.of(study, group=group, keep=keep)
        towers = self.towers(study)
        names = list(dict.fromkeys(rows["name"]))
        fig, axes = plt.subplots(
            1, len(towers), figsize=(style.WIDTH, 0.3 * len(names) + 1), sharey=True, squeeze=False
        )
        for ax, tower in zip(axes[0], towers, strict=True):
            for method in baselines:
                ax.axvline(
                    self.baseline(tower, method, keep, group),
                    color=style.colour(method),
                    linewidth=1,
                    linestyle="--",
                    label=style.label(method),
                )
            part = rows[rows["tower"] == tower]
            places = [names.index(name) for name in part["name"]]
            ax.errorbar(
                part["score"], places, xerr=part["reach"], fmt="o", color=style.ORANGE, label="selector"
            )
            ax.set(title=tower, xlim=(0, 100), yticks=range(len(names)), yticklabels=names)
            ax.invert_yaxis()
        for ax in axes[0]:
            ax.set_xlabel(f"{group}, keep {keep:g}")
        lines = axes[0][0].get_legend_handles_labels()
        fig.legend(*lines, loc="outside lower center", ncols=len(lines[0]), fontsize=style.LABEL)

    def curves(self, study: str, keep: float, group: str = "reading") -> None:
        """L_rec on held-out tiles and the score at one budget over the steps; a line for each training."""
        rows = self.table[(self.table["study"] == study) & (self.table["method"] == "selector")]
        rows = cast(pd.DataFrame, rows[(rows["keep"] == keep) & (rows["group"] == group)])
        _, (left, right) = plt.subplots(1, 2, figsize=(style.WIDTH, 2.6))
        colours = dict(zip(self.towers(study), (style.ORANGE, style.BLUE, style.GREEN, style.BLACK)))
        for key, run in rows.groupby(["tower", "seed"], sort=False):
            tower, seed = cast(tuple[str, int], key)
            run = run.sort_values("steps")
            label = str(tower) if seed == 0 else None
            options = {"color": colours[str(tower)], "marker": "o", "markersize": 3, "label": label}
            left.plot(run["steps"], run["l_rec"], **options)
            right.plot(run["steps"], run["score"], **options)
        left.set(xlabel="step", ylabel="L_rec, held out", ylim=(0, None))
        right.set(xlabel="step", ylabel=f"{group} score at keep {keep:g}", ylim=(0, 100))
        right.legend(loc="lower right")
