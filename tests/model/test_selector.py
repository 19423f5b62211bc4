"""Selector and reconstructor: the mask, its gradient, padding, and life as Hugging Face models."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from tokensel.model.gumbel import gumbel_mask, gumbel_noise
from tokensel.model.layers import default_heads
from tokensel.model.positions import sincos
from tokensel.model.reconstructor import ReconstructorConfig, TokenReconstructor
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.utils.errors import TokenselError

quick = settings(max_examples=25, deadline=None)


def lively(model, seed=0, std=0.3):
    """Random weights large enough that the output depends on every token and its place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def selector(width=32, **options):
    return lively(TokenSelector(SelectorConfig(width=width, **options)))


def reconstructor(width=32):
    return lively(TokenReconstructor(ReconstructorConfig(width=width)))


def test_the_mask_is_binary_forward_and_relaxed_backward():
    logits, noise = (
        random(3, 7, 2).requires_grad_(),
        gumbel_noise(3, 7, 2, generator=torch.Generator().manual_seed(1)),
    )
    weight = random(3, 7, seed=2)
    mask = gumbel_mask(logits, 0.7, noise)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    (gradient,) = torch.autograd.grad((mask * weight).sum(), logits)
    relaxed = ((logits + noise) / 0.7).softmax(-1)[..., 1]
    (expected,) = torch.autograd.grad((relaxed * weight).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert expected.abs().min() > 0


def test_a_token_is_kept_with_the_probability_its_logits_say():
    logits = torch.tensor([0.0, 1.2]).expand(400, 500, 2)
    mask = gumbel_mask(logits, 1.0, gumbel_noise(400, 500, 2, generator=torch.Generator().manual_seed(0)))
    assert abs(mask.mean().item() - torch.sigmoid(torch.tensor(1.2)).item()) < 0.004  # four standard errors


def test_gumbel_noise_has_the_right_moments_and_hangs_on_its_generator():
    noise = gumbel_noise(1000, 1000, generator=torch.Generator().manual_seed(0))
    assert abs(noise.mean().item() - 0.5772) < 0.006 and abs(noise.var().item() - torch.pi**2 / 6) < 0.02
    again = gumbel_noise(1000, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise, again) and noise.isfinite().all()


def test_selected_is_the_features_where_kept_and_one_embedding_elsewhere():
    model, features = selector(), random(2, 16, 32)
    out = model(features, tau=0.5, noise=gumbel_noise(2, 16, 2, generator=torch.Generator().manual_seed(3)))
    kept = out.mask.bool()
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(out.selected[kept], features[kept])
    assert (out.selected[~kept] == out.selected[~kept][0]).all()
    features.requires_grad_()
    out = model(features)
    out.selected.square().sum().backward()
    assert model.masked.vector.grad.abs().sum() > 0 and model.head.weight.grad.abs().sum() > 0


def test_without_noise_the_mask_is_the_one_of_inference():
    model, features = selector(), random(3, 9, 32)
    with torch.no_grad():
        model.head.bias[1] -= model.scores(features).median()  # about half of the tokens now win
    assert torch.equal(model(features).mask.bool(), model.hard_mask(features))
    assert torch.equal(model.hard_mask(features), model.scores(features) > 0)
    counts = model.keep_mask(features).sum(1)
    assert len(counts.unique()) > 1  # adaptive: differs from image to image
    assert model.keep_mask(features, keep=0.3).sum(1).tolist() == [3, 3, 3]
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(TokenselError, match="keep is"):
            model.keep_mask(features, keep=keep)


@quick
@given(st.integers(1, 70), st.integers(1, 30), st.integers(1, 3))
def test_any_width_and_any_number_of_tokens(width, tokens, batch):
    features = random(batch, tokens, width)
    out = TokenSelector(SelectorConfig(width=width, layers=1))(features)
    back = TokenReconstructor(ReconstructorConfig(width=width, layers=1))(out.selected)
    assert back.shape == features.shape and out.mask.shape == (batch, tokens)
    assert width % default_heads(width) == 0


@quick
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.sampled_from([0.0, 1e4, float("nan")]),
    st.integers(0, 9),
)
def test_a_padded_row_equals_the_row_alone(lengths, rubbish, seed):
    padded = max(lengths) + 3
    features = torch.full((len(lengths), padded, 32), rubbish)
    valid = torch.zeros(len(lengths), padded, dtype=torch.bool)
    for row, length in enumerate(lengths):
        features[row, :length] = random(length, 32, seed=seed + row)
        valid[row, :length] = True
    model, back = selector(layers=2), reconstructor()
    out = model(features, valid)
    restored = back(out.selected, valid)
    scores = model.scores(features, valid)
    assert out.mask[~valid].sum() == 0 and (scores[~valid] == -torch.inf).all()
    for row, length in enumerate(lengths):
        alone = model(features[row : row + 1, :length])
        torch.testing.assert_close(out.logits[row, :length], alone.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(restored[row, :length], back(alone.selected)[0], atol=1e-3, rtol=1e-3)


def test_what_stands_in_a_hole_changes_nothing_else():
    model, features = selector(), random(2, 16, 32)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, 5] = valid[1, :3] = False
    changed = features.masked_fill(~valid[..., None], 7.0)
    assert torch.equal(model.scores(features, valid), model.scores(changed, valid))
    assert not torch.equal(model.scores(features)[valid], model.scores(changed)[valid])


