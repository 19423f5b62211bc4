"""Fine-tuning with dropped tokens: what is trained, what a kill changes, and what stock code loads."""

import sys
from dataclasses import replace

import peft
import pytest
import torch
from tiny import onevision_processor, tiny_onevision, tiny_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokensel.schedules.decoder import decoder_of
from tokensel.training import finetune as training
from tokensel.training.finetune import FinetuneConfig, TrainedWeights, finetune, save_vlm, step_keep
from tokensel.utils.errors import MissingPackageError, TokenselError
from tokensel.vlm import Vlm, load_vlm
from tokensel.vlm.native import OFF, switch_off


@pytest.fixture
def config(model, tmp_path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model),
        selector=str(model.parent / "selector"),
        out=str(tmp_path / "out"),
        suite="suite_tiny",
        benchmarks=("page", "list"),
        n=6,
        keep=0.2,
        keep_most=0.7,
        steps=6,
        batch_size=3,
        lr=1e-3,
        save_every=2,
        progress=False,
        device="cpu",
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_no_step_changes_nothing_and_stock_code_loads_it(config, model, tmp_path):
    _, history = finetune(replace(config, keep=1.0, keep_most=None, selector=None, steps=0))
    folder = tmp_path / "out" / "model"
    saved = AutoModelForImageTextToText.from_pretrained(folder)
    assert not history and not moved(weights(load_vlm(model, "cpu").model), saved)
    stock, here = AutoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(model)
    assert stock.chat_template == here.chat_template
    assert stock.tokenizer.get_vocab() == here.tokenizer.get_vocab()


def test_the_layers_of_the_language_model_are_trained_and_nothing_else(config):
    vlm = tiny_vlm()
    before = weights(vlm.model)
    finetune(replace(config, out="", steps=2), vlm)
    inside = {name for name in decoder_of(vlm.model).state_dict() if "embed" not in name}
    assert moved(before, vlm.model) == {f"model.language_model.{name}" for name in inside}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_lora_trains_its_own_matrices_and_adds_them_at_the_end(config, tmp_path, monkeypatch):
    vlm, seen = tiny_vlm(), {}
    before = weights(vlm.model)

    class Watched(TrainedWeights):
        def __init__(self, model):
            super().__init__(model)
            seen["names"] = [name for name, _ in self.named_parameters()]

    monkeypatch.setattr(training, "TrainedWeights", Watched)
    finetune(replace(config, lora=2), vlm)
    assert seen["names"] and all("lora_" in name for name in seen["names"])
    changed = moved(before, vlm.model)
    assert changed and all("language_model.layers" in name and "norm" not in name for name in changed)
    # the adapter beside it is the same change of the same model
    stock = peft.PeftModel.from_pretrained(tiny_vlm().model, tmp_path / "out" / "adapter").merge_and_unload()
    assert all(torch.allclose(value, stock.state_dict()[name]) for name, value in weights(vlm.model).items())


@pytest.mark.parametrize("lora", [None, 2])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(lora, config, tmp_path, monkeypatch):
    config = replace(config, lora=lora)
    whole, history = finetune(config)
    draw, other = training.draw_questions, replace(config, out=str(tmp_path / "other"))

    def stop(vlm, data, config, step):
        if step == 3:
            raise KeyboardInterrupt
        return draw(vlm, data, config, step)

    monkeypatch.setattr(training, "draw_questions", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(other)
    assert not (tmp_path / "other" / "model").exists()
    monkeypatch.undo()
    again, continued = finetune(other)
    assert continued == history and [record["step"] for record in history] == list(range(1, 7))
    assert not moved(weights(whole.model), again.model)
    assert not moved(weights(whole.model), load_vlm(tmp_path / "other" / "model", "cpu").model)
    finetune(other)  # what has ended is written once more, the same
    assert not moved(weights(whole.model), load_vlm(tmp_path / "other" / "model", "cpu").model)
    with pytest.raises(TokenselError, match=r"was trained with keep 0\.2, not 0\.3"):
        finetune(replace(other, keep=0.3))


def test_the_loss_falls(config):
    _, history = finetune(replace(config, out="", benchmarks=("choice",), steps=30, lr=3e-3))
    first, last = (sum(record["loss"] for record in part) / 5 for part in (history[:5], history[-5:]))
    assert last < 0.5 * first


def test_the_fraction_kept_is_drawn_and_sometimes_one(config):
    keeps = [step_keep(step, config) for step in range(400)]
    drawn = [keep for keep in keeps if keep < 1]
    assert 0.2 <= min(drawn) < 0.25 and 0.65 < max(drawn) <= 0.7
    assert len(drawn) == pytest.approx(300, abs=35)
    assert {step_keep(step, replace(config, whole=1.0)) for step in range(50)} == {1.0}
    assert {step_keep(step, replace(config, whole=0.0, keep_most=None)) for step in range(50)} == {0.2}


def test_the_models_own_interpolation_is_on_again_in_what_is_saved(tmp_path):
    model, processor = tiny_onevision("anyres_max_2"), onevision_processor(ratio="anyres_max_2")
    vlm = Vlm(model, processor, "tiny", switch_off(model, processor))
    save_vlm(vlm, tmp_path / "model")
    assert model.config.vision_aspect_ratio == processor.vision_aspect_ratio == OFF
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert saved.config.vision_aspect_ratio == "anyres_max_2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_lora_without_peft_is_one_line(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokensel\[lora\]'"):
        finetune(replace(config, lora=2))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"keep_most": 0.1}, "give a fraction above keep = 0.2"),
        ({"selector": None}, "there is no selector: give --selector"),
        ({"lora": 0}, "at least 1"),
        ({"whole": 1.5}, "between 0 and 1"),
        ({"steps": -1}, "at least 0"),
    ],
)
def test_bad_choices_are_one_line(changed, line, config):
    with pytest.raises(TokenselError, match=line):
        replace(config, **changed)


def test_learning_rates_differ_by_what_is_trained(config):
    assert replace(config, lr=None).lr == 2e-5 and replace(config, lr=None, lora=4).lr == 2e-4
