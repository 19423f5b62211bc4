"""Killed with SIGKILL, then the same command again: the same weights, and only the last steps done twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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

from tokensel.data.encoders import VisionEncoder
from tokensel.training.train import train
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import load_tensors, save_tensors

ROOT = Path(__file__).parents[2]
OTHER_DATA = r"was trained on .*give another out folder"

CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import tokensel.utils.files, tokensel.training.train
from tokensel.data.features import Features

out, kill_at, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
steps, saves = [], []

def optimizer_step(model, optimizer, loss, step, config, real=tokensel.training.train.optimizer_step):
    real(model, optimizer, loss, step, config)
    steps.append(step)
    if where == "step" and step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def save_file(tensors, path, metadata, real=tokensel.utils.files.save_file):
    real(tensors, path, metadata=metadata)
    saves.append(path)
    if where == "save" and len(saves) == kill_at:
        os.truncate(path, 1000)  # half of the new checkpoint is on the disk
        os.kill(os.getpid(), signal.SIGKILL)

tokensel.training.train.optimizer_step, tokensel.utils.files.save_file = optimizer_step, save_file
options = dict(steps=20, batch_size=8, layers=1, statistics_tiles=8, save_every=6, log_every=4)
tokens = torch.randn(40, 9, 16, generator=torch.Generator().manual_seed(0))
features = Features(tokens * 3 + 1, keys=torch.arange(40))
config = tokensel.training.train.TrainConfig(**options, progress=False, out=out)
tokensel.training.train.train(config, features=features)
print(steps[0] if steps else None, len(steps))
"""


def run(out, kill_at=-1, where="step"):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(out), str(kill_at), where]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    return out, train(
        small_config(steps=20, batch_size=8, save_every=6, log_every=4, out=str(out)),
        features=random_features(),
    )


def test_a_killed_training_ends_at_the_same_weights(undisturbed, tmp_path):
    # first between two checkpoints, then, gone on, in the middle of writing the next one
    for kill_at, where in ((15, "step"), (1, "save")):
        done = run(tmp_path, kill_at, where)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "12"
    again = run(tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.split() == ["12", "8"]  # only what came after the last checkpoint
    out, trained = undisturbed
    for part in ("selector", "reconstructor"):
        one, two = (load_file(folder / part / "model.safetensors") for folder in (out, tmp_path))
        assert one.keys() == two.keys()
        assert max((one[name] - two[name]).abs().max().item() for name in one) == 0.0
    assert not list(tmp_path.glob(".*.part"))
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == list(range(1, 21))
    for record, expected in zip(history, trained.history, strict=True):
        assert record["loss"] == expected["loss"] and record["lr"] == expected["lr"]
    card = (tmp_path / "selector" / "README.md").read_text()
    assert card == (out / "selector" / "README.md").read_text()


def interrupted(monkeypatch, at):
    import tokensel.training.train

    real = tokensel.training.train.optimizer_step

    def optimizer_step(model, optimizer, loss, step, config):
        real(model, optimizer, loss, step, config)
        if step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokensel.training.train, "optimizer_step", optimizer_step)


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_images_continue_where_they_were(kind, tmp_path, monkeypatch):
    clip_tower(tmp_path / "tower")
    encoder = VisionEncoder.from_pretrained(tmp_path / "tower")
    if kind == "folder":
        images = save_images(tmp_path / "p", 7)
        cut(images / "2.jpg")
    else:
        dataset(7).to_parquet(tmp_path / "p.parquet")
        images = tmp_path / "p.parquet"
    options = dict(images=str(images), streaming=kind == "stream", steps=10, save_every=3)
    whole = train(small_config(**options), encoder=encoder)
    interrupted(monkeypatch, at=7)
    with pytest.raises(KeyboardInterrupt):
        train(small_config(**options, out=str(tmp_path / "out")), encoder=encoder)
    monkeypatch.undo()
    resumed = train(small_config(**options, out=str(tmp_path / "out")), encoder=encoder)
    assert same(weights(whole), weights(resumed)) and whole.skipped == resumed.skipped
    assert [record["loss"] for record in whole.history] == [record["loss"] for record in resumed.history]


