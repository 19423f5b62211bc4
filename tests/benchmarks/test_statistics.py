"""Intervals: coverage, pairing, and a table whose bytes depend on the scores alone."""

import csv
import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.benchmarks import Benchmark
from tokensel.benchmarks.conditions import Condition, parse_pairs
from tokensel.benchmarks.results import (
    DIFFERENCES,
    TABLE,
    difference_rows,
    score_rows,
    write_table,
)
from tokensel.benchmarks.statistics import average, bootstrap, trend
from tokensel.utils.errors import TokenselError

BENCHMARK = Benchmark("words", "reading", "anls", 8, lambda split, n: None, lambda row: row["question"])


def test_interval_agrees_with_the_normal_one():
    scores = (np.random.default_rng(1).random((400, 3)) < [0.2, 0.5, 0.9]).astype(float)
    mean, low, high = bootstrap(scores)
    half = 1.96 * np.sqrt(mean * (1 - mean) / 400)
    np.testing.assert_allclose(mean - low, half, atol=0.006)
    np.testing.assert_allclose(high - mean, half, atol=0.006)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    samples = (rng.random((200, 500)) < 0.6).astype(float)  # 500 experiments of 200 questions
    _, low, high = bootstrap(samples, resamples=2000)
    assert 0.91 <= np.mean((low <= 0.6) & (high >= 0.6)) <= 0.98


def test_same_scores_same_interval_also_beside_other_columns_and_in_pieces(monkeypatch):
    scores = np.random.default_rng(3).random((50, 4))
    together = bootstrap(scores, resamples=1000)
    alone = bootstrap(scores[:, 2:3], resamples=1000)
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a[2:3], b, rtol=1e-12)
    monkeypatch.setattr("tokensel.benchmarks.statistics._CELLS", 50 * 7)
    for a, b in zip(together, bootstrap(scores, resamples=1000)):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert not np.allclose(together[1], bootstrap(scores, resamples=1000, seed=1)[1])


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_interval_lies_around_the_mean_and_within_the_scores(values):
    mean, low, high = (x[0] for x in bootstrap(np.array(values)[:, None], resamples=200))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert mean == pytest.approx(np.mean(values))


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(4)
    hard = rng.random(300)  # what makes a question hard for both methods
    scores = {Condition("selector", 0.5, 0): hard + 0.02, Condition("random", 0.5, 0): hard}
    row = difference_rows("m", BENCHMARK, scores, [("selector", "random")])[0]
    assert row["difference"] == pytest.approx(0.02)
    assert row["ci_low"] == pytest.approx(0.02) and row["ci_high"] == pytest.approx(0.02)
    alone = score_rows("m", BENCHMARK, scores)
    assert alone[0]["ci_high"] - alone[0]["ci_low"] > 0.05


def test_seeds_are_averaged_and_a_single_row_stands_for_every_keep():
    scores = {
        Condition("full", 1.0, 0): [1.0, 1.0],
        Condition("random", 0.3, 0): [0.0, 1.0],
        Condition("random", 0.3, 1): [1.0, 1.0],
        Condition("random", 0.6, 0): [1.0, 1.0],
        Condition("selector", 0.3, 0): [1.0, 1.0],
        Condition("selector", 0.6, 0): [1.0, 0.0],
    }
    rows = difference_rows(
        "m", BENCHMARK, scores, [("selector", "random"), ("selector", "full"), ("norm", "full")]
    )
    found = {(r["method"], r["against"], r["keep"]): (r["difference"], r["seed"]) for r in rows}
    assert found == {
        ("selector", "random", 0.3): (0.25, "0 1"),
        ("selector", "random", 0.6): (-0.5, "0"),
        ("selector", "full", 0.3): (0.0, "0"),
        ("selector", "full", 0.6): (-0.5, "0"),
    }


def test_the_long_table_has_the_columns_of_the_contract(tmp_path):
    condition = Condition("random", 0.1, 7)
    rows = score_rows("mini", BENCHMARK, {condition: [0.0, 1.0, 1.0]}, {condition: (2e12, 70 / 3)})
    path = write_table(tmp_path / "a.csv", rows)
    columns = "model benchmark group method keep metric score ci_low ci_high n seed flops kv_bytes"
    assert tuple(columns.split()) == TABLE
    lines = list(csv.DictReader(path.read_text().splitlines()))
    assert list(lines[0]) == list(TABLE)
    assert lines[0] | {"ci_low": "", "ci_high": ""} == dict(
        model="mini",
        benchmark="words",
        group="reading",
        method="random",
        keep="0.1",
        metric="anls",
        score="0.666667",
        ci_low="",
        ci_high="",
        n="3",
        seed="7",
        flops="2e+12",
        kv_bytes="23.3333",
    )
    assert write_table(tmp_path / "b.csv", [], DIFFERENCES).read_text() == ",".join(DIFFERENCES) + "\n"


@pytest.mark.parametrize("pair", ["selector", "a:b:c", ":random"])
def test_pairs_that_are_none(pair):
    with pytest.raises(TokenselError, match="compare is"):
        parse_pairs([pair])


def test_more_seeds_of_the_same_questions_do_not_narrow_an_interval():
    rng = np.random.default_rng(5)
    seeds = rng.random((60, 3))

    def rows(name, columns):
        scores = {Condition("random", 0.3, seed): column for seed, column in enumerate(columns.T)}
        return score_rows("m", dataclasses.replace(BENCHMARK, name=name), scores)

    alike = pd.DataFrame(rows("one", np.repeat(seeds[:, :1], 3, axis=1)))
    single = average(alike.iloc[:1], "method").loc["random"]
    assert average(alike, "method").loc["random", "reach"] == pytest.approx(single["reach"])

    # at least as wide as the interval of the mean over the seeds, question by question
    _, low, high = bootstrap(seeds.mean(1, keepdims=True))
    found = average(pd.DataFrame(rows("one", seeds)), ["method", "keep"]).iloc[0]
    assert found["score"] == pytest.approx(100 * seeds.mean())
    assert found["reach"] >= 50 * (high - low)[0]

    # other questions do: two benchmarks of equal width combine as independent means
    two = pd.concat([alike, alike.assign(benchmark="two")])
    assert average(two, "group")["reach"].iloc[0] == pytest.approx(single["reach"] / 2**0.5)


def test_a_trend_is_the_rise_of_the_line_and_its_interval_covers_it():
    steps = np.arange(200)
    rise, low, high = trend(0.5 + 3 * steps / 199)
    assert rise == pytest.approx(3) and low == pytest.approx(3) and high == pytest.approx(3)
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        rise, low, high = trend(2 * steps / 199 + rng.normal(size=200), resamples=400)
        covered += low <= 2 <= high
        widths.append(high - low)
    assert 0.9 <= covered / 200 <= 0.99
    # four standard errors of the slope of independent noise
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 199 / np.sqrt((200**3 - 200) / 12), rel=0.1)
