"""Published models of six families in their true widths: load, keep all, select, answer two at once, score.

Random weights. What is cut is the number of layers (two of the tower, one of the language model) and the
vocabulary; widths, heads, mergers, patches, tiles and image processors are those of the Hub. In bfloat16, so
that none takes more than a gigabyte.
"""

import csv
import json
import shutil

import pytest
import suite_tiny
import tiny_families
import torch
from datasets import Dataset
from tiny import noise_image

from tokensel.benchmarks import Benchmark
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.cost.published_families import image_grids
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm, reduce_inputs
from tokensel.vlm.forced import force, forced_logits

SIZES = [(192, 384), (96, 384)]  # height and width; few tiles in InternVL and SmolVLM
IMAGES = [noise_image(*size, seed=seed) for seed, size in enumerate(SIZES)]
QUESTIONS = ["what is it?", "and what is in this one?"]
KEEP, STEPS = 0.3, 4
NAMES = (
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen/Qwen3-VL-8B-Instruct",
    "OpenGVLab/InternVL3-8B-hf",
    "llava-hf/llava-1.5-7b-hf",
    "HuggingFaceTB/SmolVLM-Instruct",
    "google/gemma-3-4b-it",
)


def questions(split: str, n: int | None) -> Dataset:
    rows = [
        dict(image=image, question=question, answers=["]", "]]]]"], question_id=str(number), options=[])
        for number, (image, question) in enumerate(zip(IMAGES, QUESTIONS))
    ]
    return Dataset.from_list(rows, features=suite_tiny.COLUMNS)


BENCHMARKS = {"two": Benchmark("two", "reading", "similarity", STEPS, questions, lambda row: row["question"])}


def first_logits(vlm, inputs) -> torch.Tensor:
    options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return vlm.model.generate(**inputs, **options).logits[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_from_loading_to_scoring(name, tmp_path):
    tiny_families.save_published(name, tmp_path / "model")
    vlm = load_vlm(tmp_path / "model", "cpu", "bfloat16")
    prompts = [vlm.prompt(question) for question in QUESTIONS]
    inputs = vlm.inputs([[image] for image in IMAGES], prompts)
    reduced = reduce_inputs(vlm.model, inputs, make_scorer("norm"), KEEP)
    # as many as the published image processor and configuration make
    counts = torch.stack([image_grids(name, *size).prod(1).sum() for size in SIZES])
    assert torch.equal(reduced.n_visual_full, counts)
    assert torch.equal(reduced.n_visual, (KEEP * counts + 0.5).long())
    dropped = (reduced.n_visual_full - reduced.n_visual).sum()
    assert reduced["attention_mask"].sum() == inputs["attention_mask"].sum() - dropped

    output = vlm.generate_output(reduced, STEPS, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(output.model_output.logits, 1).float()  # [rows, steps, words]
    assert logits.std() > 0.3
    if vlm.model.config.model_type == "gemma3":
        with pytest.raises(TokenselError, match=r"use model\.generate"):
            force(vlm.model, reduced, output.tokens, output.lengths)
    else:
        forced = forced_logits(vlm.model, force(vlm.model, reduced, output.tokens, output.lengths))
        assert (forced - logits).abs().max() < 0.1  # numbers of eight bits

    fewest = int(counts.argmin())
    alone = vlm.inputs([[IMAGES[fewest]]], prompts[fewest : fewest + 1])
    whole = first_logits(vlm, reduce_inputs(vlm.model, alone))
    assert torch.equal(whole, first_logits(vlm, alone))
    few = first_logits(vlm, reduce_inputs(vlm.model, alone, make_scorer("norm"), KEEP))
    assert (few - whole).abs().max() > 0.03  # what is dropped is seen in the logits

    config = EvalConfig(
        suite=__name__,
        model=str(tmp_path / "model"),
        methods=("norm",),
        keeps=(KEEP,),
        n=2,
        batch_size=2,
        device="cpu",
        dtype="bfloat16",
        out=str(tmp_path / "out"),
        compare=(),
    )
    done = evaluate(config, progress=False)
    (row,) = csv.DictReader(done.table.read_text().splitlines())
    assert float(row["flops"]) > 0 and 0 <= float(row["score"]) <= 1
    (records,) = (tmp_path / "out").rglob("*.jsonl")
    answers = [json.loads(line)["prediction"] for line in records.read_text().splitlines()]
    assert answers == output.texts
    shutil.rmtree(tmp_path / "model")
