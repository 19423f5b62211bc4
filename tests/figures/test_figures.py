"""Figures: what is veiled, how masks join, the Principia page, the curves and their labels."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import ask, tiny_vlm

from tokensel.book.figures import principia
from tokensel.book.figures.sweep import Sweep
from tokensel.figures import curves, overlays, style
from tokensel.utils.errors import TokenselError
from tokensel.vlm import encode, reduce


@pytest.fixture(autouse=True)
def close_figures():
    style.use()
    yield
    plt.close("all")


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_joined_masks_put_each_token_where_its_tile_was_cut(rows, columns, height, width, seed):
    page = torch.rand(rows * height, columns * width, generator=torch.Generator().manual_seed(seed)) < 0.5
    tiles = [
        page[r * height : (r + 1) * height, c * width : (c + 1) * width].flatten()
        for r in range(rows)
        for c in range(columns)
    ]
    assert torch.equal(overlays.join_masks(torch.stack(tiles), rows, columns, (height, width)), page)


def test_joining_masks_refuses_another_shape():
    with pytest.raises(TokenselError, match="2 x 2 tiles"):
        overlays.join_masks(torch.ones(3, 4, dtype=torch.bool), 2, 2, (2, 2))


def test_cut_tiles_gives_back_the_image():
    image = principia.principia_page(128, 192)
    tiles = overlays.cut_tiles(image, 3, 2, 64)
    assert len(tiles) == 6 and all(tile.size == (64, 64) for tile in tiles)
    assert np.array_equal(np.asarray(tiles[3]), np.asarray(image)[64:128, 64:128])


def test_veil_leaves_kept_cells_alone_and_covers_dropped_ones():
    image = Image.new("RGB", (20, 10), (255, 255, 255))
    kept = torch.tensor([[True, False]])
    pixels = overlays.veiled(image, kept)
    assert (pixels[:, :10] == 255).all()
    assert (pixels[:, 10:] < 200).all()
    assert (np.asarray(image) == 255).all()
    assert np.array_equal(overlays.veiled(image, None), np.asarray(image))


@pytest.mark.parametrize("size", [(512, 704), (336, 336), (672, 336), (128, 128)])
def test_principia_stands_whole_on_its_page(size):
    page = np.asarray(principia.principia_page(*size)).astype(int)
    assert page.shape == (size[1], size[0], 3)
    ink = np.abs(page - np.array(principia.PAPER)).sum(-1) > 40
    rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
    assert rows[0] > 0.04 * size[1] and rows[-1] < 0.97 * size[1]
    assert columns[0] > 0.05 * size[0] and columns[-1] < 0.95 * size[0]
    assert rows[-1] - rows[0] > 0.6 * size[1]
    assert 0.02 < ink.mean() < 0.5


def test_principia_is_the_same_each_time_and_refuses_a_stamp():
    assert principia.principia_page(200, 300).tobytes() == principia.principia_page(200, 300).tobytes()
    with pytest.raises(TokenselError, match="64 x 300"):
        principia.principia_page(64, 300)


def table(methods=("full", "none", "random", "selector"), benchmarks=("forms", "charts", "scene")):
    rows = []
    for benchmark in benchmarks:
        for number, method in enumerate(methods):
            for keep in (1.0,) if method == "full" else (0.0,) if method == "none" else (0.1, 0.5, 0.9):
                score = 0.2 + 0.1 * number + 0.3 * keep
                rows.append(
                    ("m", benchmark, "reading", method, keep, "anls", score, score - 0.05, score + 0.05, 9, 0)
                )
    return pd.DataFrame(rows, columns=curves.COLUMNS)


def test_curves_have_a_panel_a_benchmark_and_name_every_method():
    figure = curves.score_curves(table(), live=table().query("keep == 0.5"), columns=2)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") for ax in shown] == ["forms", "charts", "scene"]
    for ax in shown[1:]:  # the last panel of each row
        assert {text.get_text() for text in ax.texts} == {"all tokens", "no image", "random", "selector"}
    orange = [
        line for line in shown[0].lines if line.get_color() == style.ORANGE and len(line.get_xdata()) == 3
    ]
    assert list(orange[0].get_ydata()) == pytest.approx([53.0, 65.0, 77.0])


def test_curves_refuse_a_table_that_is_not_long():
    with pytest.raises(TokenselError, match="ci_low"):
        curves.score_curves(table().drop(columns="ci_low"))
    with pytest.raises(TokenselError, match="empty"):
        curves.score_curves(table().iloc[:0])


def bounds(live, method, keep):
    """Ends of the interval of a mean over benchmarks: half widths add as for independent means."""
    rows = live[(live["method"] == method) & (live["keep"] == keep)]
    half = 100 * (((rows["ci_high"] - rows["ci_low"]) / 2) ** 2).sum() ** 0.5 / len(rows)
    return 100 * rows["score"].mean() - half, 100 * rows["score"].mean() + half


def test_a_recorded_sweep_is_said_to_be_one_and_drawn_under_the_live_points(tmp_path):
    live, recorded = tmp_path / "live.csv", tmp_path / "recorded.csv"
    table(benchmarks=("forms", "charts")).to_csv(live, index=False)
    alone = Sweep.beside(live, recorded)
    assert (
        alone.recorded is None
        and "recorded" not in alone.source
        and "computed here, now**, 9 questions" in alone.source
    )
    table().assign(n=400, score=0.5).to_csv(recorded, index=False)
    (tmp_path / "recorded.provenance.json").write_text('{"date": "2026-01-02T03:04:05"}')
    both = Sweep.beside(live, recorded)
    table().assign(difference=0.25).to_csv(tmp_path / "recorded.differences.csv", index=False)
    assert (
        both.companion("differences", live)["difference"] == 0.25
    ).all() and "difference" not in alone.companion("differences", live)
    assert (
        "recorded** 2026-01-02" in both.source
        and "400 questions a point, in" in both.source
        and "9 questions" in both.source
    )
    assert both.points("reading", "random", 0.5) == both.points("reading", "random") == 50.0
    assert alone.points("reading", "random", 0.5) == pytest.approx(55.0)
    assert alone.estimate("reading", "random", 0.5) == pytest.approx(
        (55.0, *bounds(alone.live, "random", 0.5))
    )
    lost, low, high = alone.cost("reading", "random", 0.5)
    full = alone.live.query("method == 'full'")["score"].mean()
    assert lost == pytest.approx(100 * full - 55.0) and low < lost < high
    with pytest.raises(TokenselError, match=r"no results for random on reading at keep 0\.25"):
        alone.estimate("reading", "random", 0.25)
    assert "seeds" not in both.source
    again = [both.table, *(both.table.query("method == 'random'").assign(seed=seed) for seed in (1, 2))]
    pd.concat(again).to_csv(recorded, index=False)
    seeds = Sweep.beside(live, recorded)
    assert "400 questions a point, mean over seeds 0, 1, 2 of random, in" in seeds.source
    assert seeds.estimate("reading", "random", 0.5) == pytest.approx(both.estimate("reading", "random", 0.5))
    both.plot("general", ["random"])
    assert not plt.get_fignums()  # no benchmark of that group
    both.plot("reading", ["random", "selector"])
    panels = [ax for ax in plt.gcf().axes if ax.get_visible()]
    assert [len(ax.containers) for ax in panels] == [2, 2, 0]  # the third was not asked here
    table().assign(model="another").to_csv(recorded, index=False)
    assert Sweep.beside(live, recorded).recorded is None  # no figure of one model stands for another


def test_cost_curves_are_shares_of_the_full_cost():
    rows = [
        dict(model="m", benchmark=name, group="long", method=method, keep=keep, metric="anls", score=score,
             ci_low=score - 0.1, ci_high=score + 0.1, n=9, seed=0, flops=flops, kv_bytes=10.0)
        for name, scale in (("a", 1.0), ("b", 10.0))
        for method, keep, score, flops in (("full", 1.0, 0.8, 100 * scale), ("fastv", 0.2, 0.4, 40 * scale),
                                           ("fastv", 0.6, 0.6, 70 * scale))
    ]  # fmt: skip
    figure = curves.cost_curves(pd.DataFrame(rows))
    (ax,) = figure.axes
    full, fastv = (bars.lines[0].get_xydata() for bars in ax.containers)
    assert np.allclose(full, [[100, 80]]) and np.allclose(fastv, [[40, 40], [70, 60]])
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((80 - 10 / 2**0.5, 80 + 10 / 2**0.5))
    assert len(curves.cost_curves(pd.DataFrame(rows), by="benchmark", cost="kv_bytes").axes) == 2
    with pytest.raises(TokenselError, match="no row full for a"):
        curves.cost_curves(pd.DataFrame(rows[1:3]))
    with pytest.raises(TokenselError, match="no column watts"):
        curves.cost_curves(pd.DataFrame(rows), cost="watts")


def test_left_cells_are_those_whose_columns_are_left():
    vlm = tiny_vlm()
    encoded = encode(vlm.model, ask(vlm, [1]))
    whole = reduce(encoded)
    columns = torch.arange(whole.visual.shape[1])
    assert torch.equal(overlays.left_cells(encoded, whole.visual, columns), encoded.layout.valid)
    first = whole.visual[0].nonzero()[:3, 0]
    left = overlays.left_cells(encoded, whole.visual, first)
    assert left[0, :3].all() and int(left.sum()) == 3
