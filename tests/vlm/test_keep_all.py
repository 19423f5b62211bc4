"""With everything kept, every logit is that of the stock model, whatever the prompt looks like."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SIZES, logits, noise_image, onevision_processor, tiny_llava, tiny_onevision

from tokensel.methods import Batch, prepare
from tokensel.schedules import FastV, Fixed
from tokensel.scorers import make_scorer
from tokensel.vlm import Vlm, reduce_inputs
from tokensel.vlm.native import switch_off

WORDS = ("what ", "is it? ", "x", "")
FAMILIES = ("llava-next", "llava-onevision")


@cache
def load(family: str, attn: str, dtype: torch.dtype) -> Vlm:
    if family == "llava-next":
        model, processor = tiny_llava("mistral", attn)
        return Vlm(model.to(dtype), processor, family)
    model, processor = tiny_onevision().to(dtype), onevision_processor()
    model.set_attn_implementation(attn)
    return Vlm(model, processor, family, switch_off(model, processor))


@st.composite
def prompts(draw) -> tuple[list[str], list[list]]:
    """Rows of text with no, one or two images, first, last, in the middle or alone."""
    texts, images = [], []
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.sampled_from(SIZES), max_size=2))
        pieces = [draw(st.sampled_from(WORDS)) for _ in range(len(sizes) + 1)]
        text = "<image>".join(pieces)
        texts.append(text or "?")  # a row has at least one token
        images.append([noise_image(*size) for size in sizes])
    return texts, images


@given(
    batch=prompts(),
    family=st.sampled_from(FAMILIES),
    attn=st.sampled_from(("sdpa", "eager")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
@settings(deadline=None, max_examples=40)
def test_logits_are_those_of_the_stock_model(batch, family, attn, dtype):
    vlm, (texts, images) = load(family, attn, dtype), batch
    inputs = vlm.inputs(images, texts)
    reduced = reduce_inputs(vlm.model, inputs)
    assert torch.equal(logits(vlm.model, reduced), logits(vlm.model, inputs))
    assert torch.equal(reduced.n_visual, reduced.n_visual_full)
    assert ((reduced.n_visual > 0) == torch.tensor([len(row) > 0 for row in images])).all()


# image first, last, alone and in the middle; several; none; a single token of text
ORDERS = {
    "<image>what?": [0],
    "what? <image>": [1],
    "<image>": [2],
    "see <image> there": [3],
    "<image><image>": [4, 0],
    "a <image> b <image>": [0, 1],
    "what is it?": [],
    "?": [],
}


def everywhere(test):
    """Run a test for both families, both implementations of attention and both precisions."""
    test = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])(test)
    test = pytest.mark.parametrize("attn", ["sdpa", "eager"])(test)
    return pytest.mark.parametrize("family", FAMILIES)(test)


@everywhere
def test_each_order_alone_and_in_one_padded_batch(family, attn, dtype):
    vlm = load(family, attn, dtype)
    images = [[noise_image(*SIZES[i]) for i in row] for row in ORDERS.values()]
    batches = [(list(ORDERS), images)] + [([text], [row]) for text, row in zip(ORDERS, images, strict=True)]
    for texts, rows in batches:
        inputs = vlm.inputs(rows, texts)
        stock = logits(vlm.model, inputs)
        for scorer in (None, make_scorer("norm"), make_scorer("random", seed=1)):
            reduced = reduce_inputs(vlm.model, inputs, scorer, 1.0)
            assert torch.equal(logits(vlm.model, reduced), stock), texts


@everywhere
@torch.no_grad()
def test_generation_has_the_logits_of_the_stock_model_at_every_step(family, attn, dtype):
    vlm = load(family, attn, dtype)
    images = [[noise_image(*SIZES[i]) for i in row] for row in ORDERS.values()]
    inputs = vlm.inputs(images, list(ORDERS))
    reduced = reduce_inputs(vlm.model, inputs)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    stock = torch.stack(vlm.model.generate(**inputs, do_sample=False, **options).logits)
    for schedule in (None, FastV(1, 1.0), Fixed(1, 1.0)):
        output = vlm.generate_output(reduced, schedule=schedule, **options)
        assert torch.equal(torch.stack(output.model_output.logits), stock), schedule


@everywhere
def test_methods_that_keep_everything_are_the_stock_model(family, attn, dtype):
    vlm, images = load(family, attn, dtype), [noise_image(*SIZES[1]), None]
    questions = ["what?", "and?"]
    inputs = vlm.inputs(images, [vlm.prompt("what?"), vlm.prompt("and?", False)])
    stock = logits(vlm.model, inputs)
    for method, keep in (("full", 1.0), ("norm", 1.0), ("random", 1.0), ("downsample", 1.0)):
        assert torch.equal(logits(vlm.model, prepare(Batch(vlm, images, questions), method, keep)), stock)
