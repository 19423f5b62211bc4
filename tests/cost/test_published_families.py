"""The published shapes of the other families: their weights, their tokens, and one line for other names."""

import pytest

from tokensel.cost.published import hollow
from tokensel.cost.published_families import PUBLISHED_FAMILIES, image_grids
from tokensel.utils.errors import TokenselError

# billions of weights as the Hub counts them; tiles and visual tokens of an image of 768 x 1024 pixels
KNOWN = {
    "Qwen/Qwen2-VL-7B-Instruct": (8.29, 1, 999),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8.29, 1, 999),
    "Qwen/Qwen3-VL-8B-Instruct": (8.77, 1, 768),
    "OpenGVLab/InternVL3-8B-hf": (7.94, 13, 13 * 256),
    "llava-hf/llava-1.5-7b-hf": (7.06, 1, 576),
    "HuggingFaceTB/SmolVLM-Instruct": (2.25, 13, 13 * 81),
    "google/gemma-3-4b-it": (4.30, 1, 256),
    "google/paligemma2-3b-mix-448": (3.03, 1, 1024),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (24.01, 1, 28 * 37),
}


@pytest.mark.parametrize("name", PUBLISHED_FAMILIES)
def test_weights_and_tokens_are_those_of_the_published_model(name):
    billions, tiles, tokens = KNOWN[name]
    model = hollow(PUBLISHED_FAMILIES[name].config())
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e9, 2) == billions
    grids = image_grids(name, 768, 1024)
    assert len(grids) == tiles and int(grids.prod(1).sum()) == tokens
    rows, columns = grids[0].tolist()
    assert columns >= rows  # the image is wider than high, and rows come first


def test_another_name_is_refused():
    with pytest.raises(TokenselError, match="'Qwen/other': the shapes known here are those of Qwen/Qwen2-VL"):
        image_grids("Qwen/other", 768, 1024)
