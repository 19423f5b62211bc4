"""The vision tower and projector of LLaVA-NeXT-7B in their true shapes, through train and evaluate.

Random weights and one narrow language layer: what could break is the shapes, the tiles and the widths.
"""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from little import save_images
from tiny import tiny_config, tiny_processor
from transformers import CLIPVisionConfig, LlavaNextForConditionalGeneration

from tokensel import cli

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_LARGE = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=336, patch_size=14, projection_dim=768,
)  # fmt: skip
MISTRAL = dict(
    hidden_size=4096,
    intermediate_size=1024,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava-next-7b-shapes"
    config = tiny_config("mistral", vision=CLIPVisionConfig(**CLIP_LARGE), pinpoints=PINPOINTS, **MISTRAL)
    model = LlavaNextForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    tiny_processor(336, 14, PINPOINTS).save_pretrained(folder)
    return folder


def test_train_then_evaluate(checkpoint, tmp_path, monkeypatch, capsys):
    def tokensel(*arguments):
        monkeypatch.setattr(sys, "argv", ["tokensel", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert not exit_info.value.code, capsys.readouterr().err

    small = ("--steps", 1, "--batch-size", 1, "--statistics-tiles", 1, "--layers", 1, "--no-progress")
    pictures = save_images(tmp_path / "pictures", 2)
    tokensel("train", "--images", pictures, "--encoder", checkpoint, "--out", tmp_path / "run", *small)
    tokensel(
        "evaluate", "--model", checkpoint, "--selector", tmp_path / "run" / "selector",
        "--suite", "suite_tiny", "--benchmarks", "choice", "--n", 1, "--keeps", 0.3,
        "--out", tmp_path / "out", "--no-progress",
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "evaluate.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["full", "none", "random", "selector"]
    assert {row["model"] for row in rows} == {"llava-next-7b-shapes"}
    paths = sorted((tmp_path / "out").rglob("keep-0.3*.jsonl"))
    assert len(paths) == 2
    for path in paths:
        record = json.loads(path.read_text())
        assert record["n_visual_full"] > 576 and record["n_visual"] == round(0.3 * record["n_visual_full"])
