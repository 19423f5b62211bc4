"""Score against the fraction of tokens kept (the paper's Figs. 4 and 5) and against cost, by benchmark."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
EMPHASISED = ("selector", "random")  # the paper's contrast, drawn over the other methods
LINE_HEIGHT, REACH = (
    1.2,
    0.75,
)  # of a label: distance to the next one, largest distance to its line, in font sizes


def score_curves(
    table: pd.DataFrame,
    *,
    live: pd.DataFrame | None = None,
    methods: Sequence[str] | None = None,
    columns: int = 4,
    panel: tuple[float, float] = (1.9, 1.8),
) -> Figure:
    """Small multiples of score (0..100) over keep with 95 % intervals.

    The lines are labelled at their right end in the last panel of each row. Where the ends are too close for
    that, a legend lists the methods in the order in which their lines end, on average over the panels.

    Args:
        table: the long table of results, scores 0..1; several seeds of a method are averaged.
        live: a second, smaller table in the same format, drawn as open points with their intervals over the
            lines.
        methods: which methods to draw; by default all in ``table``.
        columns: the most panels in a row.
        panel: width and height of a panel in inches; the width shrinks where the figure would exceed the
            page.

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
        figsize=(style.fit(columns * panel[0] + 1.1), rows * panel[1] + 0.2),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    right = 0.05 + _largest_keep(table if live is None else pd.concat([table, live]))
    ticks = [tick for tick in (0.1, 0.3, 0.5, 0.7, 0.9) if tick <= right]
    axes[0, 0].set(xlim=(0.05, right), xticks=ticks, ylim=(0, 102))
    axes[0, 0].set_xticklabels(["" if tick in (0.3, 0.7) else f"{tick:g}" for tick in ticks])
    ends: dict[Axes, dict[str, tuple[float, Any]]] = {}
    for ax, benchmark in zip(axes.flat, benchmarks):
        values = {method: _plot_method(ax, _select(table, benchmark, method), method) for method in methods}
        if live is not None:
            for method in methods:
                _plot_live(ax, _select(live, benchmark, method), method)
        ax.set_title(benchmark)
        ends[ax] = {
            style.label(m): (value, style.colour(m)) for m, value in values.items() if value is not None
        }
    for ax in axes.flat[len(benchmarks) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("score (0 to 100)")
    for column in range(columns):
        lowest = [axes[row, column] for row in range(rows) if row * columns + column < len(benchmarks)][-1]
        lowest.set_xlabel("fraction kept")
        lowest.tick_params(labelbottom=True)
    last = {
        ax: ends[ax] for ax, name in zip(axes.flat, benchmarks) if ax in axes[:, -1] or name == benchmarks[-1]
    }
    offsets = {ax: _end_offsets(ax, its_ends, style.LABEL) for ax, its_ends in last.items()}
    if all(offset is not None for offset in offsets.values()):
        for ax, its_ends in last.items():
            _annotate_ends(ax, its_ends, offsets[ax] or {}, style.LABEL)
    else:
        mean = pd.DataFrame(
            [{name: value for name, (value, _) in each.items()} for each in ends.values()]
        ).mean()
        order = [str(name) for name in mean.sort_values(ascending=False).index]
        lines = {
            name: _line_of(ax, colour) for ax, each in ends.items() for name, (_, colour) in each.items()
        }
        figure.legend([lines[name] for name in order], order, loc="outside right center")
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

    A method with several budgets is a line through them, one with a single budget a point. Where a panel
    averages several benchmarks, their intervals add as those of independent means do.

    Args:
        table: the long table of results, with ``full`` among its methods.
        cost: its column of costs, ``flops`` or ``kv_bytes``.
        by: ``group`` or ``benchmark``, what a panel shows.
        methods: which methods, in the order of the legend; by default all in ``table``.
        xlabel: what the cost is.
        panel: width and height of a panel in inches; the width shrinks where the figure would exceed the
            page.

    Raises:
        TokenselError: the table has no such column, or no full model to compare with.
    """
    for column in (cost, by):
        if column not in table.columns:
            raise TokenselError(f"the table has no column {column}: give a long table of results")
    full = table[table["method"] == "full"].set_index("benchmark")[cost].to_dict()
    if missing := set(table["benchmark"]) - set(full):
        raise TokenselError(f"the table has no row full for {sorted(missing)[0]}: evaluate that method too")
    table = table.assign(
        share=[100 * value / full[name] for value, name in zip(table[cost], table["benchmark"])]
    )
    names = list(dict.fromkeys(table[by]))
    methods = list(methods) if methods is not None else list(dict.fromkeys(table["method"]))
    size = (style.fit(len(names) * panel[0] + 1.4), panel[1])
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names):
        for method in methods:
            rows = cast(pd.DataFrame, table[(table[by] == name) & (table["method"] == method)])
            points = average(rows, "keep").sort_index()
            ax.errorbar(
                rows.groupby("keep")["share"].mean(),
                points["score"],
                yerr=points["reach"],
                color=style.colour(method),
                marker=style.marker(method),
                markersize=5 if len(points) == 1 else 3.5,
                linewidth=1.3,
                elinewidth=0.7,
                label=style.label(method),
            )
        ax.set(title=name)
    figure.supxlabel(xlabel, fontsize=plt.rcParams["axes.labelsize"])
    axes[0, 0].set_ylabel("score")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=style.LABEL)
    return figure


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, Any]], size: float = style.LABEL) -> None:
    """Name lines at the right border of ``ax``, each at its own end; call it when everything else is drawn.

    Labels that would overlap move apart, up to ``REACH`` font sizes away from their line. Where that is not
    enough, a legend beside ``ax`` takes their place, in the order in which the lines end.

    Args:
        ax: the panel.
        ends: for each name the value where its line ends, and the colour of the line as matplotlib takes it.
        size: of the type in points.
    """
    offsets = _end_offsets(ax, ends, size)
    if offsets is not None:
        _annotate_ends(ax, ends, offsets, size)
        return
    order = sorted(ends, key=lambda name: -ends[name][0])
    ax.legend(
        [_line_of(ax, ends[name][1]) for name in order],
        order,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        labelspacing=0.25,
        fontsize=size,
    )


def spread_out(places: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Move ``places`` as little as possible (least squares) so that neighbours are at least ``step`` apart.

    Args:
        places: in ascending order.
        step: the least distance.
        low, high: the range that the result stays in, if it has room for all.
    """
    # With q[k] = place[k] - k * step the distances say that q ascends: isotonic regression, by pooling
    # neighbours.
    pools: list[tuple[float, int]] = []  # mean and size of each pool
    for number, place in enumerate(places):
        mean, count = place - number * step, 1
        while pools and pools[-1][0] > mean:
            other, members = pools.pop()
            mean, count = (mean * count + other * members) / (count + members), count + members
        pools.append((mean, count))
    top = max(low, high - (len(places) - 1) * step)
    flat = [min(max(mean, low), top) for mean, count in pools for _ in range(count)]
    return [value + number * step for number, value in enumerate(flat)]


def _end_offsets(ax: Axes, ends: Mapping[str, tuple[float, Any]], size: float) -> dict[str, float] | None:
    """Distance in points from each line's end up to its label; ``None`` if one of them exceeds ``REACH``."""
    figure = cast(Figure, ax.get_figure(root=True))
    figure.draw_without_rendering()  # the height of a panel is known only once everything is laid out
    names = sorted(ends, key=lambda name: ends[name][0])
    points = 72 / figure.dpi
    heights = [float(ax.transData.transform((1.0, _inside(ax, ends[name][0])))[1]) * points for name in names]
    box, step = ax.get_window_extent(), LINE_HEIGHT * size
    # half a label may stand above or below the panel, as the label of a line on its border does
    places = spread_out(heights, step, box.y0 * points - step / 2, box.y1 * points + step / 2)
    offsets = {name: place - height for name, place, height in zip(names, places, heights)}
    return None if any(abs(offset) > REACH * size for offset in offsets.values()) else offsets


def _annotate_ends(
    ax: Axes, ends: Mapping[str, tuple[float, Any]], offsets: Mapping[str, float], size: float
) -> None:
    for name, (value, colour) in ends.items():
        ax.annotate(
            name,
            (1.0, _inside(ax, value)),
            xycoords=("axes fraction", "data"),
            xytext=(4, offsets[name]),
            textcoords="offset points",
            color=style.text_colour(colour),
            fontsize=size,
            va="center",
            annotation_clip=False,
        )


def _inside(ax: Axes, value: float) -> float:
    """The value nearest to ``value`` that is in view."""
    low, high = sorted(ax.get_ylim())
    return min(max(value, low), high)


def _line_of(ax: Axes, colour: Any) -> Line2D:
    """A legend's sample of the line of this colour, with its dashes and marker."""
    drawn = [line for line in ax.lines if same_color(line.get_color(), colour)]
    if not drawn:
        return Line2D([], [], color=colour)
    line = drawn[0]
    return Line2D(
        [], [], color=colour, linestyle=line.get_linestyle(), linewidth=line.get_linewidth(),
        marker=line.get_marker(), markersize=line.get_markersize(),
    )  # fmt: skip


def _select(table: pd.DataFrame, benchmark: str, method: str) -> pd.DataFrame:
    """Mean score and interval of a method over keep, 0 to 100."""
    rows = cast(pd.DataFrame, table[(table["benchmark"] == benchmark) & (table["method"] == method)])
    means = rows.groupby("keep", as_index=True)[["score", "ci_low", "ci_high"]].mean()
    return 100 * cast(pd.DataFrame, means).sort_index()


def _largest_keep(table: pd.DataFrame) -> float:
    """The largest budget of the methods that depend on one, so that lines end near the right border."""
    keeps = table.loc[~table["method"].isin(FLAT), "keep"]
    return float(keeps.max()) if len(keeps) else 0.9


def _plot_method(ax: Axes, rows: pd.DataFrame, method: str) -> float | None:
    """One method's line; returns the value at its right end, ``None`` where there is nothing to draw."""
    if rows.empty:
        return None
    colour, emphasised = style.colour(method), method in EMPHASISED
    end = float(np.asarray(rows["score"])[-1])
    if method in FLAT:
        ax.axhline(end, color=colour, linestyle=(0, (4, 2)), linewidth=1.2, zorder=2)
        return end
    ax.plot(
        rows.index,
        rows["score"],
        color=colour,
        marker=style.marker(method),
        markersize=3.2 if emphasised else 2.4,
        linewidth=1.8 if emphasised else 0.9,
        zorder=4 if emphasised else 3,
    )
    if emphasised:
        ax.fill_between(
            rows.index, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.18, linewidth=0, zorder=1
        )
    return end


def _plot_live(ax: Axes, rows: pd.DataFrame, method: str) -> None:
    """Open points with their intervals."""
    if rows.empty or method in FLAT:
        return
    below, above = rows["score"] - rows["ci_low"], rows["ci_high"] - rows["score"]
    reach = np.stack([below, above]).clip(min=0)  # [2, keeps]
    ax.errorbar(
        rows.index,
        rows["score"],
        yerr=reach,
        fmt=style.marker(method),
        markersize=5,
        markerfacecolor="white",
        markeredgecolor=style.colour(method),
        ecolor=style.colour(method),
        elinewidth=0.8,
        capsize=1.5,
        zorder=5,
    )
