"""Prompts of every order under every schedule, against the masked, uncached reference and the stock model."""

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from reference import NearTie, dyrate, generated, masked_reference, vlm_of
from tiny import SIZES, noise_image

from tokensel.schedules import Exponential, FastV, Fixed, Prompt, Vtw, pruned
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, reduce_inputs

STEPS = 5
# "<image>" stands for an image; without the start token in front, a row may begin with it
TEXTS = (
    "what is <image>",
    "<image>?",
    "<image>",
    "what is this <image> here?",
    "<image> and <image>",
    "<image><image>",
    "first <image> then?",
    "no image at all",
    "x",
)
CASES = [
    FastV(1, 0.3),
    FastV(2, 0.05, "drop"),
    FastV(3, 0.0),
    Vtw(2),
    Fixed(2, 0.3, "row"),
    Exponential(1, 0.6),
    dyrate(),
]


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return vlm_of("llama")


def prompts(vlm: Vlm, texts: list[str], start: bool = False, **choices):
    """A batch of prompts, padded on the left, each with its images."""
    tokenizer = vlm.processor.tokenizer
    images, seed = [], 0
    for text in texts:
        row = [
            noise_image(*SIZES[(seed + n) % len(SIZES)], seed=seed + n) for n in range(text.count("<image>"))
        ]
        images.append(row or None)
        seed += len(row)
    # a prompt that begins with the start token gets no second one, see Vlm.inputs
    start_token = tokenizer.bos_token if start else ""
    inputs = vlm.processor(
        images=[row for row in images if row] or None,
        text=[start_token + text for text in texts],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    return reduce_inputs(vlm.model, inputs, **choices)


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3),
    start=st.booleans(),
    case=st.sampled_from(CASES),
)
def test_every_order_equals_the_masked_reference(vlm, texts, start, case):
    reduced = prompts(vlm, texts, start)
    out, pruning = generated(vlm, reduced, case, STEPS)
    try:
        tokens, logits = masked_reference(vlm, reduced, case, STEPS, ties_raise=True)
    except NearTie:
        reject()  # rounding decides which of two tokens stays
    assert torch.equal(out.sequences, tokens)
    assert torch.allclose(torch.stack(out.logits, 1), logits, atol=1e-4)
    last = reduced["attention_mask"].shape[1] - 1
    for drop in pruning.drops:
        assert bool((drop.columns[:, -1] == last).all()), "the answer is predicted from the last column"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_answer_is_predicted_from_the_last_column_even_if_it_is_visual(vlm, case):
    reduced = prompts(vlm, ["what is <image>", "<image>?", "<image>"])
    assert bool(reduced.visual[[0, 2], -1].all())
    out, _ = generated(vlm, reduced, case, STEPS)
    assert torch.equal(out.sequences, masked_reference(vlm, reduced, case, STEPS)[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_without_an_image_pass_unchanged(vlm, case):
    texts = ["no image at all", "x"]
    alone = prompts(vlm, texts)
    plain = vlm.generate_output(alone, STEPS)
    under = vlm.generate_output(alone, STEPS, case)
    assert (
        torch.equal(plain.tokens, under.tokens)
        and not under.pruning.drops
        and not under.pruning.left[0].any()
    )
    mixed = vlm.generate_output(prompts(vlm, ["what is <image>?", *texts]), STEPS, case)
    assert mixed.texts[1:] == plain.texts


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keep_1_changes_no_logit_in_any_order(attn, dtype):
    vlm = vlm_of("llama", attn)
    vlm.model.to(dtype)
    keeping = [FastV(2, 1.0), Fixed(1, 1.0, "row"), Exponential(2, 1.0, "drop"), dyrate(certain=True)]
    for texts in (["what is <image>"], ["<image>"], ["<image>?", "x", "<image> and <image>"]):
        reduced = prompts(vlm, texts)
        options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
        plain = vlm.model.generate(**reduced, **options, do_sample=False)
        for schedule in keeping:
            out, pruning = generated(vlm, reduced, schedule, 3)
            assert all(torch.equal(*pair) for pair in zip(plain.logits, out.logits, strict=True)), schedule
            assert not pruning.drops


@settings(deadline=None, max_examples=20)
@given(
    texts=st.lists(st.sampled_from(TEXTS[:-2]), min_size=1, max_size=2),
    keep=st.floats(0.0, 1.0, exclude_max=True),
    newline=st.sampled_from(["keep", "drop", "row"]),
)
def test_a_fraction_counts_cells_and_newlines_follow_their_choice(vlm, texts, keep, newline):
    """The same number of cells as a scorer keeps of the same image, up to the last column."""
    reduced = prompts(vlm, texts)
    with torch.no_grad(), pruned(vlm.model, reduced.prompt, FastV(2, keep, newline)) as pruning:
        vlm.model(**reduced, use_cache=False, logits_to_keep=1)
    for row, cells in enumerate(reduced.n_visual.tolist()):
        last_is_cell = bool(reduced.prompt.cells[row, -1])
        wanted = max(1, round(keep * cells)) if keep > 0 else int(last_is_cell)
        assert int(pruning.cells[0][3, row]) == wanted
        newlines = int((pruning.left[0] - pruning.cells[0])[3, row])
        if newline == "keep":
            assert newlines == int(reduced.n_newline[row])
        if newline == "drop":
            assert newlines == int(reduced.newlines[row, -1])


def test_a_scorer_and_a_schedule_keep_equally_many_columns(vlm):
    class First:
        """Ranks the first cells highest."""

        name, needs_cls_attention, scope, adaptive = "first", False, "tile", False

        def __call__(self, features):
            return -torch.arange(features.tokens.shape[1]).float().expand(features.tokens.shape[:2])

    text = ["what is <image>?"]
    for keep in (0.1, 0.4):
        before = prompts(vlm, text, scorer=First(), keep=keep)
        whole = prompts(vlm, text)
        with torch.no_grad(), pruned(vlm.model, whole.prompt, FastV(1, keep)) as inside:
            vlm.model(**whole, use_cache=False, logits_to_keep=1)
        assert (
            int(inside.left[0][2, 0]) == int(before.visual.sum()) == int(before.n_visual + before.n_newline)
        )


def test_padding_on_the_right_and_an_empty_prompt_get_one_line(vlm):
    right = Prompt(torch.tensor([[1, 1, 0]]), torch.tensor([[False, True, False]]))
    with pytest.raises(TokenselError, match="pad the prompts on the left"):
        enter(vlm, right)
    with pytest.raises(TokenselError, match="or is empty"):
        enter(vlm, Prompt(torch.zeros(1, 0).long(), torch.zeros(1, 0).bool()))


def enter(vlm: Vlm, prompt: Prompt) -> None:
    with pruned(vlm.model, prompt, FastV(1, 0.5)):
        pass
