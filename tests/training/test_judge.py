"""Eq. (1): policies are judged by reconstructors of their own."""

import pytest
import torch
from little import (
    random_features,
    same,
    small_config,
)

from tokensel.budget import top_fraction
from tokensel.data.features import Features
from tokensel.scorers import make_scorer
from tokensel.training.autoencoder import MaskedAutoencoder
from tokensel.training.config import TrainConfig
from tokensel.training.judge import policy_scores, reconstruction_error, train_reconstructor
from tokensel.training.train import train
from tokensel.utils.errors import TokenselError


def kept(features, policy, keep):
    return top_fraction(policy_scores(features, policy, batch_size=16), keep, features.valid)


class Places:
    """Keeps what stands at the given places first."""

    def __init__(self, places):
        self.places = places

    def __call__(self, features):
        scores = torch.zeros(features.tokens.shape[:2])
        scores[:, self.places] = 1.0
        return scores


def half_blank(tiles, seed):
    """The first half of each tile says something, the second is the same everywhere."""
    content = torch.randn(tiles, 8, 16, generator=torch.Generator().manual_seed(seed))
    return Features(torch.cat([content, torch.ones(tiles, 8, 16)], dim=1), keys=torch.arange(tiles))


def test_the_subset_that_says_more_is_reconstructed_more_closely():
    config = TrainConfig(steps=80, batch_size=32, lr=3e-3, layers=1, progress=False)
    train_tiles, test_tiles = half_blank(128, 0), half_blank(64, 1)
    errors = []
    for places in (range(8), range(4, 12), range(8, 16)):
        policy = Places(list(places))
        judge = train_reconstructor(train_tiles, kept(train_tiles, policy, 0.5), config)
        errors.append(reconstruction_error(judge, test_tiles, kept(test_tiles, policy, 0.5)))
    all_content, half, none = (error.mean().item() for error in errors)
    assert errors[0].shape == (64,)
    # what is kept comes back, the blank too; of the content that is gone the best guess is its mean, 0:
    # half or all of it stays, as a norm sqrt(1/4) or sqrt(1/2) of the tile's
    assert all_content < 0.1
    assert half == pytest.approx(0.5, abs=0.06) and none == pytest.approx(0.5**0.5, abs=0.06)


def test_a_judge_can_start_from_another_and_leaves_it_alone():
    features, policy = random_features(), make_scorer("random", seed=1)
    config = TrainConfig(steps=4, batch_size=8, layers=1, progress=False)
    first = train_reconstructor(features, kept(features, policy, 0.5), config)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    again = train_reconstructor(features, kept(features, policy, 0.5), config)
    assert same(first.state_dict(), again.state_dict())
    second = train_reconstructor(features, kept(features, policy, 0.3), config, initial=first)
    assert same(before, first.state_dict()) and not same(before, second.state_dict())


def test_the_selector_is_a_policy_and_is_not_trained():
    features = random_features()
    trained = train(small_config(), features=features)
    policy = make_scorer("selector", selector=trained.selector)
    before = {name: value.clone() for name, value in trained.selector.state_dict().items()}
    masks = kept(features, policy, 0.3)
    assert masks.sum(1).unique().tolist() == [3]
    judge = train_reconstructor(features, masks, small_config())
    assert same(before, trained.selector.state_dict())
    joint = MaskedAutoencoder.of(trained.selector, trained.reconstructor)
    for model in (judge, joint):
        error = reconstruction_error(model, features, masks, batch_size=7)
        torch.testing.assert_close(error, reconstruction_error(model, features, masks), atol=1e-5, rtol=1e-5)
    for keep in (0.0, float("nan")):
        with pytest.raises(TokenselError, match="keep is"):
            kept(features, policy, keep)


def test_what_was_trained_beside_noise_is_given_noise():
    features = random_features()
    trained = train(small_config(gate="throttle"), features=features)
    joint = MaskedAutoencoder.of(trained.selector, trained.reconstructor)
    dropped = torch.zeros(features.tokens.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        restored = joint(features.tokens, dropped)
        assert torch.equal(restored, joint(features.tokens, dropped))  # always the same noise
        alone = joint(features.tokens[3:4], dropped[3:4])
        torch.testing.assert_close(alone[0], restored[3])  # whatever the other tiles are
        assert not restored.allclose(restored[:, :1])  # and not one vector for all tokens
        trained.selector.masked.vector.fill_(7.0)  # which no gate but the paper's has trained
        assert torch.equal(restored, joint(features.tokens, dropped))
        paper = MaskedAutoencoder(trained.selector.masked, trained.reconstructor)
        assert not torch.equal(restored, paper(features.tokens, dropped))


def test_padding_is_not_judged():
    features = random_features()
    features.valid = torch.ones(40, 9, dtype=torch.bool)
    features.valid[:, 6:] = False
    policy = make_scorer("norm")
    masks = kept(features, policy, 0.5)
    judge = train_reconstructor(features, masks, small_config())
    error = reconstruction_error(judge, features, masks)
    changed = Features(
        features.tokens.masked_fill(~features.valid[..., None], 99.0), features.valid, keys=features.keys
    )
    assert torch.equal(error, reconstruction_error(judge, changed, masks))
