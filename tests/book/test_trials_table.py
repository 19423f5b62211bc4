"""The recorded trials of selectors as tables and figures."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from tokensel.book.figures.trials import Trials


@pytest.fixture
def trials():
    rows = [
        dict(study="metrics", tower=tower, name=name, seed=seed, steps=steps, method="selector", keep=keep)
        | dict(group="reading", score=score + 10 * seed, reach=2.0, l_rec=1 / steps)
        for tower, score in (("one", 40.0), ("two", 60.0))
        for name in ("features", "projector")
        for seed in (0, 1)
        for steps, keep in ((100, 0.3), (200, 0.3), (200, 0.5))
    ]
    baselines = [
        dict(study="metrics", tower=tower, name="features", seed=0, steps=200, method=method, keep=keep)
        | dict(group="reading", score=score, reach=2.0, l_rec=0.1)
        for tower in ("one", "two")
        for method, keep, score in (("full", 1.0, 90.0), ("norm", 0.3, 20.0), ("norm", 0.5, 30.0))
    ]
    return Trials(pd.DataFrame(rows + baselines))


def test_a_cell_is_the_mean_of_the_seeds_at_the_end_of_the_training(trials):
    cells = trials.scores("metrics", (0.3, 0.5), ["full", "norm"])
    assert list(cells.columns) == ["one", "two"]
    assert cells.loc["projector", "two"] == "65 · 65"
    assert cells.loc["norm", "one"] == "20 · 30" and cells.loc["full", "one"] == "90 · 90"
    assert set(trials.of("metrics")["steps"]) == {200}
    assert len(trials.of("metrics", keep=0.3, tower="one")) == 4


def test_panels_and_curves_have_a_mark_for_each_trial(trials):
    trials.panels("metrics", 0.3, ["full", "norm"])
    axes = plt.gcf().axes
    assert [ax.get_title() or ax.get_title(loc="left") for ax in axes] == ["one", "two"]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["features", "projector"]
    assert len(axes[0].containers[0].lines[0].get_xdata()) == 4
    trials.curves("metrics", 0.3)
    left, right = plt.gcf().axes
    first, *_, last = left.lines[0].get_ydata()
    assert last < first
    assert len(right.lines) == 4  # two towers and two seeds
    plt.close("all")
