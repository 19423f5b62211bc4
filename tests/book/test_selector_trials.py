"""The recorder of selector trials: a small one from pages to table, and nothing is done twice."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tokensel.book.mini import selectors
from tokensel.book.mini.selectors import KEEPS, STUDIES, TRIAL_TOWERS, record
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


def test_unknown_studies_and_towers_are_refused(tmp_path):
    with pytest.raises(TokenselError, match="unknown option 'gate': did you mean 'gates'"):
        record(["gate"], tmp_path, tmp_path / "table.csv")
    with pytest.raises(TokenselError, match="no trial of gates is on siglip: give other towers"):
        record(["gates"], tmp_path, tmp_path / "table.csv", towers=["siglip"])
