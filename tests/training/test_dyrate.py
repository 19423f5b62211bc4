"""DyRate's training: the masks it learns on are what removal does, and no kill changes what comes out."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import dyrate, generated, prompt, vlm_of

from tokensel.schedules import RatePredictor
from tokensel.schedules.attention import TYPES
from tokensel.schedules.dyrate import RateConfig
from tokensel.training import dyrate as dyrate_training
from tokensel.training import frozen
from tokensel.training.dyrate import DyRateConfig, MaskedForward, attention_mask, train_dyrate
from tokensel.utils.errors import TokenselError
from tokensel.vlm.forced import IGNORED, answer_mass, force


@pytest.fixture
def config(model, tmp_path) -> DyRateConfig:
    return DyRateConfig(
        model=str(model),
        out=str(tmp_path / "out"),
        suite="suite_tiny",
        benchmarks=("page", "list"),
        n=6,
        layer=1,
        rates=4,
        steps=8,
        batch_size=3,
        save_every=2,
        progress=False,
    )


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_one_pass_over_a_known_answer_equals_writing_it_while_tokens_leave(text):
    vlm, schedule = vlm_of(text), dyrate()
    reduced = prompt(vlm, [0, 1, 3])
    out, pruning = generated(vlm, reduced, schedule)
    forced = force(vlm.model, reduced, out.sequences, torch.full((3,), out.sequences.shape[1]))
    with torch.no_grad():
        logits, kept = MaskedForward(vlm.model, schedule.predictor).logits(forced)
    assert torch.allclose(logits, torch.stack(out.logits, 1), atol=1e-4)
    left = torch.stack(pruning.cells)[:, 2].T / reduced.n_visual[:, None]
    assert torch.allclose(kept, left) and len(kept.unique()) > 5


def test_shorter_answers_end_earlier_and_change_nothing_else():
    vlm, schedule = vlm_of("llama"), dyrate()
    reduced, tokens = (
        prompt(vlm, [0, 1]),
        torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0)),
    )
    forward = MaskedForward(vlm.model, schedule.predictor)
    with torch.no_grad():
        whole, _ = forward.logits(force(vlm.model, reduced, tokens, torch.tensor([7, 7])))
        forced = force(vlm.model, reduced, tokens, torch.tensor([7, 4]))
        short, _ = forward.logits(forced)
    assert (forced.labels[1] == IGNORED).tolist() == [False] * 4 + [True] * 3
    assert torch.allclose(short[0], whole[0], atol=1e-5) and torch.allclose(
        short[1, :4], whole[1, :4], atol=1e-5
    )


def test_attention_by_type_is_that_of_the_model():
    vlm = vlm_of("llama", "eager")
    reduced, tokens = (
        prompt(vlm, [0, 1, 3]),
        torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(0)),
    )
    forced = force(vlm.model, reduced, tokens, torch.full((3,), 6))
    mass = answer_mass(vlm.model, forced)
    assert mass.shape == (4, 3, 6, 4, len(TYPES)) and torch.allclose(
        mass.sum(-1), torch.ones(4, 3, 6, 4), atol=1e-5
    )
    with torch.no_grad():
        whole = vlm.model.model.language_model(
            **forced.inputs, output_attentions=True, use_cache=False
        ).attentions
    for layer, attention in enumerate(whole):
        image = (attention[:, :, -6:, : reduced.visual.shape[1]] * reduced.visual[:, None, None]).sum(-1)
        assert torch.allclose(mass[layer, ..., TYPES.index("image")].transpose(1, 2), image, atol=1e-5)
    assert not bool(mass[:, :, 0, :, TYPES.index("response")].any())  # at first there is no answer to look at


def test_a_token_has_the_slope_of_what_its_going_would_change():
    vlm, schedule = vlm_of("llama"), dyrate()
    reduced, tokens = (
        prompt(vlm, [0]),
        torch.randint(5, 90, (1, 3), generator=torch.Generator().manual_seed(0)),
    )
    forced = force(vlm.model, reduced, tokens, torch.tensor([3]))
    masks = torch.ones(1, 3, reduced.visual.shape[1])
    column = int(reduced.visual[0].nonzero()[5])

    def last(mask):
        layers = vlm.model.model.language_model.layers
        hooks = [
            layer.register_forward_pre_hook(
                lambda _m, a, k: (a, k | {"attention_mask": mask}), with_kwargs=True
            )
            for layer in layers[schedule.predictor.config.layer :]
        ]
        states = vlm.model.model.language_model(**forced.inputs, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        return states[0, -1] @ torch.arange(states.shape[-1], dtype=torch.float)

    masks.requires_grad_()
    mask = attention_mask(masks, forced)
    last(mask).backward()
    lighter, step = mask.detach().clone(), 0.01  # in 32 bits a smaller one would measure rounding
    lighter[0, 0, -1, column] += math.log(1 - step)
    with torch.no_grad():
        difference = (last(mask.detach()) - last(lighter)) / step
    assert abs(float(difference)) > 1e-3
    assert float(masks.grad[0, 2, column]) == pytest.approx(float(difference), rel=0.05)


def test_the_mean_loss_of_a_predictor_that_is_sure_is_its_loss():
    """Where it always picks the same rate; of two rates, the lower one counts as soon as it was picked."""
    vlm, predictor = vlm_of("llama"), RatePredictor(RateConfig(heads=4, layer=1, rates=5))
    torch.nn.init.zeros_(predictor.linear.weight)
    tokens = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    forced = force(vlm.model, prompt(vlm, [0, 1]), tokens, torch.tensor([7, 4]))
    forward, silent = MaskedForward(vlm.model, predictor), torch.zeros(2, 7, 5)
    kept = []
    for rate in (1, 3):
        predictor.linear.bias.data = torch.where(torch.arange(5) == rate, 40.0, 0.0)
        with torch.no_grad():
            mean = forward.mean_loss(forced, 3.0)
            alone = forward.loss(forced, 3.0, 1.0, silent)
        assert torch.allclose(torch.stack(mean), torch.stack(alone), atol=1e-5)
        kept.append(mean[2])
    predictor.linear.bias.data = torch.tensor([-40.0, 0, -40, 0, -40])
    loss, _, fraction = forward.mean_loss(forced, 3.0)
    halves = [0.5**step for step in range(1, 8)]  # the chance of no lower pick so far
    high = (sum(halves) / 7 + sum(halves[:4]) / 4) / 2
    lower = predictor.keeps[[1, 3]].argmin()
    expected = kept[lower] + high * (kept[1 - lower] - kept[lower])
    assert fraction.item() == pytest.approx(expected.item(), abs=2e-3)
    loss.backward()
    assert torch.isfinite(predictor.linear.bias.grad).all() and predictor.linear.bias.grad.any()


@pytest.mark.parametrize("gradient", ["straight-through", "all-rates"])
def test_a_heavy_weight_on_compute_drops_tokens_and_none_keeps_them(config, gradient):
    kept, config = {}, replace(config, out="", steps=30, gradient=gradient)
    for weight in (0.0, 20.0):
        predictor, history = train_dyrate(replace(config, weight=weight))
        kept[weight] = sum(record["kept"] for record in history[-5:]) / 5
        assert predictor.config.kept == pytest.approx(sum(record["kept"] for record in history[27:]) / 3)
    assert 0.24 < kept[20.0] < 0.5 < kept[0.0]  # the lowest rate is a quarter, to the nearest token


@pytest.mark.parametrize("gradient", ["straight-through", "all-rates"])
def test_an_interrupted_training_ends_where_an_undisturbed_one_does(config, gradient, tmp_path, monkeypatch):
    config = replace(config, gradient=gradient)
    whole, history = train_dyrate(config)
    draw, other = dyrate_training.draw_questions, replace(config, out=str(tmp_path / "other"))

    def stop(vlm, data, config, step):
        if step == 5:
            raise KeyboardInterrupt
        return draw(vlm, data, config, step)

    monkeypatch.setattr(dyrate_training, "draw_questions", stop)
    with pytest.raises(KeyboardInterrupt):
        train_dyrate(other)
    monkeypatch.undo()
    again, continued = train_dyrate(other)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.parameters(), strict=True))
    assert continued == history and [record["step"] for record in history] == list(range(1, 9))
    assert json.loads((tmp_path / "other" / "history.jsonl").read_text().splitlines()[-1]) == history[-1]
    loaded = RatePredictor.from_pretrained(tmp_path / "other" / "dyrate")
    assert torch.equal(loaded.linear.weight, whole.linear.weight) and loaded.config.steps == 8
    with pytest.raises(TokenselError, match=r"was trained with weight 1\.0, not 0.2"):
        train_dyrate(replace(other, weight=0.2))
    with pytest.raises(TokenselError, match="was trained on"):
        train_dyrate(_with_other_model(other, tmp_path))


@pytest.mark.parametrize("changed", ["prompts", "answers"])
def test_as_many_other_questions_are_another_training(changed, config, monkeypatch):
    train_dyrate(replace(config, steps=2))
    load = frozen.load_questions

    def other(*args):
        questions = load(*args)
        return replace(questions, **{changed: getattr(questions, changed)[::-1]})

    monkeypatch.setattr(frozen, "load_questions", other)
    with pytest.raises(TokenselError, match="was trained on"):
        train_dyrate(replace(config, steps=2))


def _with_other_model(config: DyRateConfig, folder: Path) -> DyRateConfig:
    same = folder / "model"
    same.mkdir()
    for path in Path(config.model).iterdir():
        (same / path.name).write_bytes(path.read_bytes())
    card = json.loads((same / "generation_config.json").read_text())
    (same / "generation_config.json").write_text(json.dumps(card | {"max_length": 99}))
    return replace(config, model=str(same))


def test_sigkill_then_the_same_command_again(config, tmp_path):
    whole, _ = train_dyrate(config)
    out = tmp_path / "killed"
    options = {
        "model": config.model, "out": out, "suite": "suite_tiny", "benchmarks": "page,list", "n": 6,
        "layer": 1, "rates": 4, "steps": 8, "batch-size": 3, "save-every": 2,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "tokensel",
        "dyrate",
        *(str(w) for k, v in options.items() for w in (f"--{k}", v)),
    ]
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "checkpoint.safetensors").exists():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL and not (out / "dyrate").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    loaded = RatePredictor.from_pretrained(out / "dyrate")
    assert torch.equal(loaded.linear.weight, whole.linear.weight)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rates": 1}, "rates is 1"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"tau_end": 0.0}, "tau_end is 0.0"),
        ({"layer": 0}, "layer is 0"),
    ],
)
def test_bad_options(config, change, line):
    with pytest.raises(TokenselError, match=line):
        replace(config, **change)


def test_a_layer_outside_the_model_and_unknown_options_are_refused(config):
    with pytest.raises(TokenselError, match="layer 2 is not inside the 2 layers"):
        train_dyrate(replace(config, layer=2))
    with pytest.raises(TokenselError, match="unknown option 'wieght': did you mean 'weight'"):
        DyRateConfig.from_dict({"model": "m", "wieght": 1.0})


@pytest.mark.parametrize(
    ("name", "seed", "gradient"),
    [
        ("dyrate", 0, "all-rates"),
        ("dyrate-seed-1", 1, "all-rates"),
        ("dyrate-seed-2", 2, "all-rates"),
        ("dyrate-straight-through", 0, "straight-through"),
    ],
)
def test_the_shipped_predictors_fit_the_shipped_model(name, seed, gradient):
    data = Path(__file__).parents[2] / "data" / "mini"
    folder = data / name
    config = RatePredictor.from_pretrained(folder).config
    assert (config.seed, config.weight, config.rates, config.gradient) == (seed, 5.0, 10, gradient)
    shape = json.loads((data / "llava-next" / "config.json").read_text())["text_config"]
    assert config.heads == shape["num_attention_heads"] and 0 < config.layer < shape["num_hidden_layers"]
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == list(range(1, config.steps + 1))
    # it is the history of these weights
    last = [record for record in history if record["step"] > 0.9 * config.steps]
    for name in ("accuracy_loss", "kept"):
        assert getattr(config, name) == pytest.approx(sum(record[name] for record in last) / len(last))
