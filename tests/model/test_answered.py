"""DiffPrune and VisionSelector: the laws of their weights, their noise and their scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.model.diffprune import Denoiser, DiffPrune, DiffPruneConfig
from tokensel.model.gates import mix_noise, soft_top_k
from tokensel.model.visionselector import VisionSelector, VisionSelectorConfig
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import generator

WIDTH = 32


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, "tokens"))


@given(
    count=st.integers(2, 400), keep=st.floats(0.02, 0.98), tau=st.floats(0.1, 2.0), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_the_weights_of_an_image_sum_to_its_budget(count, keep, tau, seed):
    alpha = soft_top_k(tokens(1, count, seed=seed), keep, tau)
    assert alpha.double().sum().item() == pytest.approx(keep * count, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_noise_keeps_the_variance_and_takes_the_information(weight):
    x, noise = tokens(64, 200, 8), tokens(64, 200, 8, seed=1)
    std = torch.linspace(0.1, 30, 8)
    mixed = mix_noise(x * std, std, torch.full((64, 200), weight), noise)
    assert mixed.std().item() == pytest.approx(1, abs=0.01)
    # the correlation with the token is the root of the weight
    assert (mixed * x).mean().item() == pytest.approx(math.sqrt(weight), abs=0.01)


def test_a_weight_has_a_gradient_at_both_ends():
    weight = torch.tensor([[0.0, 0.5, 1.0]], requires_grad=True)
    mix_noise(tokens(1, 3, 4), torch.ones(4), weight, tokens(1, 3, 4, seed=1)).square().sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())


def test_the_denoiser_sees_each_token_alone():
    torch.manual_seed(0)
    denoiser = Denoiser(WIDTH)
    features, noise, weight = tokens(2, 9, WIDTH), tokens(2, 9, WIDTH, seed=1), torch.full((2, 9), 0.5)
    before = denoiser(features, weight, noise)
    changed = features.clone()
    changed[0, 3] += 1
    after = denoiser(changed, weight, noise)
    moved = (after - before).abs().amax(-1) > 1e-6
    assert moved[0, 3] and int(moved.sum()) == 1


def test_statistics_keep_a_token_in_its_units():
    torch.manual_seed(0)
    denoiser = Denoiser(WIDTH)
    torch.nn.init.zeros_(denoiser.layer.attention_out.weight)
    torch.nn.init.zeros_(denoiser.layer.attention_out.bias)
    torch.nn.init.zeros_(denoiser.layer.mlp_out.weight)
    torch.nn.init.zeros_(denoiser.layer.mlp_out.bias)
    denoiser.standardise(torch.full((WIDTH,), 5.0), torch.full((WIDTH,), 20.0))
    features = 5 + 20 * tokens(2, 9, WIDTH)
    whole = denoiser(features, torch.ones(2, 9), tokens(2, 9, WIDTH, seed=1))
    # a token of weight 1 passes unchanged through a layer that adds nothing, up to the clamp of the root
    assert (whole - features).abs().max() < 20 * 5e-3


@pytest.mark.parametrize("kind", [DiffPrune, VisionSelector])
def test_padding_changes_no_score_and_is_last(kind):
    torch.manual_seed(0)
    model = kind(kind.config_class(width=WIDTH)).eval()
    features = tokens(2, 12, WIDTH)
    valid = torch.arange(12).expand(2, -1) < 7
    filled = features.masked_fill(~valid[..., None], 1e3)
    if kind is VisionSelector:
        filled = features.masked_fill(~valid[..., None], 0.0)  # an image's padding is zero
    with torch.no_grad():
        scores, short = model.scores(filled, valid), model.scores(features[:, :7])
    assert torch.allclose(scores[:, :7], short, rtol=1e-4, atol=1e-9)
    assert bool((scores[:, 7:] == -torch.inf).all())


def test_a_score_is_the_mean_agreement_with_all_keys():
    torch.manual_seed(0)
    model = VisionSelector(VisionSelectorConfig(width=WIDTH))
    for linear in (model.query, model.key):
        assert 0.5e-4 < linear.weight.std() < 1.5e-4 and linear.bias is None
        torch.nn.init.normal_(linear.weight)
    x = tokens(3, 10, WIDTH)
    with torch.no_grad():
        pairs = model.query(x) @ model.key(x).transpose(1, 2) / math.sqrt(WIDTH // 2)
        assert torch.allclose(model.scores(x), pairs.mean(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [DiffPrune, VisionSelector])
def test_saved_and_loaded_scores_are_equal_and_another_width_is_one_line(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(kind.config_class(width=WIDTH, accuracy_loss=1.5, keep=0.2, keep_most=0.4)).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    card = (tmp_path / "README.md").read_text()
    assert "0.2 to 0.4" in card and "1.5" in card and "L_rec" not in card
    loaded, x = kind.from_pretrained(tmp_path), tokens(2, 9, WIDTH)
    with torch.no_grad():
        assert torch.equal(loaded.scores(x), model.scores(x))
    with pytest.raises(TokenselError, match="was made for 32"):
        model.scores(tokens(1, 4, 16))


def test_a_common_shift_of_the_logits_is_not_trained():
    model = DiffPrune(DiffPruneConfig(width=WIDTH))
    assert not model.trunk.norm.bias.requires_grad and model.head.bias is None
