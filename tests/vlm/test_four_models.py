"""The four published models in their own shapes: load, keep all, select, answer in a batch of two, score.

Random weights; what is cut is the number of layers, the inner width of the language model's MLPs and the
vocabulary, none of which matters here. Widths, heads, tiles, patches, feature layers and pinpoints are those
of the hub.
"""

import csv

import pytest
import torch
from tiny import logits, noise_image, onevision_processor, scale_up, tiny_processor
from transformers import AutoModelForImageTextToText

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.cost.published import PINPOINTS, PUBLISHED, hollow, published_config
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, count_tokens, encode, load_vlm, reduce
from tokensel.vlm.native import OFF

LAYERS = dict(num_hidden_layers=2)
TEXT = dict(
    num_hidden_layers=1, intermediate_size=256, vocab_size=110, pad_token_id=0, bos_token_id=1, eos_token_id=2
)


@pytest.fixture(params=PUBLISHED)
def vlm(request, tmp_path) -> Vlm:
    config = published_config(request.param, LAYERS, TEXT)
    config.image_token_index = 4  # where the tests' tokenizer has it
    next_model = config.model_type == "llava_next"
    if not next_model:
        config.video_token_index = 109
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    scale_up(model)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path)
    pinpoints = config.image_grid_pinpoints
    processor = tiny_processor(336, 14, PINPOINTS) if next_model else onevision_processor(384, 14, pinpoints)
    processor.save_pretrained(tmp_path)
    del model
    return load_vlm(tmp_path, device="cpu")


def test_from_loading_to_scoring(vlm, tmp_path):
    images, questions = [noise_image(200, 180), noise_image(90, 240, 1)], ["what is it?", "and this?"]
    inputs = vlm.inputs(images, [vlm.prompt(question) for question in questions])
    encoded = encode(vlm.model, inputs)
    vision = vlm.model.config.vision_config
    counts = [count_tokens(vlm.model, image.height, image.width) for image in images]
    assert encoded.layout.tiles == [tiles for tiles, _, _ in counts]
    assert encoded.n_visual.tolist() == [cells for _, cells, _ in counts]
    assert encoded.features.tokens.shape[1:] == (
        (vision.image_size // vision.patch_size) ** 2,
        vision.hidden_size,
    )
    one = vlm.inputs(images[1:], [vlm.prompt(questions[1])])
    assert (logits(vlm.model, reduce(encode(vlm.model, one))) - logits(vlm.model, one)).abs().max() == 0.0

    selector = TokenSelector(SelectorConfig(width=vision.hidden_size, layers=1))
    reduced = reduce(encoded, make_scorer("selector", selector=selector), 0.1)
    assert reduced.n_visual.tolist() == [round(0.1 * n) for n in encoded.n_visual.tolist()]
    assert len(vlm.generate(reduced, 3)) == 2
    if vlm.model.config.text_config.hidden_size > 1000:
        return  # one of them all the way is enough, the smallest
    selector.save_pretrained(tmp_path / "selector")
    done = evaluate(
        EvalConfig(
            model=vlm.name,
            selector=str(tmp_path / "selector"),
            suite="suite_tiny",
            benchmarks=("page",),
            methods=("random", "selector"),
            keeps=(0.1,),
            n=2,
            batch_size=2,
            out=str(tmp_path / "out"),
        ),
        progress=False,
    )
    rows = list(csv.DictReader(done.table.read_text().splitlines()))
    assert done.computed == 4 and [row["method"] for row in rows] == ["random", "selector"]
    assert {row["n"] for row in rows} == {"2"} and all(0 <= float(row["score"]) <= 1 for row in rows)


@pytest.mark.parametrize(
    ("name", "billions"),
    list(zip(PUBLISHED, (7.57, 7.06, 8.03, 0.89))),  # as the hub counts them
)
def test_the_whole_shapes_have_as_many_weights_as_published(name, billions):
    model = hollow(published_config(name))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e9, 2) == billions


def test_tokens_of_a_page():
    """2200 x 1700 pixels: see the models' processors."""
    page = {name: count_tokens(hollow(published_config(name)), 2200, 1700, OFF) for name in PUBLISHED}
    assert list(page.values()) == [(5, 2400, 48), (5, 2400, 48), (31, 20979, 162), (31, 20979, 162)]
    _, cells, rows = count_tokens(
        hollow(published_config("llava-hf/llava-onevision-qwen2-7b-ov-hf")), 2200, 1700, "anyres_max_9"
    )
    assert (cells, rows) == (7261, 92)  # each side divided by 1.76, so that little more than a third is left


def test_other_names_are_refused():
    with pytest.raises(TokenselError, match="'llava-hf/other': the shapes known here"):
        published_config("llava-hf/other")