def test_a_finished_training_is_not_done_again(undisturbed, monkeypatch):
    out, trained = undisturbed
    interrupted(monkeypatch, at=0)
    again = train(
        small_config(steps=20, batch_size=8, save_every=6, log_every=1, out=str(out)),
        features=random_features(),
    )
    assert same(weights(trained), weights(again)) and again.history == trained.history


def test_other_options_or_other_data_are_refused(undisturbed):
    out, _ = undisturbed
    with pytest.raises(TokenselError, match=r"was trained with p 0\.05, not 0\.5; give another out folder"):
        train(small_config(steps=20, batch_size=8, p=0.5, out=str(out)), features=random_features())
    with pytest.raises(TokenselError, match="give another out folder or delete it"):
        train(small_config(steps=20, batch_size=8, out=str(out)), features=random_features(seed=1))


def test_the_same_tokens_with_other_padding_are_other_data(undisturbed):
    features = random_features()
    features.valid = torch.ones(features.tokens.shape[:2], dtype=torch.bool)
    features.valid[0, 3:] = False
    with pytest.raises(TokenselError, match=OTHER_DATA):
        train(small_config(steps=20, batch_size=8, out=str(undisturbed[0])), features=features)


def test_as_many_other_images_are_other_data_and_moved_ones_are_the_same(tmp_path):
    clip_tower(tmp_path / "tower")
    encoder = VisionEncoder.from_pretrained(tmp_path / "tower")
    out, folder = str(tmp_path / "out"), save_images(tmp_path / "p", 5)
    first = train(small_config(out=out), images=folder, encoder=encoder)
    shutil.move(folder, tmp_path / "moved")
    again = train(small_config(out=out), images=tmp_path / "moved", encoder=encoder)
    assert same(weights(first), weights(again))
    for option in ({"drop_cls": False}, {"feature_layer": -1}):
        other = VisionEncoder.from_pretrained(tmp_path / "tower", **option)
        with pytest.raises(TokenselError, match=OTHER_DATA):
            train(small_config(out=out), images=tmp_path / "moved", encoder=other)
    os.replace(tmp_path / "moved" / "0.jpg", tmp_path / "moved" / "4.jpg")
    sample_images(9)[8].save(tmp_path / "moved" / "0.jpg")
    for images in (tmp_path / "moved", sample_images(5)[::-1]):
        with pytest.raises(TokenselError, match=OTHER_DATA):
            train(small_config(out=out), images=images, encoder=encoder)


def test_another_precision_is_another_training(tmp_path, monkeypatch):
    train(small_config(out=str(tmp_path)), features=random_features())
    train(small_config(out=str(tmp_path), precision="fp32"), features=random_features())  # auto, here
    monkeypatch.setattr("tokensel.training.train.use_bf16", lambda *_: True)  # as on a GPU
    with pytest.raises(TokenselError, match="was trained with precision fp32, not bf16"):
        train(small_config(out=str(tmp_path)), features=random_features())


def test_a_checkpoint_of_another_version_is_one_clear_line(undisturbed, tmp_path):
    tensors, header = load_tensors(undisturbed[0] / "checkpoint.safetensors")
    header["feed"] = header.pop("loader")
    save_tensors(tmp_path / "checkpoint.safetensors", tensors, header)
    with pytest.raises(
        TokenselError, match="was written by another version of tokensel; give another"
    ) as caught:
        train(small_config(steps=20, batch_size=8, out=str(tmp_path)), features=random_features())
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_short_is_one_clear_line(undisturbed, tmp_path):
    content = (undisturbed[0] / "checkpoint.safetensors").read_bytes()
    (tmp_path / "checkpoint.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(TokenselError, match="not a whole safetensors file") as caught:
        train(small_config(steps=20, batch_size=8, out=str(tmp_path)), features=random_features())
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import errno

    options = dict(steps=6, batch_size=8, save_every=2, out=str(tmp_path))
    whole = train(small_config(**options | {"out": ""}), features=random_features())
    replace, moved = os.replace, []

    def full(source, target):
        if str(target).endswith("checkpoint.safetensors"):
            moved.append(target)
            if len(moved) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TokenselError, match="no space left on the device"):
        train(small_config(**options), features=random_features())
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.part"))
    assert same(weights(train(small_config(**options), features=random_features())), weights(whole))
