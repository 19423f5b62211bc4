"""LLaVA-OneVision through the same functions as LLaVA-NeXT, and its own compression as a method."""

import csv
import json
from math import sqrt
from pathlib import Path

import pytest
import suite_tiny
import torch
from tiny import (
    SIZES,
    WIDTH,
    ask,
    logits,
    noise_image,
    onevision_processor,
    tiny_onevision,
    tiny_selector,
    tiny_vlm,
)

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.data.encoders import VisionEncoder
from tokensel.methods import Batch, prepare
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, count_tokens, encode, load_vlm, reduce_inputs
from tokensel.vlm.native import OFF

NATIVE = "anyres_max_2"  # so that images of a few tiles are compressed already


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onevision")
    tiny_onevision(NATIVE).save_pretrained(path)
    onevision_processor(ratio=NATIVE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vlm(folder) -> Vlm:
    return load_vlm(folder, device="cpu")


def test_loading_switches_the_interpolation_off_in_model_and_processor(vlm):
    assert vlm.native == NATIVE
    assert vlm.model.config.vision_aspect_ratio == vlm.processor.vision_aspect_ratio == OFF
    assert vlm.model.model.config.vision_aspect_ratio == OFF
    assert tiny_vlm().native is None


def test_what_the_processor_saves_names_the_stock_class(folder):
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["processor_class"] == "LlavaOnevisionProcessor" and saved["vision_aspect_ratio"] == NATIVE


@pytest.mark.parametrize("rows", [[0], [0, 3, 1], [None, 2], [[1, 3], 0]])
def test_keeping_everything_changes_no_logit(vlm, rows):
    inputs = ask(vlm, rows)
    stock = logits(vlm.model, inputs)
    assert (logits(vlm.model, reduce_inputs(vlm.model, inputs)) - stock).abs().max() == 0.0
    wanted = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    ours = vlm.model.generate(**reduce_inputs(vlm.model, inputs), max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, wanted)


def test_images_of_a_row_with_several_are_left_uncut(vlm):
    encoded = encode(vlm.model, ask(vlm, [[1, 3], 0]))
    assert encoded.layout.tiles[:2] == [1, 1] and encoded.layout.tiles[2] > 1
    assert encoded.n_visual[0] == 2 * 36 and encoded.cls_attention is None


def test_features_are_those_the_projector_is_given_and_the_encoders(vlm, folder):
    inputs, seen = ask(vlm, [0, 3]), []
    handle = vlm.model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    logits(vlm.model, inputs)
    handle.remove()
    encoded = encode(vlm.model, inputs)
    assert torch.equal(encoded.features.tokens, seen[0])
    encoder = VisionEncoder.from_pretrained(folder)
    assert (encoder.feature_layer, encoder.drop_cls, encoder.tokens) == (-1, False, 36)
    assert torch.equal(encoder.features(encoded.pixel_values).tokens, seen[0])
    assert len(encoder.preprocess([noise_image(*SIZES[0])], "anyres")) == encoded.layout.tiles[0]


def test_native_is_the_stock_model_as_shipped(vlm):
    shipped = Vlm(tiny_onevision(NATIVE), onevision_processor(ratio=NATIVE), "shipped")
    images = [noise_image(100, 140), noise_image(24, 24), noise_image(40, 90, 1), None]
    questions = ["a?", "bb?", "ccc?", "d?"]
    batch = Batch(vlm, images, questions)
    reduced = prepare(batch, "native")
    prompts = [shipped.prompt(q, image is not None) for q, image in zip(questions, images)]
    inputs = shipped.inputs(images, prompts)
    assert (logits(vlm.model, reduced) - logits(shipped.model, inputs)).abs().max() == 0.0
    assert reduced["inputs_embeds"].shape[1] == inputs["input_ids"].shape[1] < batch.seeing.input_ids.shape[1]
    counts = [
        count_tokens(vlm.model, image.height, image.width, NATIVE)[1:] if image else (0, 0)
        for image in images
    ]
    assert list(zip(reduced.n_visual.tolist(), reduced.n_newline.tolist())) == counts
    full = prepare(batch, "full")
    assert reduced.n_visual[0] < full.n_visual[0] == reduced.n_visual_full[0]
    assert reduced.n_visual[1] == full.n_visual[1]  # small enough to be left alone


def test_the_ratio_is_of_sides_and_squares_in_tokens(vlm):
    height, width = 140, 140
    _, full, rows = count_tokens(vlm.model, height, width)
    _, few, few_rows = count_tokens(vlm.model, height, width, "anyres_max_9")
    ratio = sqrt((full - 36) / (9 * 36))  # the model's rule; the thumbnail is not compressed
    assert ratio == 2.0 and rows / few_rows == ratio and (full - 36) / (few - 36) == ratio**2


def test_scorers_choose_and_those_without_a_signal_refuse(vlm):
    inputs = ask(vlm, [0, 3])
    for name in ("random", "uniform", "norm", "diversity", "selector"):
        scorer = make_scorer(name, selector=tiny_selector())
        reduced = reduce_inputs(vlm.model, inputs, scorer, 0.3)
        assert reduced.n_visual.tolist() == [round(0.3 * n) for n in reduced.n_visual_full.tolist()]
        assert len(vlm.generate(reduced, 4)) == 2
    with pytest.raises(TokenselError, match="no CLS attention"):
        reduce_inputs(vlm.model, inputs, make_scorer("cls"), 0.3)
    with pytest.raises(TokenselError, match="has no compression of its own"):
        other = tiny_vlm()
        prepare(Batch(other, [None], ["?"]), "native")


def test_the_runner_asks_it_in_every_way(folder, tmp_path):
    TokenSelector(SelectorConfig(width=WIDTH, layers=1, heads=2)).save_pretrained(tmp_path / "selector")
    config = dict(
        model=str(folder),
        suite="suite_tiny",
        benchmarks=("page",),
        n=3,
        batch_size=2,
        out=str(tmp_path / "out"),
        selector=str(tmp_path / "selector"),
        compare=("selector:native",),
    )
    methods = ("full", "native", "none", "random", "selector", "downsample")
    done = evaluate(EvalConfig(**config, methods=methods), progress=False)
    rows = list(csv.DictReader(done.table.read_text().splitlines()))
    # without --keeps those of the paper for this model
    assert [row["keep"] for row in rows if row["method"] == "random"] == [
        "0.1",
        "0.2",
        "0.3",
        "0.4",
        "0.5",
        "0.6",
    ]
    assert [row["keep"] for row in rows if row["method"] == "native"] == ["1"]
    against = list(csv.DictReader(done.differences.read_text().splitlines()))
    assert [row["keep"] for row in against] == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6"]
    with pytest.raises(TokenselError, match=r"method cls: .* has no CLS token"):
        evaluate(EvalConfig(**(config | {"compare": ()}), methods=("cls",)), progress=False)
    next_model = suite_tiny.save_models(tmp_path)
    with pytest.raises(TokenselError, match=r"method native: .* has no compression of its own"):
        other = config | {"model": str(next_model), "compare": ()}
        evaluate(EvalConfig(**other, methods=("native",)), progress=False)
