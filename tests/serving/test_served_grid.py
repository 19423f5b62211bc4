"""Qwen2.5-VL without an engine: kept tokens and their places, as the adapter makes them for a full prompt."""

from dataclasses import asdict
from typing import Any

import pytest
import tiny_families
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import noise_image

from tokensel.scorers import make_scorer
from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import TokenCounter
from tokensel.serving.places import append_places, pending_positions, placed_positions, split_places
from tokensel.serving.pruning import GridPruner
from tokensel.vlm import Vlm, reduce_inputs


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Vlm:
    return tiny_families.loaded("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


def pruner(vlm: Vlm, scorer: str, seed: int = 0) -> GridPruner:
    """A pruner whose engine is the model of transformers."""
    core: Any = vlm.model.base_model
    config = vlm.model.config
    config.tokensel = asdict(ServeConfig("tiny", scorer=scorer, seed=seed))

    def tower(pixels: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = core.get_image_features(pixels, grids, return_dict=True)
        return out.last_hidden_state, torch.cat(list(out.pooler_output))

    return GridPruner(config, tower, core.visual.merger)


IMAGE = st.tuples(st.integers(16, 90), st.integers(16, 90), st.sampled_from([1.0, 0.5, 0.3, 0.1]))


@settings(deadline=None, max_examples=20)
@given(
    images=st.lists(IMAGE, min_size=1, max_size=3),
    scorer=st.sampled_from(["norm", "diversity"]),
    piece=st.integers(1, 40),
)
def test_a_prompt_that_is_read_in_pieces_is_that_of_the_adapter(vlm, images, scorer, piece):
    pictures = [noise_image(height, width) for height, width, _ in images]
    # each image is alone in its prompt, with a keep of its own
    inputs = [vlm.inputs([picture], [vlm.prompt("what is it?")]) for picture in pictures]
    keeps = [keep for *_, keep in images]
    grids = torch.cat([one["image_grid_thw"] for one in inputs])
    pixels = torch.cat([one["pixel_values"] for one in inputs])
    counter = TokenCounter(vlm.model.config, ServeConfig("tiny"))
    served = pruner(vlm, scorer).embed(pixels, grids, keeps)
    for one, (embeds, places), keep in zip(inputs, served, keeps, strict=True):
        reduced = reduce_inputs(vlm.model, one, make_scorer(scorer), keep)
        torch.testing.assert_close(embeds, reduced["inputs_embeds"][reduced.visual])
        _, height, width = one["image_grid_thw"][0].tolist()
        visual = reduced.visual[0].nonzero()[:, 0]
        assert counter.count(height, width, keep) == len(visual) == len(places)
        # the engine's part: positions first, then pieces of the prompt, each with the places of its tokens
        length, merge = reduced.visual.shape[1], vlm.model.config.vision_config.spatial_merge_size
        positions = pending_positions(length, [(int(visual[0]), len(visual), max(height, width) // merge)])
        for start in range(0, length, piece):
            coming = (visual >= start) & (visual < start + piece)
            positions = placed_positions(positions, visual[coming], places[coming])
        assert torch.equal(positions, reduced["position_ids"][1:, 0])


@pytest.mark.parametrize("scorer", ["norm", "apet"])  # the second merges dropped tokens into kept ones
def test_several_images_of_a_prompt_have_places_behind_one_another(vlm, scorer):
    pictures = [noise_image(40, 90), noise_image(64, 48)]
    inputs = vlm.inputs([pictures], [vlm.prompt("which?", 2)])
    reduced = reduce_inputs(vlm.model, inputs, make_scorer(scorer), 0.5)
    kept = pruner(vlm, scorer).embed(inputs["pixel_values"], inputs["image_grid_thw"], [0.5, 0.5])
    embeds = torch.cat([embeds for embeds, _ in kept])
    torch.testing.assert_close(embeds, reduced["inputs_embeds"][reduced.visual])
    visual = reduced.visual[0].nonzero()[:, 0].split([len(places) for _, places in kept])
    merge = vlm.model.config.vision_config.spatial_merge_size
    sides = inputs["image_grid_thw"].max(1).values // merge
    images = [(int(part[0]), len(part), int(side)) for part, side in zip(visual, sides, strict=True)]
    positions = pending_positions(reduced.visual.shape[1], images)
    for part, (_, places) in zip(visual, kept, strict=True):
        positions = placed_positions(positions, part, places)
    assert torch.equal(positions, reduced["position_ids"][1:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_pass_through_every_precision(dtype):
    places = torch.stack([torch.arange(0, 4000, 7), torch.arange(0, 4000, 7).flip(0)], 1)
    embeds = torch.randn(len(places), 8).to(dtype)
    for given_back, sent in zip(split_places(append_places(embeds, places)), (embeds, places), strict=True):
        assert torch.equal(given_back, sent)
    half = torch.arange(300)[:, None].expand(-1, 2).to(torch.bfloat16).long()
    assert not torch.equal(half, torch.arange(300)[:, None].expand(-1, 2)), "plain numbers would not"
