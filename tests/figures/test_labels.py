"""Labels at the ends of lines, the legend that takes their place, and type that is large enough on a page."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image
from test_figures import table
from tiny import ask, tiny_vlm

from tokensel.figures import curves, overlays, style
from tokensel.methods import methods
from tokensel.schedules import SCHEDULES
from tokensel.scorers import SCORERS
from tokensel.vlm import encode

SMALLEST = 8.0  # points, on a page 1,300 pixels wide


@pytest.fixture(autouse=True)
def book_style():
    style.use()
    yield
    plt.close("all")


def label_boxes(ax):
    """The labels of ``ax``: name, lower and upper edge, and the height of the line's end, all in points."""
    ax.figure.draw_without_rendering()
    points = 72 / ax.figure.dpi
    for text in ax.texts:
        box = text.get_window_extent()
        end = ax.transData.transform((0, text.xy[1]))[1]
        yield text.get_text(), box.y0 * points, box.y1 * points, end * points


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=9),
    st.sampled_from([1.4, 2.6, 4.0]),
    st.booleans(),
)
def test_a_label_is_beside_its_own_line_and_on_no_other_label(values, height, log):
    figure, ax = plt.subplots(figsize=(4, height))
    ax.set(ylim=(0.1, 110), yscale="log" if log else "linear", xlabel="x", title="title")
    curves.label_ends(ax, {f"line {n}": (value, "k") for n, value in enumerate(values)})
    boxes = sorted(label_boxes(ax), key=lambda box: box[1])
    assert (
        [name for name, *_ in boxes]
        == [name for _, name in sorted((value, f"line {n}") for n, value in enumerate(values))]
        or ax.get_legend()
        or len(set(values)) < len(values)
    )
    for (_, _, top, _), (_, bottom, _, _) in itertools.pairwise(boxes):
        assert bottom >= top - 0.1
    for _, bottom, top, end in boxes:
        assert (
            abs((bottom + top) / 2 - end) <= curves.REACH * style.LABEL + 1.5
        )  # a text's box is not symmetric
    if ax.get_legend():
        assert not boxes
        listed = [int(text.get_text().split()[1]) for text in ax.get_legend().get_texts()]
        assert sorted(listed) == list(range(len(values)))
        assert [values[n] for n in listed] == sorted(values, reverse=True)
    plt.close(figure)


def test_few_ends_far_apart_are_labelled_and_many_close_ones_get_a_legend():
    _, (few, many) = plt.subplots(1, 2)
    for ax in (few, many):
        ax.set_ylim(0, 100)
    curves.label_ends(few, {"a": (50.0, "k"), "b": (50.1, "k"), "c": (99.0, "k"), "d": (99.5, "k")})
    curves.label_ends(many, {name: (90.0 + k, f"C{k}") for k, name in enumerate("abcdefg")})
    assert len(few.texts) == 4 and few.get_legend() is None
    assert [text.get_text() for text in many.get_legend().get_texts()] == list("gfedcba")
    assert not many.texts
    _, ax = plt.subplots()
    colours = plt.get_cmap("cividis")([0.2, 0.5, 0.8])  # arrays, as a chapter gives them
    for colour in colours:
        ax.plot([0, 1], color=colour, marker="s")
    curves.label_ends(ax, {f"layer {k}": (1.0, colour) for k, colour in enumerate(colours)})
    assert [handle.get_marker() for handle in ax.get_legend().legend_handles] == ["s"] * 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.1, 12))
def test_places_are_spread_no_further_than_needed(places, step):
    places = sorted(places)
    moved = curves.spread_out(places, step, 0.0, 100.0)
    assert (np.diff(moved) >= step - 1e-9).all()
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in moved)
    if all(after - before >= step for before, after in itertools.pairwise(places)):
        assert moved == pytest.approx(places)


def test_the_legend_of_many_panels_is_in_the_order_in_which_the_lines_end():
    methods = ("full", "none", *SCORERS)
    figure = curves.score_curves(table(methods).assign(score=lambda rows: rows["score"] / 10 + 0.7))
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(names) == len(methods) and not any(ax.texts for ax in figure.axes)
    ends = table(methods).groupby("method")["score"].last()
    order = sorted(methods, key=lambda method: -ends[method])
    assert names == [style.label(method) for method in order]


def shown_sizes(figure, path):
    """The size on the page of every text in a figure, from the width of its file in a notebook."""
    figure.savefig(path, bbox_inches="tight")  # as the inline backend does
    with Image.open(path) as image:
        width = image.width / style.DPI
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert texts
    return {text.get_text(): style.rendered_size(float(text.get_fontsize()), width) for text in texts}


