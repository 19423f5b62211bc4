"""The numbers that a matplotlib figure shows, read back from what is drawn in it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import FillBetweenPolyCollection, LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

from tokensel.figures import overlays, style

COLUMNS = ("panel", "series", "name", "x label", "x", "y label", "y", "low", "high")
Series = tuple[str, pd.DataFrame]  # a name, and its points: x, y, low, high


def table(figure: Figure) -> pd.DataFrame:
    """What a figure shows, a row a point of its lines, bars and dots, a row a line of cells of its overlays.

    Points have the columns of :data:`COLUMNS`, those that are empty left out: ``low`` and ``high`` are the
    ends of the interval that is drawn, in the units of the axis along which it lies, ``name`` the word at the
    point's tick. Overlays have ``panel``, ``row`` and a column for each cell, from 1 on: 1 = kept,
    0 = dropped, or the value of a heat map; empty where there is no token.
    Images without an overlay, decoration and artists of other kinds add nothing.
    """
    axes = [ax for ax in figure.axes if ax.get_visible()]
    legends = [legend for ax in axes if (legend := ax.get_legend())] + list(figure.legends)
    everywhere = _names_by_colour([text for ax in axes for text in ax.texts], legends)
    points: list[pd.DataFrame] = []
    cells: list[pd.DataFrame] = []
    for ax in axes:
        if ax.images:  # lines over an image are its borders
            cells += _cells(ax)
        else:
            own = [legend for legend in [ax.get_legend()] if legend is not None]
            names = everywhere | _names_by_colour(list(ax.texts), own)
            points += [_described(ax, *series) for series in _distinct(list(_series(ax, names)))]
    if points:
        # value by value: replace() would change a column's type here, of which pandas before 3 warns
        joined = pd.concat(points, ignore_index=True).map(lambda value: np.nan if value == "" else value)
        empty = set(joined.columns[joined.isna().all()])
        cells.insert(
            0, joined.reindex(columns=pd.Index([c for c in COLUMNS if c == "panel" or c not in empty]))
        )
    return pd.concat(cells, ignore_index=True) if cells else pd.DataFrame(columns=pd.Index(["panel"]))


def _described(ax: Axes, name: str, points: pd.DataFrame) -> pd.DataFrame:
    vertical = _words_at_ticks(ax.yaxis)
    words, at = (vertical, points["y"]) if vertical else (_words_at_ticks(ax.xaxis), points["x"])
    return points.assign(
        panel=_title(ax),
        series=name,
        name=[_nearest(words, place) for place in at],
        **{"x label": _label(ax, "x"), "y label": _label(ax, "y")},
    )


# --- what is drawn ----------------------------------------------------------------------------------------


def _series(ax: Axes, names: dict[str, str]) -> Iterator[Series]:
    """Every series of points in ``ax``, each artist once."""
    seen: set[Artist] = set()
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            seen |= {part for part in container.get_children() if isinstance(part, Artist)}
            yield from _errorbar(container, names)
        elif isinstance(container, BarContainer):
            yield from _bars(container)
    bands = [_band(each) for each in ax.collections if isinstance(each, FillBetweenPolyCollection)]
    for line in ax.lines:
        if line in seen:
            continue
        points = _line(ax, line)
        if points is not None:
            colour = _hex(line.get_color())
            for band_colour, band in bands:
                # a band belongs to the line of its colour that has the same places
                if band_colour == colour and np.array_equal(band["x"], points["x"]):
                    points = points.assign(low=band["low"], high=band["high"])
            yield _name(line, colour, names), points
    for area in ax.collections:
        # a band with a label of its own, such as one of a stack: y is its height
        if isinstance(area, FillBetweenPolyCollection) and not str(area.get_label()).startswith("_"):
            x, low, high = (_band(area)[1][name].to_numpy() for name in ("x", "low", "high"))
            yield str(area.get_label()), _frame(x, np.abs(high - low), low, high)
    for dots in ax.collections:
        if isinstance(dots, PathCollection):
            x, y = np.asarray(dots.get_offsets(), dtype=float).T
            yield _name(dots, _hex(dots.get_facecolor()[0]), names), _frame(x, y)


def _frame(
    x: np.ndarray, y: np.ndarray, low: np.ndarray | float = np.nan, high: np.ndarray | float = np.nan
) -> pd.DataFrame:
    points = pd.DataFrame({"x": x, "y": y}, dtype=float).assign(low=low, high=high)
    return points.dropna(subset=["x", "y"], how="all")


def _line(ax: Axes, line: Line2D) -> pd.DataFrame | None:
    """The points of a line; one across the whole axes has one coordinate. None if it is in other units."""
    x, y = (np.ma.filled(np.ma.asarray(part, dtype=float), np.nan) for part in line.get_data(orig=False))
    if line.get_transform() is ax.get_yaxis_transform(which="grid"):  # axhline
        return _frame(np.array([np.nan]), y[:1])
    if line.get_transform() is ax.get_xaxis_transform(which="grid"):  # axvline
        return _frame(x[:1], np.array([np.nan]))
    return _frame(x, y) if line.get_transform() is ax.transData else None


def _errorbar(container: ErrorbarContainer, names: dict[str, str]) -> Iterator[Series]:
    line, _, bars = container.lines
    if line is None:
        return
    x, y = (np.asarray(part, dtype=float) for part in line.get_data(orig=False))
    # bars along x come first; where both are drawn, the interval of y is the one that is written
    bar = bars[-1] if bars else None
    ends = np.full((len(x), 2), np.nan)
    if isinstance(bar, LineCollection):
        segments = [np.asarray(segment)[:, 1 if container.has_yerr else 0] for segment in bar.get_segments()]
        ends = np.array(segments) if len(segments) == len(x) else ends
    colour = _hex(line.get_markeredgecolor() if line.get_linestyle() == "None" else line.get_color())
    yield _name(container, colour, names), _frame(x, y, ends[:, 0], ends[:, 1])


def _bars(container: BarContainer) -> Iterator[Series]:
    flat = container.orientation == "horizontal"
    corners = [(bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()) for bar in container.patches]
    x, y, width, height = np.array(corners).reshape(-1, 4).T
    length = width if flat else height
    if len(length) == 1 and length[0] == 0:
        return  # an empty bar only lends its colour to the legend
    label = str(container.get_label())
    points = _frame(length, y + height / 2) if flat else _frame(x + width / 2, length)
    yield "" if label.startswith("_") else label, points


def _band(band: FillBetweenPolyCollection) -> tuple[str, pd.DataFrame]:
    """Colour, places and ends of an interval along a line."""
    corners = np.concatenate([np.empty((0, 2)), *(path.vertices for path in band.get_paths())])
    # matplotlib walks from the start along the one edge, and from the end back along the other
    n = max(0, (len(corners) - 3) // 2)
    there, back = corners[1 : n + 1], corners[n + 2 : 2 * n + 2][::-1]
    ends = pd.DataFrame({"x": there[:, 0], "low": there[:, 1], "high": back[:, 1]})
    return _hex(band.get_facecolor()[0]), ends


def _cells(ax: Axes) -> list[pd.DataFrame]:
    tables = []
    for image in ax.images:
        if image in overlays.CELLS:
            values = overlays.CELLS[image]
            frame = pd.DataFrame(values, columns=pd.RangeIndex(1, values.shape[1] + 1))
            frame.insert(0, "row", np.arange(1, len(frame) + 1))
            frame.insert(0, "panel", _title(ax))
            tables.append(frame)
    return tables


# --- what it is called ------------------------------------------------------------------------------------


def _name(artist: Artist | ErrorbarContainer, colour: str, names: dict[str, str]) -> str:
    """The label of a series, or the word of its colour beside it."""
    label = str(artist.get_label())
    return names.get(style.text_colour(colour), "") if not label or label.startswith("_") else label


def _hex(colour: Any) -> str:
    return to_hex(colour)


def _names_by_colour(texts: list[Text], legends: list[Legend]) -> dict[str, str]:
    """What each colour of text names, in labels and legends, where it names one thing only."""
    words: dict[str, set[str]] = {}
    for text in texts:
        words.setdefault(_hex(text.get_color()), set()).add(text.get_text().strip())
    for legend in legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts()):
            if isinstance(handle, Line2D):
                colour = style.text_colour(_hex(handle.get_color()))
                words.setdefault(colour, set()).add(text.get_text().strip())
    return {colour: next(iter(every)) for colour, every in words.items() if len(every) == 1}


def _distinct(series: list[Series]) -> Iterator[Series]:
    """Series without a name, or of a name that was there before, get a number."""
    seen: dict[str, int] = {}
    for name, points in series:
        seen[name] = seen.get(name, 0) + 1
        if not name:
            yield f"series {seen[name]}", points
        else:
            yield (name if seen[name] == 1 else f"{name} ({seen[name]})"), points


def _title(ax: Axes) -> str:
    """The title of a panel; in a grid of images that of its column, after the word beside its row."""
    place, figure = ax.get_subplotspec(), ax.get_figure(root=True)
    own = next(filter(None, (ax.get_title(side) for side in ("left", "center", "right"))), "")
    if not ax.images or place is None or figure is None:
        return own
    row, column = "", own
    for other in figure.axes:
        spot = other.get_subplotspec()
        if spot is not None and spot.rowspan.start == place.rowspan.start:
            row = row or other.get_ylabel()
        if spot is not None and spot.colspan.start == place.colspan.start and not column:
            column = next(filter(None, (other.get_title(side) for side in ("left", "center", "right"))), "")
    return ", ".join(filter(None, (row, column)))


def _label(ax: Axes, axis: str) -> str:
    """What an axis measures: its label, that of an axis it is shared with, or that of the whole figure."""
    grouper = ax.get_shared_x_axes() if axis == "x" else ax.get_shared_y_axes()
    figure = ax.get_figure(root=True)
    own = [ax, *sorted(grouper.get_siblings(ax), key=lambda other: other.get_position().bounds)]
    labels = [other.get_xlabel() if axis == "x" else other.get_ylabel() for other in own]
    if figure is not None:
        labels.append(figure.get_supxlabel() if axis == "x" else figure.get_supylabel())
    return next(filter(None, labels), "")


def _words_at_ticks(axis: Axis) -> dict[float, str]:
    """Where an axis has words for ticks, what stands where; empty for an axis of numbers."""
    if not isinstance(axis.get_major_locator(), FixedLocator):
        return {}
    formatter = axis.get_major_formatter()
    places = axis.get_majorticklocs()
    words = {float(place): formatter(place, number).strip() for number, place in enumerate(places)}
    return words if any(word and not word[0].isdigit() for word in words.values()) else {}


def _nearest(words: dict[float, str], place: float) -> str:
    near = min(words, key=lambda tick: abs(tick - place), default=np.nan)
    return words[near] if abs(near - place) <= 0.5 else ""
