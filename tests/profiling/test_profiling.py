"""Measuring: what is timed, what the report says, and that rounds survive a kill."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_selector, tiny_vlm
from transformers import LlavaNextForConditionalGeneration
from typer.testing import CliRunner

from tokensel import cli
from tokensel.cost import count_answer
from tokensel.methods import methods as all_methods
from tokensel.profiling import inference, training
from tokensel.profiling.config import CostConfig, image_size
from tokensel.profiling.shapes import SHAPES
from tokensel.profiling.timing import PHASES, time_answer
from tokensel.profiling.workload import MeasuredModel, Variant, make_inputs, schedule_of, variants
from tokensel.schedules import pruned
from tokensel.utils.errors import TokenselError
from tokensel.vlm import encode

SIZE = "40x48"


@pytest.fixture(scope="module")
def model():
    return tiny_vlm().model


@pytest.fixture
def config(tmp_path):
    tiny_selector().save_pretrained(tmp_path / "selector")
    return CostConfig(
        model="tiny",
        selector=str(tmp_path / "selector"),
        methods=("selector", "fastv"),
        keeps=(0.3,),
        images=(SIZE,),
        text=7,
        new_tokens=3,
        warmup=0,
        schedule_layer=1,
        out=str(tmp_path / "out"),
    )


def report(path) -> dict:
    return json.loads(path.read_text())


def test_every_method_is_timed_part_by_part(model, config):
    methods = [name for name in all_methods() if name != "native"]
    config = replace(config, methods=(*methods, "fastv", "vtw", "selector+fastv"))
    measured = MeasuredModel.of(config, model)
    inputs = make_inputs(model, SIZE, 2, config.text)
    full = int(encode(model, inputs).n_visual[0])
    for variant in variants(config):
        times = time_answer(measured, variant, inputs)
        assert 0 < times["first_token"] < times["answer"] and times["further_token"] > 0
        assert tuple(times["phases"]) == PHASES
        assert sum(times["phases"].values()) == pytest.approx(times["first_token"])
        assert times["phases"]["prefill"] > 0 and min(times["phases"].values()) >= 0
        assert (times["phases"]["encoder"] > 0) == (variant.method != "none")
        if variant.method in (
            "selector",
            "selector+fastv",
            "random",
            "norm",
            "cls",
            "uniform",
            "diversity",
            "dart",
            "hired",
            "apet",
            "visionzip",
            "cdpruner",
            "scope",
            "diffprune",
            "visionselector",
        ):
            assert times["phases"]["selector"] > 0 and times["n_visual"] == round(0.3 * full)
            assert times["length"] == inputs["input_ids"].shape[1] - full + times["n_visual"]
    assert variants(config)[0] == Variant("full", 1.0) and Variant("vtw", 1.0) in variants(config)


def test_full_is_the_stock_model_on_the_stock_inputs(model, config, monkeypatch):
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given) or generate(**given))
    inputs = make_inputs(model, SIZE, 1, config.text)
    measured, hooks = MeasuredModel.of(config, model), []
    for method in ("full", "selector"):
        time_answer(measured, Variant(method, 0.3), inputs)
        hooks.append(
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        )
    assert seen[0].keys() >= inputs.keys() and "inputs_embeds" not in seen[0]
    assert "inputs_embeds" in seen[1] and "pixel_values" not in seen[1]
    assert hooks[0] == hooks[1], "hooks of ours were left behind"


def test_the_report_holds_ratios_within_rounds_and_of_the_ideal(model, config):
    found = report(
        inference.measure_inference(replace(config, batch_sizes=(1, 2)), progress=False, model=model)
    )
    rows = found["rows"]
    assert [(row["rows"], row["method"], row["keep"]) for row in rows] == [
        (size, method, keep)
        for size in (1, 2)
        for method, keep in (("full", 1.0), ("selector", 0.3), ("fastv", 0.3))
    ]
    for row in rows:
        first = row["first_token"]
        assert row["repetitions"] == 10 and first["low"] <= first["median"] <= first["high"]
        assert first["of_ideal"] == pytest.approx(first["speedup"]["median"] / first["ideal"])
        assert row["flops"]["total"] == sum(
            row["flops"][part] for part in ("encoder", "selector", "projector", "prefill")
        )
    one, two = rows[:3], rows[3:]
    assert one[0]["first_token"]["speedup"]["median"] == one[0]["first_token"]["ideal"] == 1.0
    assert one[1]["first_token"]["ideal"] == one[0]["flops"]["total"] / one[1]["flops"]["total"]
    assert one[1]["further_token"]["ideal"] > 1 and one[1]["choosing_of_full"]["median"] > 0
    assert two[1]["flops"]["total"] == 2 * one[1]["flops"]["total"]
    assert (
        "ideal" in found
        and found["machine"]["threads"] == torch.get_num_threads()
        and found["config"]["seed"] == 0
    )
    assert "its own" in found["weights"] and found["sittings"] == 1
    assert len(list(inference.inference_lines(found))) == 1 + len(rows)


@pytest.mark.parametrize("method", ["fastv", "vtw", "random+fastv", "downsample+fastv", "downsample+vtw"])
def test_flops_of_a_prefill_are_those_of_the_tokens_that_each_layer_held(model, config, method):
    config = replace(config, methods=(method,))
    measured, variant = MeasuredModel.of(config, model), variants(config)[1]
    inputs = make_inputs(model, SIZE, 2, config.text)
    encoded = encode(model, inputs)
    prepared = measured.prepare(variant, inputs, measured.scorers.get(method.partition("+")[0]))
    with pruned(model, prepared.prompt, schedule_of(variant, config)) as pruning:
        model.generate(**prepared, max_new_tokens=1, do_sample=False)
    held = torch.stack(pruning.left)[:, :, 0].numpy()  # newlines included, of one row
    right = 2 * count_answer(model.config.text_config, config.text, held)
    length, cells = prepared["attention_mask"].shape[1], int(prepared.n_visual[0])
    assert inference.counted(config, measured, variant, encoded, length, cells).prefill == right


def test_killed_it_goes_on_with_the_rounds_that_are_missing(model, config, monkeypatch):
    calls = []

    def die(*args):
        calls.append(args)
        if len(calls) == 3 * 4 + 2:  # in the middle of the fifth round
            raise KeyboardInterrupt
        return time_answer(*args)

    monkeypatch.setattr(inference, "time_answer", die)
    with pytest.raises(KeyboardInterrupt):
        inference.measure_inference(config, progress=False, model=model)
    path = inference.measure_inference(config, progress=False, model=model)
    assert len(calls) == 3 * 4 + 2 + 3 * 6 and report(path)["sittings"] == 2
    inference.measure_inference(config, progress=False, model=model)
    assert len(calls) == 3 * 4 + 2 + 3 * 6, "nothing was missing"
    inference.measure_inference(replace(config, repetitions=11), progress=False, model=model)
    assert len(calls) == 3 * 4 + 2 + 3 * 7, "one more round"
    inference.measure_inference(replace(config, text=8), progress=False, model=model)
    assert len(calls) == 3 * 4 + 2 + 3 * 17, "another measurement has rounds of its own"


def test_orders_move_on_from_round_to_round(model, config, monkeypatch):
    order = []

    def record(measured, variant, inputs):
        order.append(variant.method)
        return time_answer(measured, variant, inputs)

    monkeypatch.setattr(inference, "time_answer", record)
    inference.measure_inference(config, progress=False, model=model)
    assert order[:9] == [
        "full",
        "selector",
        "fastv",
        "selector",
        "fastv",
        "full",
        "fastv",
        "full",
        "selector",
    ]


def test_training_beside_the_machines_products(model, config):
    found = report(
        training.measure_training(
            replace(config, batch_sizes=(2,), selector_layers=1), progress=False, model=model
        )
    )
    (row,) = found["rows"]
    assert row["repetitions"] == 10 and row["ceiling_flops_per_second"]["median"] > 0
    for source in ("features", "images"):
        part = row[source]
        assert part["hours_for_100k_images"] == pytest.approx(
            1e5 / part["images_per_second"]["median"] / 3600
        )
        assert part["of_ceiling"]["median"] > 0
    assert row["images"]["images_per_second"]["median"] < row["features"]["images_per_second"]["median"]
    assert row["peak_bytes"] > 0 or not Path("/proc/self/clear_refs").exists()
    assert len(list(training.training_lines(found))) == 3


def test_the_command_measures_a_configuration_at_random_weights(tmp_path):
    arguments = [
        "cost",
        "--model",
        "data/mini/llava-next",
        "--random-weights",
        "--selector-layers",
        "1",
        "--keeps",
        "0.2",
    ]
    arguments += ["--images", "64x64", "--text", "9", "--new-tokens", "2", "--warmup", "0", "--no-progress"]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = report(tmp_path / "cost.json")
    assert found["weights"].startswith("random") and "1 x Transformer layer" in found["selector"]
    assert [row["method"] for row in found["rows"]] == ["full", "selector"]
    assert done.output.splitlines()[-1] == str(tmp_path / "cost.json") and "selector  0.2" in done.output


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_llava_next_with_their_true_token_counts(name):
    config = SHAPES[name]()
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    assert sum(p.numel() for p in model.model.language_model.layers.parameters()) >= 3e8
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) == pytest.approx(303.5e6, rel=0.01)
    inputs = make_inputs(model, "480x640", 1, 60)
    assert inputs["input_ids"].shape == (1, 576 + 36 * 49 + 60)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"repetitions": 9}, "repetitions is 9: give a whole number of at least 10"),
        ({"new_tokens": 1}, "new_tokens is 1: give a whole number of at least 2"),
        ({"methods": ("selectr",)}, "method 'selectr' is unknown"),
        ({"methods": ("native",)}, "method 'native' is not measured"),
        ({"keeps": (0.0,)}, "keep is 0.0"),
        ({"images": ("480",)}, "image size is '480': give HEIGHTxWIDTH"),
        ({"batch_sizes": (0,)}, "batch_size is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_bad_choices_are_told_before_anything_is_loaded(config, change, told):
    with pytest.raises(TokenselError, match=told):
        replace(config, **change)


def test_a_model_that_is_not_there_and_a_precision_that_does_not_train(model, config):
    with pytest.raises(TokenselError, match="nowhere"):
        MeasuredModel.of(replace(config, model="nowhere/at-all", random_weights=True))
    with pytest.raises(TokenselError, match="trains in float32 or bfloat16"):
        training.measure_training(replace(config, dtype="float16"), progress=False, model=model)
    assert image_size("1700x2200") == (1700, 2200)


def test_threads_are_as_before_after_a_measurement(model, config, monkeypatch):
    before, seen = torch.get_num_threads(), []

    def measured(*_):
        seen.append(torch.get_num_threads())
        return Path("report.json")

    monkeypatch.setattr(inference, "_measure", measured)
    monkeypatch.setattr(training, "_measure", measured)
    wanted = 2 if before == 1 else 1
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for run in (inference.measure_inference, training.measure_training):
        run(replace(config, threads=wanted), progress=False, model=model)
    assert seen == [wanted, wanted] and torch.get_num_threads() == before
