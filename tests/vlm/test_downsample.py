"""Image down-sampling: no change at full size, a place for every coarse token, the budget nearly met."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ask, logits, noise_image, tiny_vlm

from tokensel.vlm import Encoded, Vlm, downsample, encode, reduce
from tokensel.vlm.downsample import _pack_coarse, coarse_grid
from tokensel.vlm.layout import read_layout, tile_counts


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return tiny_vlm()


@pytest.mark.parametrize(
    ("keep", "grid"), [(1.0, (8, 8)), (0.5, (5, 6)), (0.3, (4, 5)), (0.25, (4, 4)), (0.1, (2, 3))]
)
def test_coarse_grid_is_the_nearest(keep, grid):
    assert coarse_grid(keep, 8) == grid


@given(height=st.integers(8, 130), width=st.integers(8, 130))
@settings(deadline=None, max_examples=15)
def test_downsampling_by_nothing_is_the_stock_model(vlm, height, width):
    inputs = vlm.inputs([noise_image(height, width)], [vlm.prompt("?")])
    encoded = encode(vlm.model, inputs)
    for positions in ("compact", "original"):
        assert torch.equal(
            downsample(encoded, 1.0, positions=positions)["inputs_embeds"], reduce(encoded)["inputs_embeds"]
        )


def test_downsampling_comes_near_its_budget(vlm):
    rows = [0, None, [1, 2], 3]
    encoded = encode(vlm.model, ask(vlm, rows))
    for keep in (0.1, 0.25, 0.5, 0.75):
        cells = coarse_grid(keep, 6)[0] * coarse_grid(keep, 6)[1]
        for choices in ({}, {"newline": "drop"}, {"positions": "original"}):
            reduced = downsample(encoded, keep, **choices)
            wanted = encoded.n_visual * cells / 36
            assert ((reduced.n_visual - wanted).abs() <= 0.15 * wanted + 1).all()  # unpadding cuts whole rows
            out = logits(vlm.model, reduced)
            assert out.shape[1] == int(reduced["attention_mask"].sum(1).max()) and bool(out.isfinite().all())
            visible = reduced["attention_mask"].sum(1) - reduced.n_visual - reduced.n_newline
            text = encoded.attention_mask.sum(1) - torch.bincount(encoded.places[:, 0], minlength=4)
            assert torch.equal(visible, text)
    alone = downsample(encode(vlm.model, ask(vlm, [3], ["what????"])), 0.25)
    count = alone["inputs_embeds"].shape[1]
    together = logits(vlm.model, downsample(encoded, 0.25))[3, -count:]
    assert (together - logits(vlm.model, alone)[0]).abs().max() < 1e-4


@given(height=st.integers(3, 300), width=st.integers(3, 300), keep=st.floats(0.02, 1.0))
@settings(deadline=None, max_examples=40)
def test_every_coarse_token_has_a_place_of_its_own(layouts, height, width, keep):
    encoded = layouts(height, width)
    side, grid = 6, coarse_grid(keep, 6)
    source, place = _pack_coarse(encoded, 0, grid, side)
    assert len(source) == len(place)
    assert bool((place[1:] > place[:-1]).all()) and int(place[-1]) < len(encoded.layout.source)
    assert torch.equal(source < 0, ~encoded.layout.cell[place])
    cells = source[source >= 0]
    assert (
        len(cells.unique()) == len(cells) and int(cells.max()) < encoded.layout.tiles[0] * grid[0] * grid[1]
    )


@pytest.fixture(scope="module")
def layouts(vlm):
    """The layout of an image of any size, without running the tower."""

    def make(height: int, width: int) -> Encoded:
        sizes = torch.tensor([[height, width]])
        counts = tile_counts(vlm.model, {"image_sizes": sizes})
        layout = read_layout(vlm.model.model, counts, 36, sizes)
        ids = torch.full((1, len(layout.source)), vlm.model.config.image_token_id)
        return Encoded(vlm.model, ids, torch.ones_like(ids).bool(), ids.nonzero(), layout, None, sizes)

    return make
