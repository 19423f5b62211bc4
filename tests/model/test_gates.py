"""Gates: the count of the mask, its gradient, and the limit of a low temperature."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokensel.model.gates import BUDGETED, gate_mask, soft_top_k, threshold
from tokensel.model.gumbel import gumbel_noise
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import generator


def scores(rows: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, tokens, generator=generator(seed, "scores")).to(dtype)


@given(
    rows=st.integers(1, 5),
    tokens=st.integers(2, 40),
    keep=st.floats(0.02, 0.98),
    tau=st.floats(0.05, 5),
    spread=st.floats(0.01, 30),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_weights_of_the_soft_top_k_sum_to_the_budget(rows, tokens, keep, tau, spread, shift, seed):
    values = scores(rows, tokens, seed) * spread + shift
    alpha = soft_top_k(values, keep, tau)
    assert alpha.mean().item() == pytest.approx(keep, abs=1e-4)
    assert bool(((alpha >= 0) & (alpha <= 1)).all())
    order = values.flatten().argsort()
    assert bool((alpha.flatten()[order].diff() >= 0).all())  # the higher the score, the more of the token


@given(rows=st.integers(1, 4), tokens=st.integers(3, 20), count=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
@example(rows=2, tokens=11, count=13, seed=0)  # in single precision 13/22 of 22 is a little less than 13
def test_at_a_low_temperature_it_is_the_hard_choice(rows, tokens, count, seed):
    count = min(count, rows * tokens - 1)
    values = scores(rows, tokens, seed)
    best = torch.zeros(rows * tokens).index_fill_(0, values.flatten().topk(count).indices, 1.0)
    keep = count / (rows * tokens)
    hard = (values > threshold(values, keep)).float()
    assert torch.equal(hard.flatten(), best)
    gap = values.flatten().sort(descending=True).values[[count - 1, count]].diff().abs().item()
    assert torch.allclose(soft_top_k(values, keep, gap / 40 + 1e-6).flatten(), best, atol=0.05)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_its_gradient_is_that_of_finite_differences(tau):
    values = scores(2, 6, dtype=torch.float64)
    weights = scores(2, 6, seed=1, dtype=torch.float64)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        return (soft_top_k(inputs, 0.4, tau, valid) * weights).sum()

    inputs = values.clone().requires_grad_()
    loss(inputs).backward()
    step = 1e-2  # thresholds are found in single precision
    for place in range(12):
        change = torch.zeros(12, dtype=torch.float64).index_fill_(0, torch.tensor(place), step).view(2, 6)
        difference = (loss(values + change) - loss(values - change)) / (2 * step)
        assert inputs.grad.flatten()[place].item() == pytest.approx(difference.item(), abs=2e-4)


def test_a_common_shift_of_the_scores_has_no_gradient():
    inputs = scores(3, 10).requires_grad_()
    (soft_top_k(inputs, 0.3, 1.0) * scores(3, 10, seed=1)).sum().backward()
    assert inputs.grad.sum().item() == pytest.approx(0, abs=1e-5)
    assert inputs.grad.abs().sum() > 0.1


@pytest.mark.parametrize("name", BUDGETED)
def test_gates_that_divide_a_budget_keep_it_and_never_padding(name):
    logits = torch.randn(4, 50, 2, generator=generator(0, "logits")).requires_grad_()
    valid = torch.arange(50) < torch.tensor([[50], [30], [7], [0]])
    mask = gate_mask(name, logits, 1.0, gumbel_noise(4, 50, 2, generator=generator(1)), 0.25, valid)
    assert mask.sum().item() == pytest.approx(0.25 * 87, abs=1)
    assert not mask[~valid].any()
    if name == "topk":
        assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    (mask * torch.randn(4, 50, generator=generator(2))).sum().backward()
    assert bool(logits.grad[valid].any()) and not logits.grad[~valid].any()


def test_an_image_that_needs_more_tokens_gets_more():
    logits = torch.zeros(2, 100, 2)
    logits[0, :40, 1] = 3.0
    mask = gate_mask("topk", logits, 1.0, gumbel_noise(2, 100, 2, generator=generator(0)), 0.2)
    assert mask[0].sum() > 25 and mask.sum() == 40


def test_two_processes_find_the_threshold_of_the_whole_batch():
    values, keep = scores(4, 30), 0.3
    shares = []

    def total(part: torch.Tensor) -> torch.Tensor:  # of a second process that holds the same scores
        shares.append(part)
        return 2 * part

    assert threshold(values, keep, 0.5, total=total).item() == pytest.approx(
        threshold(torch.cat([values, values]), keep, 0.5).item(), abs=1e-5
    )
    assert shares


@pytest.mark.parametrize("keep", [None, 0.0, 1.0, -0.1, 2.0])
def test_a_budget_that_is_none_is_one_line(keep):
    with pytest.raises(TokenselError, match="give a fraction between 0 and 1"):
        gate_mask("topk", torch.zeros(1, 4, 2), 1.0, None, keep)


def test_an_unknown_gate_is_one_line():
    with pytest.raises(TokenselError, match="gate is 'sigmoid': choose one of gumbel, topk, scale, throttle"):
        gate_mask("sigmoid", torch.zeros(1, 4, 2), 1.0)
