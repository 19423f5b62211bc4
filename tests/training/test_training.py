"""Training: configuration, data, several processes."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets import Features as DatasetFeatures
from datasets import Image as ImageFeature
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

from tokensel.data.encoders import VisionEncoder
from tokensel.data.image_sources import open_images
from tokensel.data.loader import ImageFeatureLoader, loaded_ahead, rows_of_step
from tokensel.model.gates import GATES
from tokensel.model.gumbel import gumbel_noise
from tokensel.model.objective import objective
from tokensel.model.selector import TokenSelector
from tokensel.training.autoencoder import Autoencoder, Statistics
from tokensel.training.config import TrainConfig
from tokensel.training.optim import drawn_budget, learning_rate, seeded, temperature
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


def test_a_row_without_an_image_is_skipped_and_named(encoder, tmp_path, capsys):
    content = [image if i != 3 else None for i, image in enumerate(sample_images(6))]
    rows = Dataset.from_dict({"image": content}, features=DatasetFeatures({"image": ImageFeature()}))
    rows.to_parquet(tmp_path / "null.parquet")
    for options in ({}, {"streaming": True}, {"cache": str(tmp_path / "cache")}):
        config = small_config(images=str(tmp_path / "null.parquet"), **options)
        assert train(config, encoder=encoder).skipped == ["row 3"]
    assert train(small_config(), images=content, encoder=encoder).skipped == ["row 3"]
    assert "skipped row 3: cannot be read" in capsys.readouterr().err
    with pytest.raises(TokenselError, match="row 1: int is no image"):
        train(small_config(), images=[content[0], 7], encoder=encoder)


def test_an_unreadable_image_counts_for_nothing(encoder, tmp_path):
    """The step of a batch with an image missing is that of the batch without it."""
    folder = save_images(tmp_path / "p", 4)
    cut(folder / "2.jpg")
    config = small_config(
        steps=1, batch_size=4, statistics_tiles=4, gate="gumbel", tau_start=1.0, tau_end=1.0
    )
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
                  save_every=5, out=sys.argv[1], GATE), features=Features(tokens, valid))
"""


@pytest.mark.parametrize("gate", ["gate='gumbel'", "gate='topk', p_most=0.7"])
def test_two_processes_end_where_one_does(gate, tmp_path):
    script = tmp_path / "child.py"
    child = CHILD.replace("GATE", gate)
    script.write_text(child)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, script, tmp_path / "two"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    exec(compile(child.replace("sys.argv[1]", repr(str(tmp_path / "one"))), "child", "exec"), {})
    assert len((tmp_path / "two" / "history.jsonl").read_text().splitlines()) == 12
    for part in ("selector", "reconstructor"):
        one, two = (load_file(tmp_path / n / part / "model.safetensors") for n in ("one", "two"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4)
        start = TokenSelector.from_pretrained(tmp_path / "one" / "selector").config
    assert start.scale > 0 and max((one[name] - two[name]).abs().max() for name in one) < 2e-5


@pytest.mark.parametrize("gate", ["topk", "scale", "throttle"])
def test_a_gate_that_divides_a_budget_keeps_exactly_the_budget_of_each_step(gate):
    config = small_config(gate=gate, p=0.2, p_most=0.8, batch_size=20, steps=8)
    history = train(config, features=random_features()).history
    budgets = [drawn_budget(step, config.seed, config.p, config.p_most) for step in range(8)]
    assert [record["l_pr"] for record in history] == pytest.approx(budgets, abs=1 / (20 * 9) + 1e-4)
    assert 0.2 <= min(budgets) < 0.4 and 0.6 < max(budgets) <= 0.8
    assert [record["loss"] for record in history] == pytest.approx(
        [record["l_rec"] + record["l_pr"] for record in history], abs=0.01
    )


@pytest.mark.parametrize("gate", GATES)
def test_what_is_left_open_is_chosen_by_the_gate(gate):
    chosen = TrainConfig(gate=gate)
    assert (chosen.p, chosen.p_most) == ((0.3, None) if gate == "gumbel" else (0.05, 0.6))
    assert chosen.tau_start == 2.0 and chosen.tau_end == (1.0 if gate in ("gumbel", "topk") else 0.1)
    assert TrainConfig.from_dict(chosen.to_dict()) == chosen
    given = TrainConfig(gate=gate, p=0.4, tau_end=0.7)
    assert (given.p, given.p_most, given.tau_end) == (0.4, None, 0.7)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"gate": "topk", "p": 0.0}, "p is 0.0: the gate 'topk' needs a fraction between 0 and 1"),
        ({"gate": "gumbel", "p_most": 0.7}, "p_most is 0.7: give a gate other than gumbel, or none"),
        ({"p": 0.3, "p_most": 0.2}, "p_most is 0.2: give a fraction between p = 0.3 and 1"),
        ({"gate": "sigmoid"}, "gate is 'sigmoid'"),
    ],
)
def test_a_gate_and_a_budget_that_do_not_fit_are_one_line(options, line):
    with pytest.raises(TokenselError) as error:
        small_config(**options)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("gate", GATES)
def test_a_threshold_keeps_its_share_of_the_tokens_of_the_training(gate):
    features = random_features(tiles=200)
    config = small_config(gate=gate, steps=50, statistics_tiles=200)
    selector = train(config, features=features).selector
    scores = selector.scores(features.tokens)
    for keep in (0.05, 0.3, 0.333, 0.8):
        assert (scores > selector.threshold(keep)).float().mean().item() == pytest.approx(keep, abs=0.01)
    assert selector.threshold(1.0) == -float("inf")
    with pytest.raises(TokenselError, match=r"keep is 0\.0: give a fraction in \(0, 1\]"):
        selector.threshold(0.0)
    selector.config.thresholds = None
    with pytest.raises(TokenselError, match="saved without thresholds: train it again"):
        selector.threshold(0.3)


def test_after_a_gate_that_divides_a_budget_scores_above_zero_are_that_budget():
    features = random_features()
    config = small_config(gate="topk", p=0.25, steps=10, statistics_tiles=40)
    selector = train(config, features=features).selector
    assert selector.keep_mask(features.tokens).float().mean().item() == pytest.approx(0.25, abs=0.03)