def test_a_mask_that_is_all_valid_changes_no_bit():
    model, back, features = selector(), reconstructor(), random(2, 12, 32)
    valid = torch.ones(2, 12, dtype=torch.bool)
    assert torch.equal(model(features, valid).logits, model(features).logits)
    assert torch.equal(back(features, valid), back(features))


def test_a_row_without_any_token_is_harmless():
    model, features = selector(), random(2, 9, 32)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1] = False
    out = model(features, valid)
    loss = reconstructor()(out.selected, valid)[valid].sum() + out.mask.sum()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(out.logits[0], model(features[:1]).logits[0], atol=1e-5, rtol=1e-5)


def test_places_differ_and_a_grid_is_two_dimensional():
    for tokens, channels in ((16, 8), (9, 7), (10, 8), (1, 4)):
        codes = sincos(tokens, channels)
        assert codes.shape == (tokens, channels) and codes.unique(dim=0).shape[0] == tokens
    grid = sincos(16, 8).view(4, 4, 8)
    assert torch.equal(grid[1, 0, :4], grid[1, 3, :4]) and torch.equal(grid[0, 2, 4:], grid[3, 2, 4:])


def test_the_order_of_tokens_matters_only_through_their_places():
    model, features = selector(), random(1, 10, 32)
    with torch.no_grad():
        turned = model.scores(features.flip(1)).flip(1)
        assert not torch.allclose(turned, model.scores(features), atol=1e-2)
        model.trunk.position_scale.zero_()
        torch.testing.assert_close(
            model.scores(features.flip(1)).flip(1), model.scores(features), atol=1e-4, rtol=1e-4
        )


def test_units_of_the_features_do_not_matter_once_they_are_standardised():
    features, model, back = random(4, 9, 32), selector(), reconstructor()
    model.standardise(torch.zeros(32), torch.ones(32))
    factor, shift = torch.linspace(0.1, 50, 32), torch.linspace(-30, 30, 32)
    other, other_back = selector(), reconstructor()
    other.standardise(shift, factor)
    other_back.standardise(shift, factor)
    torch.testing.assert_close(
        other.scores(features * factor + shift), model.scores(features), atol=1e-3, rtol=1e-3
    )
    restored = other_back(other(features * factor + shift).selected)
    torch.testing.assert_close(
        (restored - shift) / factor, back(model(features).selected), atol=1e-2, rtol=1e-2
    )


def test_features_of_another_width_are_refused():
    with pytest.raises(TokenselError, match="48 channels but this model was made for 32"):
        selector(32).scores(random(1, 4, 48))
    with pytest.raises(TokenselError, match="heads is 5: give a divisor of the width 32"):
        selector(32, heads=5)


