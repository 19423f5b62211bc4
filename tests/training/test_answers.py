"""Training by answers: what is learned, what a kill changes, and what the saved scorer depends on."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_vlm

from tokensel.model.diffprune import DiffPrune
from tokensel.model.visionselector import VisionSelector
from tokensel.scorers import LEARNED, make_scorer
from tokensel.training import answers
from tokensel.training.answers import (
    LEARNERS,
    DiffPruneLearner,
    VisionSelectorLearner,
    image_weights,
    train_answers,
)
from tokensel.training.config import AnswersConfig
from tokensel.training.frozen import draw_questions, load_frozen
from tokensel.utils.errors import TokenselError
from tokensel.vlm import reduce
from tokensel.vlm.encoded import Encoded


@pytest.fixture(params=LEARNERS)
def config(request, model, tmp_path) -> AnswersConfig:
    return AnswersConfig(
        model=str(model),
        scorer=request.param,
        out=str(tmp_path / "out"),
        suite="suite_tiny",
        benchmarks=("page", "list"),
        n=6,
        steps=6,
        batch_size=3,
        save_every=2,
        progress=False,
        device="cpu",
    )


def step_of(config: AnswersConfig, step: int = 0) -> tuple[Encoded, torch.nn.Module]:
    vlm, data = load_frozen(config)
    torch.manual_seed(0)
    learner = LEARNERS[config.scorer](vlm.model.config)
    learner.prepare(vlm, data, config)
    return draw_questions(vlm, data, config, step)[0], learner


def test_an_interrupted_training_ends_where_an_undisturbed_one_does(config, tmp_path, monkeypatch):
    whole, history = train_answers(config)
    loss, other, calls = answers.answer_loss, replace(config, out=str(tmp_path / "other")), []

    def stop(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(answers, "answer_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train_answers(other)
    monkeypatch.undo()
    again, continued = train_answers(other)
    assert continued == history and [record["step"] for record in history] == list(range(1, 7))
    assert all(
        torch.equal(one, two)
        for one, two in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    loaded = LEARNED[config.scorer].from_pretrained(tmp_path / "other" / config.scorer)
    assert loaded.config.steps == 6 and loaded.config.keep == 0.2 and loaded.config.accuracy_loss > 0
    assert json.loads((tmp_path / "other" / "history.jsonl").read_text().splitlines()[-1]) == history[-1]
    with pytest.raises(TokenselError, match=r"was trained with keep 0\.2, not 0\.3"):
        train_answers(replace(other, keep=0.3))


def test_the_model_is_not_trained_and_the_scorer_is(config):
    vlm = tiny_vlm()
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    _, learner = step_of(config)
    model, history = train_answers(replace(config, out="", steps=3), vlm)
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())
    assert len(history) == 3
    trained = dict(model.named_parameters())
    moved = {name for name, p in learner.scorer.named_parameters() if not torch.equal(trained[name], p)}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved >= wanted


def test_weights_sum_to_the_budget_in_each_image_alone(config):
    encoded, _ = step_of(config)
    rows, _, total = encoded.layout.slots
    scores = torch.randn(len(rows), generator=torch.Generator().manual_seed(0))
    for tau in (2.0, 0.1):
        weight = image_weights(encoded, scores, 0, config, tau)
        sums = torch.zeros(len(total)).index_add(0, rows, weight)
        assert torch.allclose(sums, 0.2 * total, rtol=1e-5)
    hard = image_weights(encoded, scores, 0, config, 0.0)
    counts = torch.zeros(len(total)).index_add(0, rows, hard)
    assert set(hard.tolist()) == {0.0, 1.0} and bool(((counts - 0.2 * total).abs() < 1).all())
    drawn = [
        image_weights(encoded, scores, step, replace(config, keep_most=0.6), 1.0).sum().item()
        for step in range(4)
    ]
    assert len(set(drawn)) == 4
    assert all(0.2 * len(rows) < total < 0.6 * len(rows) for total in drawn)


def test_what_the_model_reads_is_changed_at_cells_alone(config):
    encoded, learner = step_of(config)
    whole = reduce(encoded)
    with torch.no_grad():
        visual, more = learner.visual(encoded, 0, config)
    same = (visual - whole["inputs_embeds"][whole.visual]).abs().amax(1) < 1e-6
    assert torch.equal(same, ~encoded.layout.cell)
    assert more == 0.0 if config.scorer == "diffprune" else more > 0


def test_the_gradient_of_the_weights_is_that_of_finite_differences(config):
    """Of a scorer's last linear map, through weights and noise or scaling, to what the model reads."""
    encoded, learner = step_of(config)
    learner.double().eval()
    features = encoded.features
    features.tokens = features.tokens.double()
    encoded.model.double()
    linear = learner.scorer.head if config.scorer == "diffprune" else learner.scorer.query
    torch.nn.init.normal_(linear.weight)
    if config.scorer == "visionselector":
        torch.nn.init.normal_(learner.scorer.key.weight)

    def loss() -> torch.Tensor:
        visual, more = learner.visual(encoded, 0, replace(config, hard_start=0.0))
        return (visual * torch.linspace(-1, 1, visual.shape[1], dtype=visual.dtype)).sum() + more

    loss().backward()
    direction = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1)).double()
    slope, weight, step = float((linear.weight.grad * direction).sum()), linear.weight.data.clone(), 3e-3
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            linear.weight.data = weight + sign * step * direction
            values.append(float(loss()))
    # thresholds are found in single precision
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02, abs=1e-3)


def test_what_is_kept_does_not_depend_on_the_denoiser(model, tmp_path):
    config = AnswersConfig(
        model=str(model), suite="suite_tiny", benchmarks=("page",), n=3, out=str(tmp_path),
        steps=2, batch_size=2, progress=False, device="cpu",
    )  # fmt: skip
    train_answers(config)
    encoded, learner = step_of(config)
    assert isinstance(learner, DiffPruneLearner)
    saved = DiffPrune.from_pretrained(tmp_path / "diffprune")
    assert not [name for name in saved.state_dict() if "denoiser" in name]
    learner.scorer.load_state_dict(saved.state_dict())
    kept = []
    for _ in range(2):
        reduced = reduce(encoded, make_scorer("diffprune", diffprune=learner.scorer), 0.3)
        kept.append((reduced.kept, reduced["inputs_embeds"]))
        for weight in learner.denoiser.parameters():
            torch.nn.init.normal_(weight)
    assert torch.equal(kept[0][0], kept[1][0]) and torch.equal(kept[0][1], kept[1][1])
    # kept tokens are the encoder's own, at the positions they had
    whole = reduce(encoded)
    cells = whole["inputs_embeds"][whole.prompt.cells]
    packed = encoded.layout.source[encoded.layout.cell]
    own = cells[reduced.kept.flatten()[packed]]
    assert torch.allclose(reduced["inputs_embeds"][reduced.prompt.cells], own, atol=1e-6)
    assert "position_ids" in reduced


@torch.no_grad()
def test_visionselectors_distance_to_a_hard_choice_counts_more_and_more(config):
    encoded, learner = step_of(replace(config, scorer="visionselector"))
    assert isinstance(learner, VisionSelectorLearner) and isinstance(learner.scorer, VisionSelector)
    terms = [float(learner.visual(encoded, step, config)[1]) for step in (0, config.steps - 1)]
    assert terms[1] == pytest.approx(terms[0] * 2.0 / 0.1)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"keep": 1.0}, "keep is 1.0"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep_most": 0.1}, "keep_most is 0.1"),
        ({"scorer": "norm"}, "scorer is 'norm'"),
        ({"tau_end": 0.0}, "tau_end is 0.0"),
        ({"hard_end": -1.0}, "hard_end is -1.0"),
    ],
)
def test_bad_options(config, change, line):
    with pytest.raises(TokenselError, match=line):
        replace(config, **change)


def test_questions_without_images_train_nothing(config, monkeypatch):
    draw = answers.draw_questions
    vlm = tiny_vlm()

    def blind(vlm, data, config, step):
        _, tokens, lengths = draw(vlm, data, config, step)
        inputs = vlm.inputs(None, [vlm.prompt("what?", False)] * len(tokens))
        from tokensel.vlm.encode import encode

        return encode(vlm.model, inputs), tokens, lengths

    monkeypatch.setattr(LEARNERS[config.scorer], "prepare", lambda *_: None)
    monkeypatch.setattr(answers, "draw_questions", blind)
    with pytest.raises(TokenselError, match="no question of step 1 has an image"):
        train_answers(config, vlm)
