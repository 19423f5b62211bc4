"""Score against the fraction of tokens kept, one small panel a benchmark (the paper's Figs. 4 and 5), and against cost."""

from collections.abc import Sequence
from math import ceil

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokensel.benchmarks.statistics import average
from tokensel.figures import style
from tokensel.utils.errors import TokenselError

COLUMNS = (
    "model",
    "benchmark",
    "group",
    "method",
    "keep",
    "metric",
    "score",
    "ci_low",
    "ci_high",
    "n",
    "seed",
)
FLAT = ("full", "none", "native")  # methods that do not depend on keep: dashed lines
LOUD = ("selector", "random")  # the paper's contrast, drawn over the rest


def score_curves(
    table: pd.DataFrame,
    *,
    live: pd.DataFrame | None = None,
    methods: Sequence[str] | None = None,
    columns: int = 4,
    panel: tuple[float, float] = (1.9, 1.8),
) -> Figure:
    """Small multiples of score (0..100) over keep with 95 % intervals; lines are named at their right end.

    Args:
        table: the long table of results, scores 0..1; several seeds of a method are averaged.
        live: a second, smaller table in the same format, drawn as open points with their intervals over the lines.
        methods: which methods, in the order of the labels; all that are in ``table`` when left out.
        columns: panels beside each other.
        panel: width and height of a panel in inches.

    Raises:
        TokenselError: the table lacks a column or is empty.
    """
    for name, frame in (("table", table), ("live table", live)):
        missing = [] if frame is None else [column for column in COLUMNS if column not in frame.columns]
        if missing:
            raise TokenselError(
                f"the {name} has no column {', '.join(missing)}: give a long table of results"
            )
    if table.empty:
        raise TokenselError("the table of results is empty: evaluate something first")
    methods = list(methods) if methods is not None else list(dict.fromkeys(table["method"]))
    benchmarks = list(dict.fromkeys(table["benchmark"]))
    columns = min(columns, len(benchmarks))
    rows = ceil(len(benchmarks) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * panel[0] + 1.1, rows * panel[1] + 0.2),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    axes[0, 0].set(xlim=(0.05, 0.95), xticks=(0.1, 0.3, 0.5, 0.7, 0.9), ylim=(0, 102))
    for ax, benchmark in zip(axes.flat, benchmarks):
        ends = {method: _draw(ax, _of(table, benchmark, method), method) for method in methods}
        if live is not None:
            for method in methods:
                _draw_live(ax, _of(live, benchmark, method), method)
        ax.set_title(benchmark)
        last = ax in axes[:, -1] or benchmark == benchmarks[-1]
        if last:
            label_ends(ax, {style.label(m): (y, style.colour(m)) for m, y in ends.items() if y is not None})
    for ax in axes.flat[len(benchmarks) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("score (0 to 100)")
    for column in range(columns):
        lowest = [axes[row, column] for row in range(rows) if row * columns + column < len(benchmarks)][-1]
        lowest.set_xlabel("fraction of tokens kept")
        lowest.tick_params(labelbottom=True)
    return figure


def cost_curves(
    table: pd.DataFrame,
    *,
    cost: str = "flops",
    by: str = "group",
    methods: Sequence[str] | None = None,
    xlabel: str = "cost (% of all tokens)",
    panel: tuple[float, float] = (2.3, 2.3),
) -> Figure:
    """Score (0..100) over what an answer costs, in per cent of the full model, with 95 % intervals.

    A method with several budgets is a line through them, one with a single budget a point. Where a panel averages several
    benchmarks, their intervals add as those of independent means do.

    Args:
        table: the long table of results, with ``full`` among its methods.
        cost: its column of costs, ``flops`` or ``kv_bytes``.
        by: ``group`` or ``benchmark``, what a panel shows.
        methods: which methods, in the order of the legend; all that are in ``table`` when left out.
        xlabel: what the cost is.
        panel: width and height of a panel in inches.

    Raises:
        TokenselError: the table has no such column, or no full model to compare with.
    """
    for column in (cost, by):
        if column not in table.columns:
            raise TokenselError(f"the table has no column {column}: give a long table of results")
    full = table[table["method"] == "full"].set_index("benchmark")[cost]
    if missing := set(table["benchmark"]) - set(full.index):
        raise TokenselError(f"the table has no row full for {sorted(missing)[0]}: evaluate that method too")
    table = table.assign(share=100 * table[cost] / table["benchmark"].map(full))
    names = list(dict.fromkeys(table[by]))
    methods = list(methods) if methods is not None else list(dict.fromkeys(table["method"]))
    figure, axes = plt.subplots(
        1, len(names), figsize=(len(names) * panel[0] + 1.4, panel[1]), sharey=True, squeeze=False
    )
    for ax, name in zip(axes[0], names):
        for method in methods:
            rows = table[(table[by] == name) & (table["method"] == method)]
            points = average(rows, "keep").sort_index()
            ax.errorbar(
                rows.groupby("keep")["share"].mean(), points["score"], yerr=points["reach"], color=style.colour(method),
                marker=style.MARKERS.get(method, "o"), markersize=5 if len(points) == 1 else 3.5, linewidth=1.3,
                elinewidth=0.7, label=style.label(method),
            )  # fmt: skip
        ax.set(title=name, xlabel=xlabel)
    axes[0, 0].set_ylabel("score")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7.5)
    return figure


