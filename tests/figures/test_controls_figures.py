"""Figures of controls."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tokensel.figures.controls import kept_histogram, score_pairs


def test_two_scores_of_each_method_stand_on_its_line_and_the_best_second_one_on_top():
    rows = [("full", "first", 90.0, 5.0), ("full", "second", 85.0, 5.0), ("random", "first", 30.0, 40.0)]
    rows += [("random", "second", 20.0, 30.0), ("fastv", "first", 95.0, 3.0), ("fastv", "second", 40.0, 9.0)]
    rows += [("vtw", "first", 50.0, 1.0)]
    points = pd.DataFrame(rows, columns=["method", "turn", "score", "reach"]).set_index(["method", "turn"])
    ax: Any = score_pairs(points, ("first", "second")).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["random", "FastV", "all tokens"]
    first, second = (container.lines[0].get_xdata() for container in ax.containers)
    assert list(first) == [30, 95, 90] and list(second) == [20, 40, 85]
    low = [segment[0][0] for segment in ax.containers[1].lines[2][0].get_segments()]
    assert low == [0, 31, 80], "no interval goes below 0"
    plt.close("all")


def test_a_histogram_of_kept_positions_is_relative_to_its_mean_in_every_direction():
    shares = {"height": {"fastv": [0.1, 0.3], "random": np.array([0.2, 0.2])}, "width": {"fastv": [0.2, 0.2]}}
    height, width = kept_histogram(shares).axes
    assert height.lines[0].get_ydata() == pytest.approx([0.5, 1.5])
    assert height.lines[1].get_ydata() == pytest.approx([1, 1])
    assert height.get_xlabel() == "height in the image (0 top, 1 bottom)" and len(width.lines) == 2
    plt.close("all")
