"""The command that times answers, with models of other families than LLaVA-NeXT and LLaVA-OneVision."""

import json

import pytest
import tiny_families
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tokensel import cli
from tokensel.profiling import inference
from tokensel.profiling.config import CostConfig
from tokensel.profiling.timing import time_answer
from tokensel.profiling.workload import MeasuredModel, Variant, variants
from tokensel.utils.errors import TokenselError
from tokensel.vlm import encode, reduce

# no schedule runs inside some of them, and PaliGemma reads no text alone
UNFIT = {"gemma3": {"fastv"}, "paligemma": {"fastv", "none"}}


@pytest.fixture(scope="module", params=tiny_families.MAKERS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("cost") / request.param
    tiny_families.save(request.param, path)
    return path


def config_of(folder, **changes) -> CostConfig:
    unfit = UNFIT.get(folder.name, set())
    methods = tuple(method for method in ("selector", "norm", "fastv", "none") if method not in unfit)
    given = dict(model=str(folder), methods=methods, keeps=(0.3,), images=("48x40",), text=60, new_tokens=2)
    if folder.name == "paligemma":
        given["attn"] = "eager"  # its language model, a Gemma 2, has no other
    return CostConfig(**given | dict(selector_layers=1, schedule_layer=1, device="cpu") | changes)


def test_every_variant_is_timed_and_counted(folder):
    config = config_of(folder)
    measured = MeasuredModel.of(config)
    inputs = measured.inputs("48x40", 2)
    encoded = encode(measured.model, inputs)
    text = inputs["input_ids"].shape[1] - int(encoded.n_visual[0])
    assert text >= config.text and encoded.n_visual[0] == encoded.n_visual[1]
    assert reduce(encoded)["attention_mask"].shape == inputs["input_ids"].shape
    totals = {}
    for variant in variants(config):
        times = time_answer(measured, variant, inputs)
        assert sum(times["phases"].values()) == pytest.approx(times["first_token"])
        assert min(times["phases"].values()) >= 0 and times["phases"]["prefill"] > 0
        assert (times["phases"]["encoder"] > 0) == (variant.method != "none")
        cost = inference.counted(config, measured, variant, encoded, times["length"], times["n_visual"])
        totals[variant.method] = cost.total
        if variant.method == "norm":
            assert times["n_visual"] == int(0.3 * int(encoded.n_visual[0]) + 0.5)
    assert totals["norm"] < totals["full"] and totals["norm"] < totals["selector"]
    one = measured.inputs("48x40", 1)
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        measured.model.generate(**one, max_new_tokens=1, do_sample=False)
    full, length = Variant("full", 1.0), one["input_ids"].shape[1]
    total = inference.counted(config, measured, full, encode(measured.model, one), length).total
    # the stock LLaVA-1.5 also runs the layer of its tower that nobody reads
    assert total == pytest.approx(counter.get_total_flops(), rel=0.25 if folder.name == "llava" else 0.02)


@pytest.mark.parametrize(("family", "random"), [("qwen2_5_vl", False), ("smolvlm", True)])
def test_the_command_writes_a_report(family, random, tmp_path):
    tiny_families.save(family, tmp_path / "model")
    words = ["cost", "--model", tmp_path / "model", "--out", tmp_path, "--methods", "norm", "--keeps", 0.3]
    words += ["--images", "48x40", "--new-tokens", 2, "--warmup", 0, "--device", "cpu", "--no-progress"]
    done = CliRunner().invoke(cli.app, [*map(str, words), *(["--random-weights"] if random else [])])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "cost.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["full", "norm"]
    assert report["rows"][1]["first_token"]["ideal"] > 1
    assert min(report["parameters"].values()) > 0


def test_what_it_cannot_measure_gets_one_line(tmp_path):
    tiny_families.save("qwen2_5_vl", tmp_path / "model")
    base = ["cost", "--model", str(tmp_path / "model"), "--out", str(tmp_path), "--no-progress"]
    for words, line in (
        (
            ["--training"],
            "is for LLaVA-NeXT and LLaVA-OneVision alone, and this is a qwen2_5_vl",
        ),
        (["--methods", "cls"], "no CLS"),
        (["--methods", "downsample"], "smaller size limit"),
        (["--methods", "diffprune"], "none is trained for a qwen2_5_vl"),
    ):
        done = CliRunner().invoke(cli.app, [*base, *words, "--device", "cpu"])
        assert isinstance(done.exception, TokenselError), done.output
        assert line in str(done.exception) and "\n" not in str(done.exception)
