"""What is drawn can be read back: points, intervals, bars, dots and the cells of overlays."""

import csv

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tokensel.figures import curves, numbers, overlays, style


@pytest.fixture(autouse=True)
def _no_figures_left():
    style.use()
    yield
    plt.close("all")


def series(table: pd.DataFrame, name: str, *columns: str) -> list:
    return table.loc[table["series"] == name, list(columns)].to_numpy().tolist()


def test_lines_carry_their_interval_and_the_word_of_their_colour():
    figure, (left, right) = plt.subplots(1, 2, sharey=True)
    left.plot([0.1, 0.3], [2.0, 3.0], color=style.ORANGE)
    left.fill_between([0.1, 0.3], [1.5, 2.5], [2.5, 3.5], color=style.ORANGE, alpha=0.2)
    left.axhline(4.0, color=style.GREEN)
    curves.label_ends(left, {"selector": (3.0, style.ORANGE), "all tokens": (4.0, style.GREEN)})
    left.set(title="forms", xlabel="keep", ylabel="score")
    right.plot([0.1], [1.0], label="random")
    right.set(title="charts", xlabel="keep")
    table = numbers.table(figure)
    assert series(table, "selector", "panel", "x", "y", "low", "high") == [
        ["forms", 0.1, 2.0, 1.5, 2.5], ["forms", 0.3, 3.0, 2.5, 3.5],
    ]  # fmt: skip
    assert series(table, "random", "panel", "x label", "y label") == [["charts", "keep", "score"]]
    flat = table[table["series"] == "all tokens"].iloc[0]
    assert flat["y"] == 4.0 and np.isnan(flat["x"])


def test_lines_are_named_by_a_legend_that_takes_the_place_of_labels():
    figure, ax = plt.subplots()
    lines = [
        ax.plot([0.0, 1.0], [0.0, y], color=colour)[0]
        for y, colour in ((1.0, style.ORANGE), (2.0, style.BLUE))
    ]
    ax.legend(lines, ["selector", "random"])
    assert series(numbers.table(figure), "random", "y") == [[0.0], [2.0]]


def test_error_bars_bars_and_dots_have_the_word_at_their_tick():
    figure, (left, middle, right) = plt.subplots(1, 3)
    left.errorbar([5.0, 6.0], [1.0, 0.0], xerr=[[1.0, 2.0], [3.0, 4.0]], fmt="o", label="gap")
    left.set(yticks=[0, 1], yticklabels=["charts", "forms"])
    pd.DataFrame({"prefill": [1.0, 2.0]}, index=["a", "b"]).plot.barh(ax=middle, stacked=True)
    middle.bar(0, 0, label="only in the legend")
    right.scatter([1.0], [2.0], label="dots")
    table = numbers.table(figure)
    assert series(table, "gap", "name", "x", "low", "high") == [
        ["forms", 5.0, 4.0, 8.0],
        ["charts", 6.0, 4.0, 10.0],
    ]
    assert series(table, "prefill", "name", "x") == [["a", 1.0], ["b", 2.0]]
    assert series(table, "dots", "x", "y") == [[1.0, 2.0]]
    assert "only in the legend" not in set(table["series"])


def test_the_areas_of_a_stack_are_read_one_by_one():
    figure, ax = plt.subplots()
    ax.stackplot([0, 1], [[1.0, 2.0], [3.0, 0.5]], labels=["system", "image"])
    table = numbers.table(figure)
    assert series(table, "system", "x", "y") == [[0.0, 1.0], [1.0, 2.0]]
    assert series(table, "image", "x", "y", "low", "high") == [[0.0, 3.0, 1.0, 4.0], [1.0, 0.5, 2.0, 2.5]]


def test_names_that_are_missing_or_met_twice_are_numbered():
    figure, ax = plt.subplots()
    for label in ("a", "a", None, None):
        ax.plot([0.0, 1.0], [0.0, 1.0], label=label)
    assert list(dict.fromkeys(numbers.table(figure)["series"])) == ["a", "a (2)", "series 1", "series 2"]


def test_overlays_give_their_cells_and_an_image_alone_gives_nothing():
    image = Image.new("RGB", (8, 4))
    kept = torch.tensor([[True, False], [False, True]])
    table = numbers.table(overlays.gallery([("page", image, [kept, ~kept])], ["random", "selector"]))
    assert list(table.columns) == ["panel", "row", 1, 2]
    assert table[[1, 2]].to_numpy().tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    assert list(dict.fromkeys(table["panel"])) == ["page, random", "page, selector"]
    figure, (left, right) = plt.subplots(1, 2)
    overlays.show(left, image, kept, "kept", real=torch.tensor([[True, True], [True, False]]))
    overlays.heat(right, image, torch.tensor([[0.5, 0.25]]), "error")
    table = numbers.table(figure)
    assert table.loc[table["panel"] == "kept", 2].isna().tolist() == [False, True]
    assert table.loc[table["panel"] == "error", [1, 2]].to_numpy().tolist() == [[0.5, 0.25]]
    figure, ax = plt.subplots()
    overlays.show(ax, image)
    assert numbers.table(figure).empty


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20).flatmap(lambda n: arrays(float, (4, n), elements=st.floats(-1e6, 1e6, width=32))))
def test_any_line_with_any_band_is_read_back(values):
    x, y, low, high = values
    x = np.sort(x)
    figure, ax = plt.subplots()
    try:
        ax.plot(x, y, color=style.BLUE, label="line")
        ax.fill_between(x, np.minimum(low, high), np.maximum(low, high), color=style.BLUE)
        # not by read_csv, which before pandas 3 rounds the last digit
        rows = list(csv.DictReader(numbers.table(figure).to_csv().splitlines()))
        columns = [[float(row[name]) for row in rows] for name in ("x", "y", "low", "high")]
        assert np.array_equal(columns, [x, y, np.minimum(low, high), np.maximum(low, high)])
    finally:
        plt.close(figure)
