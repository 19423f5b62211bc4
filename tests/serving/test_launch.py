"""The command that starts a server: the arguments of vLLM, the line at start, and refusals in one line."""

import json
import sys

import pytest
import suite_tiny
import tiny_families

from tokensel.scorers import make_scorer
from tokensel.serving import launch
from tokensel.serving.config import ServeConfig
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm, reduce_inputs


@pytest.fixture
def launched(monkeypatch):
    """Refuse to start anything; returns the command lines of what would have been started."""
    started = []
    monkeypatch.setattr(launch, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(launch.os, "execv", lambda path, arguments: started.append(arguments))
    return started


def served(model, **options) -> ServeConfig:
    return ServeConfig(str(model), selector=str(model.parent / "selector"), **options)


def test_the_engine_gets_what_to_keep_and_all_that_is_its_own(model, launched):
    config = served(model, keep=0.3, newline="drop")
    launch.serve(config, ["--port", "8000", "--trust-request-mm-kwargs"])
    (arguments,) = launched
    assert arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert arguments[3:5] == ["--model", str(model)]
    assert arguments[-3:] == ["--port", "8000", "--trust-request-mm-kwargs"]
    overrides = json.loads(arguments[arguments.index("--hf-overrides") + 1])
    assert overrides["architectures"] == ["TokenselLlavaNext"]
    assert ServeConfig(**overrides["tokensel"]) == config


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_the_line_at_start_counts_the_tokens_of_the_adapter(model, launched, capsys, keep):
    config = served(model, keep=keep)
    launch.serve(config)
    vlm = load_vlm(model)
    inputs = vlm.inputs([suite_tiny.PilImage.new("RGB", (640, 480))], [vlm.prompt("what?")])
    full, kept = (
        int(reduce_inputs(vlm.model, inputs, launch.served_scorer(vlm.model.config, config), k).visual.sum())
        for k in (1.0, keep)
    )
    line = capsys.readouterr().out
    assert f"640 x 480 pixels has {kept} tokens at keep {keep:g} (selector), {full} at keep 1" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("option", ["--model", "--hf-overrides={}", "--revision"])
def test_options_that_the_command_sets_are_refused(model, launched, option):
    with pytest.raises(TokenselError, match="is set by tokensel serve: leave it out"):
        launch.serve(served(model), [option, "x"])
    assert not launched


def test_without_vllm_one_line_says_how_to_install_it(model, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(TokenselError, match="pip install 'tokensel\\[vllm\\]'"):
        launch.serve(served(model))


def test_a_model_or_a_selector_that_does_not_fit_is_one_line(model, launched, tmp_path):
    with pytest.raises(TokenselError, match="holds no model"):
        launch.serve(ServeConfig(str(tmp_path)))
    with pytest.raises(TokenselError, match="needs one: pass selector="):
        launch.serve(ServeConfig(str(model)))
    other = tiny_families.loaded("qwen3_vl", tmp_path)
    with pytest.raises(TokenselError, match="which is not served yet: give one of llava_next"):
        launch.serve(ServeConfig(other.name, scorer="norm"))
    assert not launched


@pytest.mark.parametrize("cpu", [False, True])
def test_a_model_with_places_has_the_engine_ask_for_them(launched, tmp_path, monkeypatch, capsys, cpu):
    vlm = tiny_families.loaded("qwen2_5_vl", tmp_path)
    monkeypatch.setattr(launch, "_on_cpu", lambda: cpu)
    launch.serve(ServeConfig(str(tmp_path), scorer="norm", keep=0.3))
    (arguments,) = launched
    assert float(arguments[arguments.index("--video-pruning-rate") + 1]) > 0
    assert ("--worker-cls" in arguments) == cpu
    inputs = vlm.inputs([suite_tiny.PilImage.new("RGB", (640, 480))], [vlm.prompt("what?")])
    kept, full = (
        int(reduce_inputs(vlm.model, inputs, make_scorer("norm"), keep).visual.sum()) for keep in (0.3, 1.0)
    )
    assert f"has {kept} tokens at keep 0.3 (norm), {full} at keep 1" in capsys.readouterr().out
    with pytest.raises(TokenselError, match="--video-pruning-rate is set by tokensel serve"):
        launch.serve(ServeConfig(str(tmp_path), scorer="norm"), ["--video_pruning_rate=0.1"])
