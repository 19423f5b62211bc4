"""PriorTR: the laws of its gain, with the prior of a null token and with that of a second forward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import generated, prompt, vlm_of
from staged_reference import staged_reference
from tiny import ask, noise_image

from tokensel.cost.answers import answer_work, work_cost
from tokensel.cost.count import count_layers
from tokensel.schedules import PriorTR
from tokensel.schedules.priortr import gain
from tokensel.utils.errors import TokenselError
from tokensel.vlm import reduce_inputs


def attention(seed: int, shape: tuple[int, ...] = (2, 12)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


CELLS = torch.tensor([[False, *[True] * 9, False, False], [False, False, *[True] * 7, *[False] * 3]])


def test_priortr_is_zero_if_the_question_is_the_null_token_alone():
    assert gain(attention(0), attention(0), CELLS).abs().max() == 0


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10.0))
@settings(deadline=None, max_examples=30)
def test_priortr_does_not_depend_on_the_image_s_share_nor_on_the_order(seed, scale):
    prior, posterior = attention(seed), attention(seed + 1)
    score = gain(prior, posterior, CELLS)
    torch.testing.assert_close(gain(prior * scale, posterior, CELLS), score, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gain(prior, posterior / scale, CELLS), score, rtol=1e-4, atol=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    permuted = gain(prior[:, order], posterior[:, order], CELLS[:, order])
    torch.testing.assert_close(permuted, score[:, order])
    # a Kullback-Leibler divergence in parts: the sum is not negative
    assert bool((score.sum(1) >= -1e-6).all()) and not bool(score[~CELLS].any())


def test_the_null_token_s_row_does_not_change_with_the_question():
    vlm, seen = vlm_of("llama"), []

    class Spy(PriorTR):
        def rank(self, view):
            null = view.question.long().argmax(1, keepdim=True)
            seen.append(view.attention(null)[0, :, 0][:, view.columns.cells[0]])
            return super().rank(view)

    for question in ("what?", "where", "no: a much longer question"):
        vlm.generate(reduce_inputs(vlm.model, ask(vlm, [0], [question])), 1, schedule=Spy(2, 0.5))
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[2])


def test_priortr_needs_a_token_between_image_and_question():
    vlm = vlm_of("llama")
    inputs = vlm.processor(
        images=[noise_image(40, 48)], text=["what is <image>?"], padding=True, return_tensors="pt"
    )
    with pytest.raises(TokenselError, match="put the image before the question") as error:
        vlm.generate(reduce_inputs(vlm.model, inputs), 2, schedule=PriorTR(2, 0.5))
    assert "\n" not in str(error.value)


def test_with_a_second_forward_the_image_may_come_after_the_question():
    vlm, schedule = vlm_of("llama"), PriorTR(2, 0.3, prior="forward")
    inputs = vlm.processor(
        images=[noise_image(40, 48), noise_image(30, 20, seed=1)],
        text=["what is it? <image>", "and <image>?"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    reduced = reduce_inputs(vlm.model, inputs)
    out, pruning = generated(vlm, reduced, schedule)
    tokens, logits = staged_reference(vlm, reduced, schedule)
    assert pruning.drops and torch.equal(out.sequences, tokens)
    assert torch.allclose(torch.stack(out.logits, 1), logits, atol=1e-4)


def test_the_prior_of_a_second_forward_does_not_change_with_the_question():
    vlm, seen = vlm_of("llama"), []

    class Spy(PriorTR):
        def rank(self, view):
            text = view.prompt.real & ~view.prompt.visual
            text[:, [0, -1]] = False
            seen.append(view.without(text)[0])
            asked = view.last()[0]
            assert not torch.allclose(seen[-1], asked), "the question tells something"
            return super().rank(view)

    for question in ("what?", "where", "no: it"[:5]):  # of one length, so that positions are equal
        vlm.generate(
            reduce_inputs(vlm.model, ask(vlm, [0], [question])), 1, schedule=Spy(2, 0.5, prior="forward")
        )
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[2])


def test_a_question_that_is_the_last_token_alone_adds_nothing():
    """Then both passes read the same: the gain of every cell is 0."""
    vlm, gains = vlm_of("llama"), []

    class Spy(PriorTR):
        def rank(self, view):
            gains.append(super().rank(view))
            return gains[-1]

    inputs = vlm.processor(images=[noise_image(40, 48)], text=["<image>?"], padding=True, return_tensors="pt")
    vlm.generate(reduce_inputs(vlm.model, inputs), 1, schedule=Spy(2, 0.5, prior="forward"))
    assert gains[0].abs().max() < 1e-6


def test_a_second_forward_costs_its_layers_once_more():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0, None])
    config = vlm.model.config
    flops = []
    for schedule in (PriorTR(2, 0.3), PriorTR(2, 0.3, prior="forward")):
        work = answer_work(vlm.model, reduced, vlm.generate_output(reduced, 3, schedule))
        flops.append([work_cost(config, one, 4)[0] for one in work])
        assert work[0].get("reread", 0) == (2 if schedule.prior == "forward" else 0)
    length = int(reduced["attention_mask"][0].sum())
    assert flops[1][1] == flops[0][1], "a row without an image reads nothing twice"
    assert flops[1][0] - flops[0][0] == count_layers(config.text_config, 2, length)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prior": "none"}, "prior is 'none': choose one of token, forward"),
        ({"prior": "forward", "queries": "question"}, "with prior='forward' give 'last'"),
    ],
)
def test_priors_that_are_none_are_one_line(options, line):
    with pytest.raises(TokenselError, match=line):
        PriorTR(2, 0.5, **options)
