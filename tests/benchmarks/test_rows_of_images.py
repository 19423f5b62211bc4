"""Suites with rows that have no image, one or several, and suites of one benchmark."""

import csv
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import suite_tiny
from datasets import Dataset, Features, Image, List
from suite_tiny import answers

from tokensel.benchmarks import Benchmark
from tokensel.benchmarks.runner import evaluate
from tokensel.methods import methods
from tokensel.schedules import RatePredictor
from tokensel.schedules.dyrate import RateConfig
from tokensel.training.config import DyRateConfig
from tokensel.training.dyrate import train_dyrate
from tokensel.vlm import load_vlm

COUNTS = [1, 0, 2, None, 1, 3]  # images of the rows, over and over; None: the column is empty


def rows(split: str, n: int | None, several: bool) -> Dataset:
    """The questions of ``suite_tiny`` with another number of images each."""
    given = suite_tiny.load(split, n).cast_column("image", Image(decode=False)).to_list()
    for i, row in enumerate(given):
        count = COUNTS[i % len(COUNTS)]
        if several:
            row["image"] = None if count is None else [row["image"]] * count
        elif not count:
            row["image"] = None
    kind = List(Image()) if several else Image()
    return Dataset.from_list(given, features=Features(dict(suite_tiny.COLUMNS) | {"image": kind}))


def benchmark(name: str, several: bool) -> Benchmark:
    def load(split: str, n: int | None) -> Dataset:
        return rows(split, n, several)

    return Benchmark(name, "reading", "similarity", 4, load, lambda row: row["question"])


@pytest.fixture(params=[False, True], ids=["one or none", "lists"])
def several(request, monkeypatch) -> bool:
    """Whether the only benchmark of the suite ``suite_rows`` has a column of lists."""
    suite = ModuleType("suite_rows")
    suite.BENCHMARKS = {"rows": benchmark("rows", request.param)}
    monkeypatch.setitem(sys.modules, "suite_rows", suite)
    return request.param


def test_every_method_answers_every_row(several, config, tmp_path):
    RatePredictor(RateConfig(heads=4, layer=1, rates=4)).save_pretrained(tmp_path / "dyrate")
    before = [name for name in methods() if name != "native"]
    inside = ("fastv", "vtw", "fixed", "exponential", "dyrate", "selector+fastv", "downsample+vtw")
    config = replace(
        config, suite="suite_rows", methods=(*before, *inside), keeps=(0.4,), layer=1, n=6,
        dyrate=str(tmp_path / "dyrate"), newline="row",
    )  # fmt: skip
    done = evaluate(config, progress=False)
    records = answers(config.out)
    assert done.computed == len(records) == 6 * len(config.methods)
    table = list(csv.DictReader(done.table.read_text().splitlines()))
    assert {row["benchmark"] for row in table} == {"rows"} and {row["n"] for row in table} == {"6"}
    by_method = {
        method: [r for key, r in sorted(records.items()) if key[1] == method] for method in config.methods
    }
    counts = [(count or 0) if several else min(count or 0, 1) for count in COUNTS]
    for method, asked in by_method.items():
        for count, record, full in zip(counts, asked, by_method["full"], strict=True):
            assert (record["n_visual"] == 0) == (count == 0 or method == "none"), (method, count)
            assert (record["n_visual_full"] == 0) == (count == 0)
            if count == 0:  # nothing can be dropped, so nothing changes
                assert record["prediction"] == full["prediction"], method
    # the same answers as for each row alone
    vlm = load_vlm(config.model, device="cpu")
    for row, record in zip(rows("test", 6, several), by_method["full"], strict=True):
        assert vlm.answer(row["image"], row["question"], max_new_tokens=4) == record["prediction"]


def test_a_rate_predictor_trains_on_such_rows(several, config):
    training = DyRateConfig(
        model=config.model, suite="suite_rows", n=6, layer=1, rates=4, steps=4, batch_size=4, progress=False
    )
    _, history = train_dyrate(training)
    assert all(0 <= record["kept"] <= 1 and record["loss"] > 0 for record in history)
