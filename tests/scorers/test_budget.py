"""The budget: exact counts, stable ties, no token from nowhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.budget import fraction_count, hard, top_count, top_fraction
from tokensel.utils.errors import TokenselError


@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 5), tokens=st.integers(1, 70), keep=st.floats(0.001, 1.0)
)
@settings(deadline=None, max_examples=80)
def test_keeps_exactly_the_best_valid_tokens(seed: int, rows: int, tokens: int, keep: float):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (rows, tokens), generator=generator).float()  # many ties
    valid = torch.rand(rows, tokens, generator=generator) > 0.4
    scores[torch.rand(rows, tokens, generator=generator) > 0.9] = -torch.inf
    mask = top_fraction(scores, keep, valid)
    for row in range(rows):
        real = valid[row].nonzero().flatten().tolist()
        wanted = sorted(real, key=lambda i: (-scores[row, i].item(), i))
        count = min(len(real), max(1, round(keep * len(real))))
        assert mask[row].nonzero().flatten().tolist() == sorted(wanted[:count])


def test_count_follows_python_rounding():
    available = torch.arange(0, 3000)
    for keep in (0.1, 0.25, 0.3, 0.5, 0.7, 1.0):
        wanted = [0] + [max(1, round(keep * n)) for n in range(1, 3000)]
        assert fraction_count(available, keep).tolist() == wanted


def test_invalid_tokens_are_never_kept_even_when_they_score_best():
    scores = torch.tensor([[9.0, torch.nan, 1.0, 2.0]])
    valid = torch.tensor([[False, False, True, True]])
    assert top_fraction(scores, 1.0, valid).tolist() == [[False, False, True, True]]
    assert top_fraction(scores, 0.5, valid).tolist() == [[False, False, False, True]]
    assert not top_fraction(scores, 0.5, torch.zeros_like(valid)).any()


def test_more_than_there_is_keeps_all():
    valid = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(top_count(torch.zeros(2, 3), torch.tensor([7, 7]), valid), valid)


def test_a_larger_budget_keeps_what_a_smaller_one_kept():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    previous = torch.zeros(4, 50, dtype=torch.bool)
    for keep in torch.linspace(0.02, 1, 50).tolist():
        mask = top_fraction(scores, keep)
        assert bool((mask | ~previous).all())
        previous = mask
    assert bool(previous.all())


def test_hard_mask_keeps_what_is_above_zero():
    scores = torch.tensor([[-1.0, 0.0, 0.1], [2.0, -3.0, 5.0]])
    assert hard(scores).tolist() == [[False, False, True], [True, False, True]]
    assert hard(scores, torch.tensor([[True, True, False], [True, True, True]])).tolist() == [
        [False, False, False],
        [True, False, True],
    ]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, float("nan")])
def test_refuses_a_keep_outside_its_range(keep: float):
    with pytest.raises(TokenselError, match="keep is"):
        top_fraction(torch.zeros(1, 4), keep)


def test_refuses_nan_scores():
    with pytest.raises(TokenselError, match="NaN"):
        top_fraction(torch.tensor([[0.0, torch.nan]]), 0.5)
