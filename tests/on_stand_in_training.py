"""Training, judging and measuring on a device of its own: the same weights and errors as on the host."""

import json
from dataclasses import replace

import pytest
import suite_tiny
import torch
from little import clip_tower, random_features, save_images, small_config, weights
from stand_in import NAME, stand_in

from tokensel.budget import top_fraction
from tokensel.data.encoders import VisionEncoder
from tokensel.model.gates import GATES
from tokensel.profiling.config import CostConfig
from tokensel.profiling.inference import measure_inference
from tokensel.profiling.training import measure_training
from tokensel.scorers import make_scorer
from tokensel.training.answers import train_answers
from tokensel.training.autoencoder import MaskedAutoencoder, Statistics
from tokensel.training.config import AnswersConfig, DyRateConfig
from tokensel.training.dyrate import train_dyrate
from tokensel.training.finetune import FinetuneConfig, finetune
from tokensel.training.judge import policy_scores, reconstruction_error, train_reconstructor
from tokensel.training.processes import launched_processes
from tokensel.training.train import train


@pytest.fixture
def device():
    with stand_in() as device:
        yield device


def close(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> bool:
    """Whether two trainings ended at the same weights, up to rounding."""
    return all(torch.allclose(there[name].cpu(), here[name], rtol=1e-3, atol=1e-4) for name in there | here)


def test_training_on_features_resumes_on_the_device(device, tmp_path):
    with launched_processes() as processes:
        assert processes.device.type == NAME
    features = random_features()
    here = train(small_config(device="cpu"), features=features)
    options = {"device": "auto", "out": str(tmp_path), "save_every": 2}
    there = train(small_config(**options), features=features)
    assert close(weights(there), weights(here))
    assert all(weight.device.type == "cpu" for weight in weights(there).values())
    again = train(
        small_config(**options), features=features
    )  # reads the last checkpoint, and has no step left
    assert all(torch.equal(weights(again)[name], weight) for name, weight in weights(there).items())


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains_on_the_device(device, gate):
    features = random_features()
    config = small_config(steps=2, gate=gate, device="cpu", p_most=None if gate == "gumbel" else 0.6)
    here, there = (train(replace(config, device=where), features=features) for where in ("cpu", "auto"))
    assert close(weights(there), weights(here))


@pytest.mark.parametrize("name", ["features", "whitened", "token", "keys-values", "reader"])
def test_every_kind_of_metric_measures_on_the_device(device, tmp_path, name):
    options = {"images": save_images(tmp_path / "images"), "encoder": suite_tiny.save_models(tmp_path)}
    config = small_config(**{k: str(v) for k, v in options.items()}, metric=name, metric_images=2, steps=2)
    here, there = (train(replace(config, device=where)) for where in ("cpu", "auto"))
    assert close(weights(there), weights(here))


@pytest.mark.parametrize("cache", [False, True])
def test_training_on_images_encodes_them_on_the_device(device, tmp_path, cache):
    clip_tower(tmp_path / "tower")
    images = save_images(tmp_path / "images")
    results = []
    for where in ("cpu", device):
        encoder = VisionEncoder.from_pretrained(tmp_path / "tower", where)
        stored = str(tmp_path / str(where)) if cache else ""
        config = small_config(device="cpu" if where == "cpu" else "auto", steps=3, cache=stored)
        results.append(train(config, images=images, encoder=encoder))
    assert close(weights(results[1]), weights(results[0]))


def test_judges_are_trained_where_the_features_are(device):
    features, config = random_features(), small_config(steps=3)
    features.valid = torch.rand(features.tokens.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.9
    policy, errors = make_scorer("random", seed=1), []
    for part in (features, features.to(device)):
        masks = top_fraction(policy_scores(part, policy, batch_size=16), 0.5, part.valid)
        first = train_reconstructor(part, masks, config)
        judge = train_reconstructor(part, masks, config, initial=first)
        errors.append(reconstruction_error(judge, part, masks))
        assert errors[-1].device == masks.device == part.tokens.device
    assert torch.allclose(errors[1].cpu(), errors[0], rtol=1e-3)
    statistics = [Statistics.of([part]) for part in (features, features.to(device))]
    assert statistics[1].mean.device.type == "cpu" and statistics[1].scale == statistics[0].scale
    trained = train(small_config(steps=2, device="cpu"), features=features)
    joint = MaskedAutoencoder.of(trained.selector.to(device), trained.reconstructor.to(device))
    assert reconstruction_error(joint, part, masks).device.type == NAME


@pytest.mark.parametrize("gradient", ["all-rates", "straight-through"])
def test_dyrates_training(device, gradient, tmp_path):
    config = DyRateConfig(
        model=str(suite_tiny.save_models(tmp_path)),
        out=str(tmp_path / "cpu"),
        suite="suite_tiny",
        benchmarks=("choice",),
        n=2,
        layer=1,
        rates=4,
        gradient=gradient,
        steps=2,
        batch_size=2,
        save_every=1,
        progress=False,
    )
    here, _ = train_dyrate(replace(config, device="cpu"))
    there, history = train_dyrate(replace(config, device=NAME, out=str(tmp_path / NAME)))
    assert close(there.state_dict(), here.state_dict()) and len(history) == 2
    assert (tmp_path / NAME / "dyrate").is_dir()


def test_finetuning(device, tmp_path):
    model = suite_tiny.save_models(tmp_path)
    config = FinetuneConfig(
        model=str(model),
        selector=str(tmp_path / "selector"),
        out=str(tmp_path / "cpu"),
        suite="suite_tiny",
        benchmarks=("choice",),
        n=2,
        keep=0.3,
        keep_most=0.6,
        steps=2,
        batch_size=2,
        save_every=1,
        progress=False,
    )
    here, _ = finetune(replace(config, device="cpu"))
    there, history = finetune(replace(config, device=NAME, out=str(tmp_path / NAME)))
    assert len(history) == 2 and there.model.device.type == NAME
    assert all(
        torch.allclose(there.model.state_dict()[name].cpu(), value, atol=1e-4)
        for name, value in here.model.state_dict().items()
    )
    assert (tmp_path / NAME / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("scorer", ["diffprune", "visionselector"])
def test_training_by_answers(device, scorer, tmp_path):
    config = AnswersConfig(
        model=str(suite_tiny.save_models(tmp_path)),
        scorer=scorer,
        out=str(tmp_path / "cpu"),
        suite="suite_tiny",
        benchmarks=("choice",),
        n=2,
        steps=2,
        batch_size=2,
        save_every=1,
        progress=False,
    )
    here, _ = train_answers(replace(config, device="cpu"))
    there, history = train_answers(replace(config, device=NAME, out=str(tmp_path / NAME)))
    assert len(history) == 2 and here.state_dict().keys() == there.state_dict().keys()
    assert all(torch.allclose(there.state_dict()[k], v, atol=1e-4) for k, v in here.state_dict().items())


def test_measurements_of_answers_and_of_training(device, tmp_path):
    config = CostConfig(
        model=str(suite_tiny.save_models(tmp_path)),
        selector=str(tmp_path / "selector"),
        methods=("selector+fastv",),
        keeps=(0.3,),
        images=("24x24",),
        text=4,
        new_tokens=2,
        warmup=0,
        schedule_layer=1,
        device=NAME,
        out=str(tmp_path),
    )
    report = json.loads(measure_inference(config, progress=False).read_text())
    assert report["machine"]["device"] and len(report["rows"]) == 2
    assert all(row["first_token"]["median"] > 0 for row in report["rows"])
    training = replace(config, name="training", selector=None, selector_layers=1, batch_sizes=(2,))
    report = json.loads(measure_training(training, progress=False).read_text())
    assert report["rows"][0]["images"]["images_per_second"]["median"] > 0
