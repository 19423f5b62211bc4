"""The recorder of selector trials: a small one from pages to table, and nothing is done twice."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from little import random_features
from tiny import tiny_selector

from tokensel.book.mini import counts, selectors
from tokensel.book.mini.expected_error import ExpectedErrorScorer
from tokensel.book.mini.selectors import KEEPS, STUDIES, TRIAL_TOWERS, record
from tokensel.model.reconstructor import ReconstructorConfig, TokenReconstructor
from tokensel.training.metrics import in_features
from tokensel.utils.errors import TokenselError


def test_the_trials_of_a_study_have_names_of_their_own():
    trials = [trial for study in STUDIES.values() for trial in study]
    assert len({trial.folder for trial in trials}) == len(trials)
    assert {trial.tower for trial in STUDIES["metrics"]} == set(TRIAL_TOWERS)
    for trial in trials:  # every one is a configuration that is allowed
        trial.config(Path("somewhere"), "data/mini/llava-next")


def test_a_trial_is_trained_judged_and_written_once(tmp_path, monkeypatch):
    trial = replace(STUDIES["metrics"][0], options=STUDIES["metrics"][0].options | {"steps": 4}, each=2)
    monkeypatch.setattr(selectors, "STUDIES", {"metrics": (trial,)})
    monkeypatch.setattr(selectors, "PAGES", 1)
    monkeypatch.setattr(selectors, "HELD_OUT", 1)
    monkeypatch.setattr(selectors, "TASKS", ("forms", "attributes"))
    table = record(["metrics"], tmp_path, tmp_path / "table.csv", n=2)
    rows = pd.read_csv(table)
    halfway = rows[rows["steps"] == 2]  # of the selector alone, at one budget
    assert set(halfway["method"]) == {"selector"} and set(halfway["keep"]) == {selectors.JUDGED_AT}
    chosen = rows[(rows["method"] == "selector") & (rows["steps"] == 4)]
    assert sorted(chosen["keep"].unique()) == list(KEEPS) and set(chosen["group"]) == {"reading", "general"}
    assert {"full", "random", "uniform", "norm", "diversity"} < set(rows["method"])
    assert chosen["place"].between(0, 1).all() and chosen["l_rec"].gt(0).all()
    assert json.loads(table.with_suffix(".provenance.json").read_text())["questions"]["n"] == 2
    content = table.read_bytes()
    monkeypatch.setattr(selectors, "_draw_pages", lambda folder, split, count: None)
    stamp = (tmp_path / trial.folder / "checkpoint.safetensors").stat().st_mtime_ns
    assert record(["metrics"], tmp_path, table, n=2).read_bytes() == content
    assert (tmp_path / trial.folder / "checkpoint.safetensors").stat().st_mtime_ns == stamp


def test_a_count_for_each_image_is_compared_at_equal_mean_cost(tmp_path, monkeypatch):
    trial = replace(STUDIES["length"][0], options={"steps": 4}, each=0)
    monkeypatch.setattr(selectors, "STUDIES", {"length": (trial,)})
    for name, value in {"PAGES": 1, "HELD_OUT": 1, "TASKS": ("forms", "attributes")}.items():
        monkeypatch.setattr(selectors, name, value)
    monkeypatch.setattr(counts, "SHARES", (0.2, 0.5))
    table = selectors.record_counts(tmp_path, tmp_path / "counts.csv", n=4, split="validation")
    rows = pd.read_csv(table)
    assert set(rows["rule"]) == {"score", "expected error"} and set(rows["pages"]) == {"all", "full", "empty"}
    assert (rows["difference"] - (rows["score"] - rows["fixed"])).abs().max() < 1e-3
    assert (rows["ci_low"] <= rows["difference"] + 1e-3).all()
    whole = rows[(rows["pages"] == "all") & (rows["rule"] == "score")].groupby("keep")
    assert (whole["kept"].mean() - whole["share"].mean()).abs().max() < 1e-3  # two tasks of equal size


def test_an_expected_error_falls_with_each_token_and_its_threshold_keeps_a_share():
    selector, reconstructor = tiny_selector(16), TokenReconstructor(ReconstructorConfig(width=16, layers=1))
    tiles = random_features(tiles=50)
    scorer = ExpectedErrorScorer(selector, reconstructor, in_features)
    order = selector.scores(tiles.tokens).argsort(dim=1, descending=True)
    assert (scorer(tiles).gather(1, order).diff(dim=1) < 0).all()
    scorer.calibrate(tiles)
    for keep in (0.1, 0.5):
        share = (scorer(tiles) > scorer.threshold(keep)).float().mean().item()
        assert share == pytest.approx(keep, abs=0.02)
    assert scorer.threshold(1.0) == -float("inf")


def test_unknown_studies_and_towers_are_refused(tmp_path):
    with pytest.raises(TokenselError, match="unknown option 'gate': did you mean 'gates'"):
        record(["gate"], tmp_path, tmp_path / "table.csv")
    with pytest.raises(TokenselError, match="no trial of gates is on siglip: give other towers"):
        record(["gates"], tmp_path, tmp_path / "table.csv", towers=["siglip"])
