"""The recorder of the field: five tables of one run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.recorded import RecordedAnswers
from tokensel.benchmarks.results import ScoreTable
from tokensel.book.mini import field
from tokensel.book.mini.controls import TWICE
from tokensel.book.mini.suite import BENCHMARKS as SUITE
from tokensel.scorers import SCORERS

PARTS = {"selector": "data/mini/selector", "dyrate": "data/mini/dyrate", "diffprune": None}


@pytest.fixture
def config(request, monkeypatch, tmp_path):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr(field, "_ROUNDS", 1)
    methods = ("full", "selector", "downsample", "fastv", "oracle")
    more = {"methods": methods, "benchmarks": ("forms",), "keeps": (0.3,), "seeds": (0,)}
    try:
        yield field.field_config(tmp_path / "out", 2, PARTS, **more, device="cpu")
    finally:
        for name in field.DRAWN:
            SCORERS.pop(name, None)


def test_a_method_without_its_trained_part_is_left_out(config, tmp_path):
    every = field.field_config(tmp_path, 3, PARTS).methods
    assert {"selector", "dyrate", "oracle", "drawn", "scope", "fastocr", "random"} <= set(every)
    assert {"diffprune", "visionselector", "native"}.isdisjoint(every)


def test_one_run_records_scores_times_difficult_questions_words_and_turns(config, tmp_path, monkeypatch):
    table = tmp_path / "field.csv"
    assert field.record_field(config, table) == table
    rows = pd.read_csv(table)
    assert list(rows["method"].unique()) == list(config.methods) and set(rows["n"]) == {2}
    timed = rows[rows["method"] != "oracle"]
    assert (np.asarray(timed[list(field.TIMES)]) > 0).all()
    assert np.isnan(np.asarray(rows.loc[rows["method"] == "oracle", list(field.TIMES)])).all()
    assert len(timed.groupby("method")["first_token_ms"].unique()) == 4
    assert bool((rows["flops"] > 0).all()) and bool((rows["kv_bytes"] > 0).all())
    standing = pd.read_csv(table.with_suffix(".standing.csv"))
    assert set(standing["method"]) == set(config.methods) - {"selector"} and set(standing["keep"]) == {0.3}
    words = pd.read_csv(table.with_suffix(".words.csv"))
    assert set(words["benchmark"]) == set(field.SPELLED)
    turns = pd.read_csv(table.with_suffix(".turns.csv"))
    assert set(turns["benchmark"]) == {f"{task}_twice" for task in TWICE}
    assert len(turns) == len(TWICE) * len(config.methods) * 3
    assert Path(table.with_suffix(".provenance.json")).is_file()
    # the same call takes what exists, the measured times too, and writes the same tables
    before = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("field*.csv"))}
    monkeypatch.setattr(field, "follow_up_rows", None)
    monkeypatch.setattr(field, "first_token_times", None)
    field.record_field(config, table)
    assert {path.name: path.read_bytes() for path in sorted(tmp_path.glob("field*.csv"))} == before


def test_the_difficult_questions_of_each_budget_are_those_of_its_own_smaller_image():
    full, none = Condition("full", 1.0, 0), Condition("none", 0.0, 0)
    small = {keep: Condition("downsample", keep, 0) for keep in (0.3, 0.5)}
    norm = {keep: Condition("norm", keep, 0) for keep in (0.3, 0.5)}
    scores = {full: [1, 1, 1, 0], none: [0, 0, 1, 0], small[0.3]: [0, 0, 1, 0], small[0.5]: [0, 1, 1, 0]}
    scores |= {norm[0.3]: [1, 0, 0, 0], norm[0.5]: [1, 0, 0, 1]}
    columns = {condition: np.array(column, dtype=float) for condition, column in scores.items()}
    answers = RecordedAnswers(SUITE["forms"], ScoreTable(columns, None, np.array([""] * 4)), {})
    hard = field.difficult_table("mini", [answers])
    columns = ["small", "method", "keep", "n", "score"]
    found = {(row[0], row[1]): tuple(row[2:]) for row in hard[columns].to_numpy().tolist()}
    assert found == {
        (0.3, "none"): (0.0, 2, 0.0), (0.3, "norm"): (0.3, 2, 0.5),
        (0.5, "none"): (0.0, 1, 0.0), (0.5, "norm"): (0.5, 1, 1.0),
    }  # fmt: skip


def test_a_rival_stands_where_it_reads_as_much_and_with_the_first_seed(monkeypatch):
    tokens = {("selector", 0.3): 100, ("random", 0.3): 90, ("fastv", 0.1): 120, ("fastv", 0.3): 150}
    scores = {
        Condition("selector", 0.3, 0): np.array([1.0, 1.0, 0.0]),
        Condition("random", 0.3, 0): np.array([0.0, 1.0, 0.0]),
        Condition("random", 0.3, 1): np.array([1.0, 1.0, 1.0]),
        Condition("fastv", 0.1, 0): np.array([1.0, 0.0, 1.0]),
        Condition("fastv", 0.3, 0): np.array([0.0, 0.0, 0.0]),
    }
    monkeypatch.setattr(RecordedAnswers, "mean_tokens", lambda self, c: tokens[c.method, c.keep])
    answers = RecordedAnswers(SUITE["forms"], ScoreTable(scores, None, np.array([""] * 3)), {})
    rows = field.standing_table([answers]).set_index("method")
    assert rows.loc["random", ["label", "tokens", "n"]].tolist() == [0.3, 0.9, 3]
    assert rows.loc["fastv", ["label", "tokens"]].tolist() == [0.1, 1.2]
    assert rows["difference"].to_dict() == pytest.approx({"random": 1 / 3, "fastv": 0.0})
    assert (rows["difference_low"] <= rows["difference"]).all()
