"""What the doctor says of each family is what happens there."""

import re
import sys

import pytest
import tiny_families
from PIL import Image
from reference import vlm_of
from tiny import noise_image

from tokensel import cli
from tokensel.doctor import examine
from tokensel.methods import methods
from tokensel.schedules import SCHEDULES
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, reduce_inputs


@pytest.fixture(scope="module", params=["llava_next", *tiny_families.MAKERS])
def vlm(request, tmp_path_factory) -> Vlm:
    if request.param == "llava_next":
        return vlm_of("llama")
    return tiny_families.loaded(request.param, tmp_path_factory.mktemp(request.param))


def test_every_method_and_schedule_has_a_verdict(vlm):
    lines = examine(vlm, noise_image(40, 48), 0.5)
    assert not [line for line in lines if "\n" in line or "  " in line.strip()]
    fit = [name for line in lines if line.startswith("fit ") for name in line.split(": ")[1].split(", ")]
    fit = [name.split(" (")[0] for name in fit if name != "nothing"]
    refused = [line.split("not ")[1].split(":")[0] for line in lines if line.startswith("  not ")]
    assert sorted(fit + refused) == sorted([*methods(), *SCHEDULES])
    both_ways = vlm.model.config.model_type in ("gemma3", "paligemma")
    assert set(SCHEDULES) & set(fit) == (set() if both_ways else {*SCHEDULES})
    assert any(line.startswith("sliding window: 512") for line in lines) == both_ways
    assert {"full", "random", "uniform", "norm", "diversity"} <= set(fit)
    assert ("none" in fit) == (vlm.model.config.model_type != "paligemma")  # which reads no text alone


def test_the_counts_are_those_of_the_reduced_prompt(vlm):
    lines = examine(vlm, noise_image(40, 48), 0.5)
    inputs = vlm.inputs([noise_image(40, 48)], [vlm.prompt("What is in the image?")])
    (whole,) = [line for line in lines if line.startswith("keep 1:")]
    numbers = [int(number) for number in re.findall(r"\d+", whole)]
    full = reduce_inputs(vlm.model, inputs)
    assert numbers[1] == int(full.n_visual) and numbers[-1] == inputs["input_ids"].shape[1]
    (half,) = [line for line in lines if line.startswith("keep 0.5:")]
    assert f" {round(numbers[1] / 2)} visual" in half or f" {numbers[1] // 2} visual" in half
    axes = full.get("position_ids")
    assert ("M-RoPE" in " ".join(lines)) == (axes is not None)


def test_a_drawn_image_and_what_is_no_fraction(vlm):
    assert "640 x 480 pixels (drawn)" in " ".join(examine(vlm))
    with pytest.raises(TokenselError, match="keep is 0"):
        examine(vlm, Image.new("RGB", (32, 32)), 0.0)


def test_the_command_prints_the_lines(tmp_path, capsys, monkeypatch):
    tiny_families.save("qwen2_5_vl", tmp_path / "model")
    noise_image(40, 48).save(tmp_path / "image.png")
    words = ["doctor", "--model", str(tmp_path / "model"), "--image", str(tmp_path / "image.png")]
    monkeypatch.setattr(sys, "argv", ["tokensel", *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().out
    assert not end.value.code and "qwen2_5_vl" in printed and "fit inside the language model" in printed
