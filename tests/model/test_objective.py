"""Eqs. (6) and (7), against numbers worked out by hand and against the collapse that the hinge prevents."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.data.features import Features
from tokensel.model.objective import distance, objective, retained_fraction
from tokensel.training.train import TrainConfig, train


def test_the_retained_fraction_is_the_mean_of_the_mask():
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    assert retained_fraction(mask).tolist() == [0.5, 0.25]
    valid = torch.tensor([[True, True, False, False], [False, False, False, False]])
    assert retained_fraction(mask, valid).tolist() == [0.5, 0.0]


def test_the_distance_is_the_l2_norm_of_a_whole_image():
    features = torch.zeros(2, 2, 2)
    reconstructed = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert distance(reconstructed, features).tolist() == [5.0, 2.0]
    valid = torch.tensor([[True, False], [True, True]])
    assert distance(reconstructed, features, valid).tolist() == [3.0, 2.0]


def test_equation_7_by_hand():
    features = torch.zeros(2, 2, 2)
    reconstructed = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    found = objective(reconstructed, features, mask, p=0.3, scale=10.0)
    assert found.l_rec.item() == pytest.approx(0.35)  # (5 + 2) / 2 / 10
    assert found.l_pr.item() == pytest.approx(0.75)
    assert found.loss.item() == pytest.approx(0.35 + 0.75)
    below = objective(reconstructed, features, torch.zeros(2, 2), p=0.3, scale=10.0)
    assert below.loss.item() == pytest.approx(0.35 + 0.3) and below.l_pr.item() == 0


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 20), st.floats(0.1, 100), st.integers(0, 99))
def test_the_norm_is_not_squared_and_the_scale_divides_it(factor, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    features, error = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)
    mask = torch.zeros(3, 5)
    one = objective(features + error, features, mask, 0.0, 1.0).l_rec
    many = objective(features + factor * error, features, mask, 0.0, scale).l_rec
    assert many.item() == pytest.approx(one.item() * factor / scale, rel=1e-4)


def test_keeping_is_free_below_p_and_costs_one_above():
    features = torch.zeros(1, 10, 2)
    for kept, expected in ((2, 0.0), (3, 0.0), (6, 0.1)):
        mask = (torch.arange(10) < kept).float()[None].requires_grad_()
        objective(features, features, mask, p=0.35, scale=1.0).loss.backward()
        assert mask.grad[0].tolist() == pytest.approx([expected] * 10)


def test_a_perfect_reconstruction_has_a_gradient_of_zero_and_not_nan():
    features = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    reconstructed = features.clone().requires_grad_()
    objective(reconstructed, features, torch.ones(2, 3), 0.5, 1.0).loss.backward()
    assert (reconstructed.grad == 0).all()


def planted(tiles: int, tokens: int = 16, width: int = 16) -> Features:
    """Tiles whose left half repeats its right half: half of the tokens say all, if one knows which."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(tiles, tokens // 2, width, generator=generator) * 3
    return Features(half.repeat_interleave(2, dim=1), keys=torch.arange(tiles))


@pytest.fixture(scope="module")
def runs():
    options = dict(gate="gumbel", steps=150, batch_size=32, lr=3e-3, layers=1, progress=False)
    return {p: train(TrainConfig(p=p, **options), features=planted(256)).history for p in (0.0, 0.4)}


def late(history, name):
    return sum(record[name] for record in history[-20:]) / 20


def test_without_the_hinge_the_selector_collapses(runs):
    # Sec. 4.3: "the optimizer is more likely to converge to a local minimum where the term drops to zero"
    assert runs[0.0][0]["l_pr"] > 0.4 and late(runs[0.0], "l_pr") < 0.1


def test_with_the_hinge_it_falls_to_p_and_hovers(runs):
    assert math.isclose(late(runs[0.4], "l_pr"), 0.4, abs_tol=0.05)
    assert late(runs[0.4], "l_rec") < 0.85 * late(runs[0.0], "l_rec")
