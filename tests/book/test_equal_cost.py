"""DyRate's rivals cost what it costs; each predictor has its rows, and all seeds have some together."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tokensel.book.mini.equal_cost import RIVALS, record_equal_cost
from tokensel.schedules import RatePredictor
from tokensel.schedules.dyrate import RateConfig

LEAST = 0.05


@pytest.fixture
def recorded(config, tmp_path):
    predictors = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        predictors.append(str(tmp_path / f"seed-{seed}"))
        facts = RateConfig(heads=4, layer=1, rates=4, seed=seed, weight=0.5)
        RatePredictor(facts).save_pretrained(predictors[-1])
    asked = replace(config, methods=("full",), benchmarks=("page", "list"), n=4, keeps=(LEAST,), compare=())
    path = record_equal_cost(asked, predictors, tmp_path / "equal.csv")
    return path, asked, predictors


def test_rivals_cost_the_same_and_all_seeds_have_rows_together(recorded):
    path, asked, predictors = recorded
    rows = pd.read_csv(path)
    seeds = ("0", "1", "0 1")
    assert len(rows) == 2 * len(seeds) * (2 * (len(RIVALS) - 1) + 1) and set(rows["n"]) == {4}
    assert (rows["score"] - rows["rival_score"] - rows["difference"]).abs().max() < 1e-5
    keys = ["benchmark", "rival", "equal"]
    each, mean, together = (
        rows[rows["predictor_seed"].isin(part)].groupby(keys)[["difference", "keep", "kv_bytes"]].mean()
        for part in (seeds[:1], seeds[:2], seeds[2:])
    )
    pd.testing.assert_frame_equal(mean, together, rtol=1e-4)
    assert not each.equals(together)
    assert (rows["ci_low"] <= rows["difference"]).all() and (rows["difference"] <= rows["ci_high"]).all()
    for equal, cost in (("FLOPs", "flops"), ("cache", "kv_bytes")):
        matched = rows[(rows["equal"] == equal) & (rows["keep"] > LEAST) & (rows["rival"] == "fastv")]
        costs = matched.groupby("predictor_seed")[[cost, f"rival_{cost}"]].mean()
        assert costs[f"rival_{cost}"].tolist() == pytest.approx(costs[cost].tolist(), rel=0.1)

    # nothing is asked twice, and the tables are the same bytes
    before = path.read_bytes()
    records = {file: file.stat().st_mtime_ns for file in (path.parent / "out").rglob("*.jsonl")}
    record_equal_cost(asked, predictors, path)
    assert path.read_bytes() == before
    assert {file: file.stat().st_mtime_ns for file in (path.parent / "out").rglob("*.jsonl")} == records
    facts = json.loads(path.with_suffix(".provenance.json").read_text())
    assert facts["predictors"] == predictors and facts["config"]["n"] == 4


def test_what_predictors_leave_of_the_image(recorded):
    rows = pd.read_csv(recorded[0].with_suffix(".predictors.csv"))
    assert len(rows) == 2 * 3
    for earlier, later in (("prompt", "second"), ("second", "end"), ("gradual", "later")):
        low, high = (later, earlier) if earlier != "gradual" else (earlier, later)
        assert (rows[low] <= rows[high] + 1e-9).all()
    assert (rows["prompt"] - rows["end"] - rows["later"]).abs().max() < 1e-5
    assert (rows["steps"] > 1).all() and rows["prompt"].between(0, 1).all()
