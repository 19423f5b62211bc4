"""A new schedule, with options or a learned part of its own, is one class and one row, known everywhere."""

import csv
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from reference import dyrate

from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.session import EvalSession
from tokensel.methods import check_method
from tokensel.profiling.config import CostConfig
from tokensel.schedules import SCHEDULES, DyRate, FastV, Vtw
from tokensel.utils.errors import TokenselError


@dataclass(frozen=True)
class Thin(FastV):
    name: ClassVar[str] = "thin"


@dataclass(frozen=True)
class Late(Vtw):
    name: ClassVar[str] = "late"


@dataclass(frozen=True)
class Learned(DyRate):
    name: ClassVar[str] = "learned"


@pytest.fixture(autouse=True)
def _rows(monkeypatch):
    for schedule in (Thin, Late, Learned):
        monkeypatch.setitem(SCHEDULES, schedule.name, schedule)


def schedules(config) -> dict:
    session = EvalSession(config)
    return {(c.method, c.keep): session.schedule(c) for c in session.config.conditions()}


def test_an_evaluation_gives_each_its_options(config):
    methods = ("thin", "norm+thin", "late")
    config = replace(config, methods=methods, keeps=(0.4,), n=2, benchmarks=("page",), inside=0.7, layer=1)
    half = EvalSession(config).vlm.model.config.text_config.num_hidden_layers // 2
    given = schedules(config)
    assert given["thin", 0.4] == Thin(1, 0.4) and given["norm+thin", 0.4] == Thin(1, 0.7)
    assert [schedule for (method, _), schedule in given.items() if method == "late"] == [Late(half)]
    assert Late(1) in schedules(replace(config, vtw_layer=1)).values()
    rows = list(csv.DictReader(evaluate(config, progress=False).table.read_text().splitlines()))
    assert sorted(row["method"] for row in rows) == sorted(methods)


def test_options_of_single_schedules_are_options_of_an_evaluation(config):
    given = {"sparsevlm_scale": 0.2, "clse_lowest": True, "priortr_prior": "forward"}
    given["sparsevlm_recycling"] = 0.3
    for options, wanted in (({}, (0.5, 0.0, False, "token")), (given, (0.2, 0.3, True, "forward"))):
        asked = schedules(replace(config, methods=("sparsevlm", "clse", "priortr"), keeps=(0.4,), **options))
        sparsevlm, clse, priortr = asked.values()
        assert (sparsevlm.scale, sparsevlm.recycling, clse.lowest, priortr.prior) == wanted
    with pytest.raises(TokenselError, match=r"sparsevlm_scale is 1\.5"):
        replace(config, sparsevlm_scale=1.5)


def test_a_learned_one_gets_the_predictor_and_is_checked_before_any_question(config, tmp_path):
    with pytest.raises(TokenselError, match="method learned: give the folder or Hub id of a trained pred"):
        replace(config, methods=("learned",))
    assert check_method("norm+learned").uses_predictor and not check_method("thin").uses_predictor
    with pytest.raises(TokenselError, match="method 'learned' is not measured"):
        CostConfig(model=config.model, methods=("learned",))
    dyrate(layer=1, heads=3).predictor.save_pretrained(tmp_path / "rates")
    config = replace(config, methods=("learned",), dyrate=str(tmp_path / "rates"), newline="row")
    (learned,) = schedules(config).values()
    assert isinstance(learned, Learned) and learned.newline == "row"
    with pytest.raises(TokenselError, match="made for 3: use the model it was trained on"):
        EvalSession(config).check_fit()