@pytest.mark.parametrize("kind", [TokenSelector, TokenReconstructor])
def test_saving_and_loading_keeps_every_bit_and_writes_a_card(kind, tmp_path):
    facts = dict(keep=0.3, encoder="some/clip", feature_layer=-2, drop_cls=True, training_data="coco",
                 steps=1234, l_rec=0.3333, l_pr=0.2999)  # fmt: skip
    model = lively(kind(kind.config_class(width=24, layers=2, **facts)))
    model.standardise(random(24), random(24).abs())
    model.save_pretrained(tmp_path / "m")
    again = kind.from_pretrained(tmp_path / "m")
    features = random(2, 9, 24)
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(again.trunk(features), model.trunk(features)) and not again.training
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (tmp_path / "m" / "README.md").read_text()
    for fact in (
        kind.__name__,
        "`some/clip`",
        "-2, without the CLS token",
        "0.3",
        "coco",
        "1234",
        "0.3333",
        "0.2999",
    ):
        assert fact in card
    assert again.config.keep == 0.3 and again.config.feature_layer == -2


def test_scores_under_autocast_are_in_single_precision():
    model, features = selector(64), random(1, 576, 64)
    plain = model.scores(features)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.scores(features)
    assert scores.dtype == torch.float32 and len(scores.unique()) == len(plain.unique())
    assert not torch.equal(scores, plain)  # the layers did run in bfloat16


@pytest.mark.parametrize("kind", [TokenSelector, TokenReconstructor])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_keep_single_precision_under_every_dtype(kind, dtype, tmp_path):
    model = lively(kind(kind.config_class(width=24, layers=1)))
    model.standardise(random(24) * 100, random(24).abs() + 0.1)
    statistics = {name: value for name, value in model.state_dict().items() if name.endswith(("mean", "std"))}
    assert statistics
    model.save_pretrained(tmp_path / "whole")
    loaded = kind.from_pretrained(tmp_path / "whole", dtype=dtype)
    loaded.save_pretrained(tmp_path / "half")
    for other in (loaded, kind.from_pretrained(tmp_path / "half"), model.to(dtype)):
        assert other.head.weight.dtype == dtype
        for name, value in statistics.items():
            assert torch.equal(
                other.state_dict()[name], value
            )  # which compares the values in single precision


@pytest.mark.parametrize("kind", [TokenSelector, TokenReconstructor])
def test_a_checkpoint_with_the_former_names_of_the_statistics_loads_and_is_saved_with_the_new(kind, tmp_path):
    model = lively(kind(kind.config_class(width=24, layers=1)))
    model.standardise(random(24), random(24).abs())
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    former = {
        name.replace(".mean", ".center").replace(".std", ".spread"): value
        for name, value in load(content).items()
    }
    assert "trunk.center" in former and "trunk.mean" not in former
    save_file(former, weights, metadata={"format": "pt"})
    again = kind.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    again.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == content


def test_push_to_hub_uploads_our_card(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            seen.update(
                repo=repo_id,
                files=sorted(os.listdir(folder_path)),
                card=Path(folder_path, "README.md").read_text(),
            )
            return "https://hub/commit/1"

    monkeypatch.setattr("tokensel.model.base.HfApi", Api)
    assert selector().push_to_hub("my-selector") == "https://hub/commit/1"
    assert seen["repo"] == "me/my-selector" and seen["files"] == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert "TokenSelector" in seen["card"]


def test_what_cannot_be_loaded_says_why_in_one_line(tmp_path):
    def refused(name, words):
        with pytest.raises(TokenselError, match=words) as caught:
            TokenSelector.from_pretrained(name)
        assert "\n" not in str(caught.value)

    selector().save_pretrained(tmp_path / "whole")
    refused(tmp_path / "none", "give a local folder or a hub id")
    refused("nobody/nothing-of-this-name", "nobody/nothing-of-this-name: .*give a local folder or a hub id")
    reconstructor().save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", "tokensel-reconstructor, not tokensel-selector")
    weights = tmp_path / "whole" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(tmp_path / "whole", "cut short")
    tensors = load(content)
    del tensors["head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(tmp_path / "whole", "lacks the weights")


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TokenselError, match="no space left on the device; free some"):
        selector().save_pretrained(tmp_path / "m")
