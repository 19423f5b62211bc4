"""Training: configuration, data, several processes, and the judging of policies by reconstruction."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little import (
    clip_tower,
    cut,
    dataset,
    random_features,
    same,
    sample_images,
    save_images,
    small_config,
    weights,
)
from safetensors.torch import load_file
from tiny import tiny_llava

from tokensel.budget import top_fraction
from tokensel.data.encoders import VisionEncoder
from tokensel.data.features import Features
from tokensel.data.image_sources import open_images
from tokensel.data.loader import ImageFeatureLoader, loaded_ahead, rows_of_step
from tokensel.model.gumbel import gumbel_noise
from tokensel.model.objective import objective
from tokensel.model.selector import TokenSelector
from tokensel.scorers import make_scorer
from tokensel.training.autoencoder import Autoencoder, MaskedAutoencoder, Statistics
from tokensel.training.config import TrainConfig
from tokensel.training.judge import policy_scores, reconstruction_error, train_reconstructor
from tokensel.training.optim import learning_rate, seeded, temperature
from tokensel.training.processes import Processes
from tokensel.training.train import train
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import derived_seed, generator

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tower")
    clip_tower(path)
    return VisionEncoder.from_pretrained(path)


# --- configuration ----------------------------------------------------------------------------------------


def test_unknown_options_are_refused_with_the_nearest_name():
    with pytest.raises(TokenselError, match="unknown option 'batchsize': did you mean 'batch_size'"):
        TrainConfig.from_dict({"p": 0.3, "batchsize": 4})
    assert TrainConfig.from_dict(TrainConfig(p=0.2).to_dict()) == TrainConfig(p=0.2)


@pytest.mark.parametrize(
    "option",
    [{"p": 1.5}, {"p": -0.1}, {"p": float("nan")}, {"steps": 0}, {"tiles": "some"}, {"lr": 0.0},
     {"tau_end": -1.0}, {"precision": "fp8"}, {"batch_size": 0}, {"warmup": 2.0}],
)  # fmt: skip
def test_values_out_of_range_are_refused(option):
    (name,) = option
    with pytest.raises(TokenselError, match=f"^{name} is .*: give"):
        TrainConfig(**option)


def test_schedules():
    config = TrainConfig(steps=100, lr=1.0, warmup=0.05, tau_start=1.0, tau_end=0.25)
    rates = [learning_rate(step, config) for step in range(100)]
    assert (
        rates.index(max(rates)) == 5
        and rates[:6] == sorted(rates[:6])
        and rates[5:] == sorted(rates[5:])[::-1]
    )
    assert max(rates) == 1.0 and rates[99] < 0.01 and min(rates) > 0
    assert temperature(0, config) == 1.0 and temperature(99, config) == pytest.approx(0.25)


# --- which data at which step -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(length, batch, seed):
    steps = -(-3 * length // batch)
    walk = torch.cat([rows_of_step(step, batch, length, seed) for step in range(steps)]).tolist()
    for epoch in range(3):
        assert sorted(walk[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert length < 8 or walk[:length] != walk[length : 2 * length]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5))
def test_slices_of_all_processes_make_the_batch(processes, size):
    parts = [
        list(range(processes * size))[Processes(CPU, i, processes).local_rows(processes * size)]
        for i in range(processes)
    ]
    assert [row for part in parts for row in part] == list(range(processes * size))
    assert {len(part) for part in parts} == {size}


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(TokenselError, match="batch_size is 5: give a multiple of the 2 processes"):
        Processes(CPU, 0, 2).local_rows(5)


def test_seeds_hang_on_every_part():
    seeds = {derived_seed(a, b) for a in range(20) for b in ("noise", "order", 1, "1")}
    assert len(seeds) == 80 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_come_the_same_by_slices_and_from_any_step(streaming, encoder, tmp_path):
    dataset(5).to_parquet(tmp_path / "rows.parquet")

    def walk(start, count, local_rows, restored=None):
        loader = ImageFeatureLoader(open_images(tmp_path / "rows.parquet", streaming=streaming), encoder)
        if restored:
            loader.restore(restored)
        batches = loader.batches(start, 4, local_rows, seed=1)
        received = list(islice(batches, count))
        batches.close()
        return received, loader.state()

    whole, state = walk(0, 5, slice(0, 4))
    for local_rows in (slice(0, 2), slice(2, 4)):
        for batch, part in zip(whole, walk(0, 5, local_rows)[0], strict=True):
            torch.testing.assert_close(part.tokens, batch.tokens[local_rows], atol=1e-5, rtol=1e-5)
            assert torch.equal(part.keys, batch.keys[local_rows])
    later, _ = walk(3, 2, slice(0, 4), state)
    assert torch.equal(torch.stack([b.tokens for b in later]), torch.stack([b.tokens for b in whole[3:]]))
    assert state["stream_length"] == (5 if streaming else None)


def test_what_the_thread_raises_is_raised_by_the_reader():
    def work():
        yield 1
        raise TokenselError("raised by the thread")

    items = loaded_ahead(work())
    assert next(items) == 1
    with pytest.raises(TokenselError, match="raised by the thread"):
        next(items)


def test_statistics_are_mean_std_and_typical_distance():
    features = random_features(tiles=30)
    features.valid = torch.ones(30, 9, dtype=torch.bool)
    features.valid[0] = False
    features.tokens[0] = torch.nan
    statistics = Statistics.of([features[:10], features[10:]])
    tokens = features.tokens[1:]
    torch.testing.assert_close(statistics.mean, tokens.mean((0, 1)))
    torch.testing.assert_close(statistics.std, tokens.std((0, 1), correction=0))
    typical = (tokens - tokens.mean((0, 1))).flatten(1).norm(dim=1).square().mean().sqrt()
    assert statistics.scale == pytest.approx(typical.item(), rel=1e-5)


# --- training ---------------------------------------------------------------------------------------------


def test_a_cut_jpeg_is_skipped_named_and_counted(encoder, tmp_path, capsys):
    folder = save_images(tmp_path / "p", 6)
    cut(folder / "2.jpg")
    trained = train(small_config(out=str(tmp_path / "out")), images=folder, encoder=encoder)
    assert trained.skipped == [str(folder / "2.jpg")]
    reported = capsys.readouterr().err
    assert f"skipped {folder / '2.jpg'}: cannot be read" in reported and "skipped 1 of the images" in reported
    assert all(value.isfinite().all() for value in weights(trained).values())
    card = (tmp_path / "out" / "selector" / "README.md").read_text()
    assert str(folder) in card and encoder.name in card
    for image in folder.rglob("*.jpg"):
        cut(image)
    with pytest.raises(TokenselError, match="none of the first images can be read"):
        train(small_config(), images=folder, encoder=encoder)


def test_an_unreadable_image_counts_for_nothing(encoder, tmp_path):
    """The step of a batch with an image missing is that of the batch without it."""
    folder = save_images(tmp_path / "p", 4)
    cut(folder / "2.jpg")
    config = small_config(steps=1, batch_size=4, statistics_tiles=4, tau_start=1.0, tau_end=1.0)
    features = ImageFeatureLoader(open_images(folder), encoder).batches(0, 4, slice(0, 4), config.seed)
    batch = next(features)
    features.close()
    real = batch.valid.any(1)
    assert real.sum() == 3
    record = train(config, images=folder, encoder=encoder).history[0]
    statistics = Statistics.of([batch])
    model = seeded(lambda: Autoencoder(encoder.width, *config.shape), config.seed)
    model.standardise(statistics.mean, statistics.std)
    noise = gumbel_noise(4, batch.tokens.shape[1], 2, generator=generator(config.seed, "noise", 0))
    restored, mask = model(batch.tokens[real], None, 1.0, noise[real])
    loss = objective(restored, batch.tokens[real], mask, config.p, statistics.scale)
    assert record["loss"] == pytest.approx(loss.loss.item(), rel=1e-5)
    assert record["l_pr"] == pytest.approx(loss.l_pr.item(), rel=1e-5)


def test_an_empty_folder_and_missing_arguments_are_clear_errors(encoder, tmp_path):
    with pytest.raises(TokenselError, match="a folder without images"):
        train(small_config(images=str(tmp_path)), encoder=encoder)
    with pytest.raises(TokenselError, match="images is empty"):
        train(small_config(), encoder=encoder)
    with pytest.raises(TokenselError, match="encoder is empty"):
        train(small_config(images=str(tmp_path)))
    with pytest.raises(TokenselError, match="give a local folder"):
        train(small_config(images=str(save_images(tmp_path / "p")), encoder="nobody/none"))


def test_cached_features_train_like_the_same_features_in_memory(encoder, tmp_path):
    folder = save_images(tmp_path / "p")
    config = small_config(cache=str(tmp_path / "cache"), images=str(folder))
    first = train(config, encoder=encoder)
    encoder.features, kept = None, encoder.features  # the second time nothing is encoded
    try:
        again = train(config, encoder=encoder)
    finally:
        encoder.features = kept
    source = open_images(folder)
    features = encoder.encode([source.open(*row) for row in source.stream()])
    assert same(weights(first), weights(again))
    assert again.selector.config.encoder == encoder.name and again.selector.config.feature_layer == -2
    assert same(weights(first), weights(train(small_config(), features=features)))


def test_the_tiles_of_anyres_images_are_all_met(tmp_path):
    encoder = VisionEncoder.from_vlm(*tiny_llava())
    loader = ImageFeatureLoader(open_images(sample_images(1)), encoder, "anyres")
    batches = loader.batches(0, 16, slice(0, 16), seed=0)
    seen = next(batches).tokens.unique(dim=0)
    batches.close()
    assert len(seen) == len(encoder.preprocess(sample_images(1), "anyres")) > 2


def test_bfloat16_stays_close_to_float32():
    one = train(small_config(precision="fp32", steps=3), features=random_features()).history
    two = train(small_config(precision="bf16", steps=3), features=random_features()).history
    assert one[-1]["l_rec"] == pytest.approx(two[-1]["l_rec"], abs=0.05)
    assert one[-1]["l_rec"] != two[-1]["l_rec"]


CHILD = """
import sys, warnings, torch
torch.set_num_threads(1)
from tokensel.data.features import Features
from tokensel.training.config import TrainConfig
from tokensel.training.train import train
tokens = torch.randn(40, 9, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
valid = torch.ones(40, 9, dtype=torch.bool)
valid[::7] = False
train(TrainConfig(steps=12, batch_size=8, layers=1, statistics_tiles=16, progress=False, device="cpu",
                  save_every=5, out=sys.argv[1]), features=Features(tokens, valid))
"""


def test_two_processes_end_where_one_does(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, script, tmp_path / "two"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    exec(compile(CHILD.replace("sys.argv[1]", repr(str(tmp_path / "one"))), "child", "exec"), {})
    assert len((tmp_path / "two" / "history.jsonl").read_text().splitlines()) == 12
    for part in ("selector", "reconstructor"):
        one, two = (load_file(tmp_path / n / part / "model.safetensors") for n in ("one", "two"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4)
        start = TokenSelector.from_pretrained(tmp_path / "one" / "selector").config
    assert start.scale > 0 and max((one[name] - two[name]).abs().max() for name in one) < 2e-5


# --- Eq. (1) ----------------------------------------------------------------------------------------------


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