def label_ends(ax: Axes, ends: dict[str, tuple[float, str]], size: float = 7.5) -> None:
    """Name lines at the right border of ``ax`` at their last value, moved apart where they would overlap.

    Args:
        ends: for each name the value where its line ends and its colour.
        size: of the type in points.
    """
    low, high = ax.get_ylim()
    step = (high - low) * 1.35 * size / 72 / (ax.get_figure().get_figheight() / ax.get_gridspec().nrows * 0.7)
    names = sorted(ends, key=lambda name: ends[name][0])
    places = [min(max(ends[name][0], low), high) for name in names]
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + step)
    # the stack may have grown past the top: push it down again from there
    for k in range(len(places) - 1, -1, -1):
        ceiling = high + step / 2 if k == len(places) - 1 else places[k + 1] - step
        places[k] = min(places[k], ceiling)
    for name, place in zip(names, places):
        ax.annotate(
            name,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=style.text_colour(ends[name][1]),
            fontsize=size,
            va="center",
            annotation_clip=False,
        )


def _of(table: pd.DataFrame, benchmark: str, method: str) -> pd.DataFrame:
    rows = table[(table["benchmark"] == benchmark) & (table["method"] == method)]
    return 100 * rows.groupby("keep", as_index=True)[["score", "ci_low", "ci_high"]].mean().sort_index()


def _draw(ax: Axes, rows: pd.DataFrame, method: str) -> float | None:
    """One method's line; returns the value at its right end, None where there is nothing to draw."""
    if rows.empty:
        return None
    colour, loud = style.colour(method), method in LOUD
    if method in FLAT:
        ax.axhline(rows["score"].iloc[-1], color=colour, linestyle=(0, (4, 2)), linewidth=1.2, zorder=2)
        return float(rows["score"].iloc[-1])
    ax.plot(
        rows.index,
        rows["score"],
        color=colour,
        marker=style.MARKERS.get(method, "o"),
        markersize=3.2 if loud else 2.4,
        linewidth=1.8 if loud else 0.9,
        zorder=4 if loud else 3,
    )
    if loud:
        ax.fill_between(
            rows.index, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.18, linewidth=0, zorder=1
        )
    return float(rows["score"].iloc[-1])


def _draw_live(ax: Axes, rows: pd.DataFrame, method: str) -> None:
    if rows.empty or method in FLAT:
        return
    reach = [(rows["score"] - rows["ci_low"]).clip(lower=0), (rows["ci_high"] - rows["score"]).clip(lower=0)]
    ax.errorbar(
        rows.index,
        rows["score"],
        yerr=reach,
        fmt=style.MARKERS.get(method, "o"),
        markersize=5,
        markerfacecolor="white",
        markeredgecolor=style.colour(method),
        ecolor=style.colour(method),
        elinewidth=0.8,
        capsize=1.5,
        zorder=5,
    )
