"""Figures of controls: two scores of each method side by side, and where the kept tokens are."""

from collections.abc import Mapping, Sequence
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tokensel.figures import style

__all__ = ["kept_histogram", "score_pairs"]


def score_pairs(points: pd.DataFrame, kinds: tuple[str, str], xlabel: str = "score") -> Figure:
    """Two scores of each method with their intervals, one line a method, the best second score on top.

    Args:
        points: ``score`` and ``reach`` (0 to 100) by method and kind, as
            :func:`tokensel.benchmarks.statistics.average` makes them. Methods that lack a kind are left out.
        kinds: which two to draw: the first as an open mark, the second as a filled one.
        xlabel: what the scores are.
    """
    scores, reaches = (_by_kind(points, column, kinds) for column in ("score", "reach"))
    order = list(scores.sort_values(kinds[1], kind="stable").index)
    fig, ax = plt.subplots(figsize=(style.fit(4.6), 0.3 * len(order) + 0.9))
    for place, kind in enumerate(kinds):
        score, reach = (np.asarray(table.loc[order, kind], dtype=float) for table in (scores, reaches))
        ends = np.array([np.minimum(reach, score), np.minimum(reach, 100 - score)]).clip(min=0)
        ax.errorbar(
            score,
            np.arange(len(order)) + (0.12, -0.12)[place],
            xerr=ends,
            fmt="o",
            color=(style.GREY, style.BLUE)[place],
            fillstyle=("none", "full")[place],
            elinewidth=1,
            label=kind,
        )
    names = [style.label(str(name)) for name in order]
    ax.set(yticks=range(len(order)), yticklabels=names, xlabel=xlabel, xlim=(-3, 103))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def _by_kind(points: pd.DataFrame, column: str, kinds: tuple[str, str]) -> pd.DataFrame:
    """One column of the points, a row for each method that has both kinds."""
    return cast(pd.DataFrame, cast(pd.Series, points[column]).unstack()[list(kinds)]).dropna()


def kept_histogram(shares: Mapping[str, Mapping[str, Sequence[float] | np.ndarray]]) -> Figure:
    """Histograms of kept positions, one panel a direction and one line a method, relative to the mean.

    Args:
        shares: by direction ("height"), then by method, the kept share of each part of the image, from
            :func:`tokensel.vlm.kept.kept_by_place`; 0 is the top or the left.
    """
    fig, axes = plt.subplots(1, len(shares), figsize=(style.fit(3.1 * len(shares) + 1), 2.6), squeeze=False)
    for ax, (direction, methods) in zip(axes[0], shares.items()):
        for (name, parts), look in zip(methods.items(), plt.rcParams["axes.prop_cycle"]):
            values = np.asarray(parts, dtype=float)
            middle = (np.arange(len(values)) + 0.5) / len(values)
            ax.plot(middle, values / np.nanmean(values), marker="o", label=style.label(name), **look)
        ax.axhline(1, color=style.GREY, linestyle="--", linewidth=0.8)
        ends = {"height": "0 top, 1 bottom", "width": "0 left, 1 right"}.get(direction, "")
        ax.set(xlabel=f"{direction} in the image ({ends})" if ends else direction, ylim=(0, None))
    axes[0, 0].set_ylabel("kept, relative to its mean")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig
