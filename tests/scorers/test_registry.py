"""A new scorer, stochastic and with a learned part, is one class and one row, known everywhere."""

import csv
from dataclasses import replace

import pytest
import torch
from tiny import noise_image, tiny_selector, tiny_vlm

from tokensel import scorers
from tokensel.benchmarks.runner import evaluate
from tokensel.data.tower import cls_attention_row
from tokensel.methods import Batch, check_method, methods, prepare
from tokensel.scorers import SCORERS, Scorer, make_scorer, scorer_options
from tokensel.scorers.random import RandomScorer
from tokensel.scorers.selector import SelectorScorer
from tokensel.utils.errors import TokenselError


class NoisyScorer:
    """The selector's scores and some noise, different for every seed."""

    name, needs_cls_attention, scope, adaptive = "noisy", True, "tile", False

    def __init__(self, selector, seed=0, scale=1.0):
        self.learned, self.noise, self.scale = SelectorScorer(selector), RandomScorer(seed), scale

    def __call__(self, features):
        assert features.cls_attention is not None
        return self.learned(features) + self.scale * self.noise(features)


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setitem(SCORERS, "noisy", NoisyScorer)


def test_it_is_a_method_and_can_be_prepared(noisy):
    vlm, selector = tiny_vlm(), tiny_selector()
    row = check_method("noisy+fastv")
    assert "noisy" in methods() and row.uses_seed and row.learned == "selector" and row.needs_cls_attention
    batch = Batch(vlm, [noise_image(40, 48)], ["what?"], [1])
    kept = [
        prepare(
            batch, "noisy", 0.3, scorer=make_scorer("noisy", selector=selector, seed=seed, scale=9.0)
        ).kept
        for seed in (0, 1, 0)
    ]
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])


def test_it_is_evaluated_with_every_seed_and_the_selector(noisy, config):
    done = evaluate(
        replace(config, methods=("noisy", "norm"), benchmarks=("page",), keeps=(0.2,), seeds=(0, 1), n=3),
        progress=False,
    )
    rows = list(csv.DictReader(done.table.read_text().splitlines()))
    assert [row["method"] for row in rows] == ["noisy", "noisy", "norm"] and done.computed == 9
    with pytest.raises(TokenselError, match="give the folder or Hub id of a trained selector"):
        replace(config, methods=("noisy",), selector=None)


def test_options_are_those_of_the_constructors(noisy):
    assert scorer_options("noisy") == ("selector", "seed", "scale") and scorer_options("norm") == ()
    assert isinstance(make_scorer("norm", seed=3, selector="nowhere"), Scorer)  # for other scorers
    with pytest.raises(TokenselError, match="unknown option 'sed': did you mean 'seed'"):
        make_scorer("random", sed=3)
    assert set(scorers.__all__) <= set(dir(scorers))


def test_cls_attention_is_computed_for_those_who_read_it(monkeypatch):
    computed = []
    monkeypatch.setattr(
        "tokensel.data.tower.cls_attention_row", lambda *args: computed.append(1) or cls_attention_row(*args)
    )
    batch = Batch(tiny_vlm(), [noise_image(40, 48)], ["what?"])
    for name in ("norm", "random", "uniform", "diversity"):
        prepare(batch, name, 0.3)
    assert computed == []
    for keep in (0.3, 0.5):
        prepare(batch, "cls", keep)
    assert computed == [1]