def test_type_is_large_enough_on_a_page(tmp_path):
    long = table(("full", "none", *SCORERS), benchmarks=("forms", "charts", "scene", "posters", "more"))
    cost = long.assign(flops=1.0, group=long["benchmark"])
    _, ax = plt.subplots(figsize=(style.WIDTH, 2.5))
    ax.plot([0, 1])
    ax.set(xlabel="x", ylabel="y", title="title")
    ax.annotate("note", (0.5, 0.5))
    curves.label_ends(ax, {"end": (1.0, "k")})
    vlm = tiny_vlm()
    figures = [
        plt.gcf(),
        curves.score_curves(long),
        curves.score_curves(table()),
        curves.cost_curves(cost),
        overlays.gallery(
            [("row", Image.new("RGB", (64, 64)), [torch.ones(2, 2, dtype=torch.bool)])], ["a mask"]
        ),
        overlays.anyres(encode(vlm.model, ask(vlm, [1])), title="tiles"),
    ]
    for figure in figures:
        sizes = shown_sizes(figure, tmp_path / "figure.png")
        assert min(sizes.values()) >= SMALLEST, min(sizes.items(), key=lambda item: item[1])


def test_every_size_of_the_style_can_be_read_in_the_widest_figure():
    numbers = {key: mpl.rcParams[key] for key in mpl.rcParams if key.endswith("size") and "font" not in key}
    names = ("axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
    sizes = [numbers[name] for name in names] + [mpl.rcParams["font.size"], mpl.rcParams["legend.fontsize"]]
    assert all(style.rendered_size(float(size), style.WIDTH) >= SMALLEST for size in [*sizes, style.LABEL])
    assert style.rendered_size(8.0, style.WIDTH) == pytest.approx(8)
    assert style.rendered_size(8.0, 2 * style.WIDTH) == pytest.approx(4)


@settings(max_examples=50)
@given(st.floats(0.5, 40))
def test_no_figure_is_wider_than_the_page(width):
    assert style.fit(width) == (width if width < style.WIDTH else style.WIDTH)
    assert style.rendered_size(style.LABEL, style.fit(width)) >= SMALLEST


def test_wide_galleries_and_many_panels_stay_as_wide_as_the_page():
    mask = torch.ones(2, 2, dtype=torch.bool)
    many = table(benchmarks=[f"benchmark {k}" for k in range(9)])
    figures = [
        overlays.gallery([("row", Image.new("RGB", (64, 32)), [mask])], ["a mask"], width=12.0),
        curves.score_curves(many, columns=9),
        curves.cost_curves(many.assign(flops=1.0), by="benchmark"),
    ]
    assert [figure.get_figwidth() for figure in figures] == [pytest.approx(style.WIDTH)] * 3
    gallery = figures[0]
    assert gallery.get_figheight() == pytest.approx(style.WIDTH / 2 / 2 + 0.3)  # the panels keep their shape


def test_curves_end_near_the_right_border():
    few = table().query("keep <= 0.5 or method == 'full'")
    axes = curves.score_curves(few).axes[0]
    assert axes.get_xlim() == pytest.approx((0.05, 0.55))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "", "0.5"]
    flat = curves.score_curves(table(("full", "none"))).axes[0]
    assert flat.get_xlim() == pytest.approx((0.05, 0.95))


def test_methods_of_the_tables_have_colours_of_their_own_and_others_get_a_default():
    named = [name for name in (*SCORERS, "full", "none", "downsample", "native") if name in style.COLOURS]
    assert len({style.colour(name) for name in named}) == len(named) >= 9
    new = "my_new_scorer"
    all_methods = [*methods(), *SCHEDULES, "selector+fastv", "oracle", "drawn"]
    pairs = {name: (style.colour(name), style.marker(name)) for name in all_methods}
    assert len(set(pairs.values())) == len(pairs) > 25
    assert style.colour(new) in style.SPARE_COLOURS and style.marker(new) in style.SPARE_MARKERS
    assert not {*style.SPARE_COLOURS} & {*style.COLOURS.values()}
    assert style.label(new) == "my new scorer"
    frame = table(("full", "selector", new))
    figure = curves.score_curves(frame)
    assert style.colour(new) in {line.get_color() for line in figure.axes[0].lines}
    assert curves.cost_curves(frame.assign(flops=1.0)).legends


def test_text_in_any_of_the_colours_can_be_read_on_white():
    assert style.text_colour("#000000") == "#000000"
    assert style.text_colour("#767676") == "#767676", "the known limit among the greys"
    assert style.text_colour("#777777") != "#777777"
    for name in (*style.COLOURS, "my_new_scorer"):
        colour = style.text_colour(style.colour(name))
        red, green, blue = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
        assert style._contrast([red, green, blue]) >= 4.4  # rounding to a byte may cost a little


def test_a_figure_of_one_point_has_no_missing_numbers():
    frame = pd.DataFrame([row for _, row in table(("selector",)).query("keep == 0.5").iterrows()])
    assert curves.score_curves(frame).axes[0].lines
