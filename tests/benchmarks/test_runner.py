"""Evaluation: results depend only on the configuration, and what cannot work is refused at once."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from suite_tiny import answers
from tiny import tiny_selector

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.data.tower import run_tower
from tokensel.model.selector import TokenSelector
from tokensel.schedules import RatePredictor
from tokensel.schedules.dyrate import RateConfig
from tokensel.utils.errors import TokenselError
from tokensel.vlm.families import llava_next

METHODS = ("full", "none", "random", "uniform", "norm", "cls", "diversity", "selector", "downsample")


def test_every_method_on_every_benchmark_fills_the_long_table(config, monkeypatch):
    towers = []
    monkeypatch.setattr(llava_next, "run_tower", lambda *args: towers.append(args) or run_tower(*args))
    done = evaluate(
        replace(config, methods=METHODS, seeds=(0, 1), compare=("selector:random", "norm:full")),
        progress=False,
    )
    rows = list(csv.DictReader(done.table.read_text().splitlines()))
    kinds = 2 + 2 * (
        len(METHODS) - 2 + 1
    )  # two rows of their own, two keeps for the others, random with two seeds
    assert len(rows) == 3 * kinds
    assert done.computed == 3 * kinds * 9 == len(answers(config.out))
    assert len(towers) == 3 * 3  # three batches a benchmark, whatever the number of methods and keeps
    assert {(r["method"], r["keep"]) for r in rows if r["method"] in ("full", "none")} == {
        ("full", "1"),
        ("none", "0"),
    }
    assert {r["model"] for r in rows} == {"tiny-llava"} and {r["n"] for r in rows} == {"9"}
    assert all(0 <= float(r["ci_low"]) <= float(r["score"]) <= float(r["ci_high"]) <= 1 for r in rows)
    assert len({r["score"] for r in rows}) > 10  # the tiny model answers differently from row to row
    differences = list(csv.DictReader(done.differences.read_text().splitlines()))
    assert [(d["method"], d["against"], d["keep"]) for d in differences[:4]] == [
        (method, against, keep)
        for method, against in (("selector", "random"), ("norm", "full"))
        for keep in ("0.2", "0.6")
    ]
    mean = {(r["benchmark"], r["method"], r["keep"], r["seed"]): float(r["score"]) for r in rows}
    paired = (
        mean["page", "selector", "0.2", "0"]
        - (mean["page", "random", "0.2", "0"] + mean["page", "random", "0.2", "1"]) / 2
    )
    assert float(differences[0]["difference"]) == pytest.approx(paired, abs=1e-5)


def test_a_selector_of_each_seed_has_rows_of_its_own(config, tmp_path):
    """They are those that the selectors have when each is evaluated alone."""
    options = dict(methods=("selector", "norm"), keeps=(0.2,), compare=())
    for seed in (0, 1):
        selector = TokenSelector(tiny_selector().config)
        selector.head.weight.data *= 1 - 2 * seed  # the second ranks upside down
        selector.save_pretrained(tmp_path / f"selector-{seed}")

    def scores(selector, seeds, name):
        out = str(tmp_path / name)
        done = evaluate(
            replace(config, selector=str(selector), seeds=seeds, out=out, **options), progress=False
        )
        rows = csv.DictReader(done.table.read_text().splitlines())
        table = {}
        for row in rows:
            table.setdefault((row["method"], row["seed"]), []).append((row["benchmark"], row["score"]))
        return table

    both = scores(tmp_path / "selector-{seed}", (0, 1), "both")
    assert set(both) == {("selector", "0"), ("selector", "1"), ("norm", "0")}
    assert both["selector", "0"] != both["selector", "1"]
    for seed in (0, 1):
        alone = scores(tmp_path / f"selector-{seed}", (), f"alone-{seed}")
        assert alone["selector", "0"] == both["selector", str(seed)]


def test_schedules_and_what_they_cost(config, tmp_path):
    torch.manual_seed(0)
    RatePredictor(RateConfig(heads=4, layer=1, rates=4)).save_pretrained(tmp_path / "dyrate")
    inside = ("fastv", "vtw", "dyrate", "fixed", "exponential", "selector+fastv", "random+vtw")
    config = replace(
        config,
        methods=("full", "selector", *inside),
        layer=1,
        dyrate=str(tmp_path / "dyrate"),
        benchmarks=("page", "list"),
        compare=("selector+fastv:selector", "fastv@0.2:vtw", "dyrate:fastv@0.6"),
    )
    done = evaluate(config, progress=False)
    rows = {
        (r["benchmark"], r["method"], r["keep"]): r
        for r in csv.DictReader(done.table.read_text().splitlines())
    }
    assert len(rows) == 2 * (3 + 2 * 6) and done.computed == 9 * len(rows)
    for benchmark in ("page", "list"):
        flops, held = (
            {key[1:]: float(row[name]) for key, row in rows.items() if key[0] == benchmark}
            for name in ("flops", "kv_bytes")
        )
        for cost in (flops, held):
            assert cost["fastv", "0.2"] < cost["fastv", "0.6"] and cost["vtw", "1"] < cost["full", "1"]
            assert cost["selector", "0.2"] < cost["selector", "0.6"]
            assert cost["selector+fastv", "0.6"] < cost["selector", "0.6"]
            assert cost["random+vtw", "0.2"] < cost["random+vtw", "0.6"]
    differences = list(csv.DictReader(done.differences.read_text().splitlines()))
    assert [(d["method"], d["against"], d["keep"]) for d in differences[:4]] == [
        ("selector+fastv", "selector", "0.2"),
        ("selector+fastv", "selector", "0.6"),
        ("fastv@0.2", "vtw", "0.2"),
        ("dyrate", "fastv@0.6", "1"),
    ]
    score = {key: float(row["score"]) for key, row in rows.items()}
    paired = score["page", "fastv", "0.2"] - score["page", "vtw", "1"]
    assert float(differences[2]["difference"]) == pytest.approx(paired, abs=1e-5)
    assert len({record["prediction"] for record in answers(config.out).values()}) > 40
    # a schedule's options are part of what an answer is, for its own methods alone
    assert evaluate(config, progress=False).computed == 0
    assert evaluate(replace(config, inside=0.25), progress=False).computed == 2 * 9 * 2
    # newlines follow the choice inside the language model too; vtw drops them in any case
    dropped = replace(config, methods=inside[:5], newline="drop", compare=())
    done = evaluate(dropped, progress=False)
    assert done.computed == 2 * 9 * (3 * 2 + 1)
    for r in csv.DictReader(done.table.read_text().splitlines()):
        before, held = (float(row["kv_bytes"]) for row in (rows[r["benchmark"], r["method"], r["keep"]], r))
        if r["method"] in ("fastv", "vtw"):  # the others may drop nothing in an answer this short
            assert held == before if r["method"] == "vtw" else held < before
    RatePredictor(RateConfig(heads=4, layer=1, rates=3)).save_pretrained(tmp_path / "dyrate")
    assert evaluate(config, progress=False).computed == 2 * 9
    one = replace(config, batch_size=1, out=str(tmp_path / "one"))
    evaluate(one, progress=False)
    evaluate(replace(config, out=str(tmp_path / "four")), progress=False)
    assert answers(one.out) == answers(tmp_path / "four")


def test_records_say_what_was_asked_and_how_many_tokens_it_took(config):
    evaluate(replace(config, benchmarks=("page",)), progress=False)
    found = answers(config.out)
    for (benchmark, method, keep, _, _), record in found.items():
        assert benchmark == "page" and record["model"] == "tiny-llava" and record["answers"]
        expected = {"full": record["n_visual_full"], "none": 0}.get(
            method, round(keep * record["n_visual_full"])
        )
        assert record["n_visual"] == expected
    assert {len(record["prediction"]) for record in found.values()} != {0}


def test_provenance_tells_how_to_repeat_it(config):
    done = evaluate(replace(config, benchmarks=("page", "list"), name="chapter"), progress=False)
    assert done.table.name == "chapter.csv"
    told = json.loads(done.provenance.read_text())
    assert told["data"] == {"page": 9, "list": 9, "suite": "suite_tiny", "split": "test"}
    assert told["answers"] == told["answers_computed_now"] == done.computed == 2 * 6 * 9
    assert {"torch", "transformers", "tokensel"} <= set(told["versions"])
    again = EvalConfig.from_dict(told["config"])
    assert again == replace(config, benchmarks=("page", "list"), name="chapter")


def test_scores_depend_neither_on_batch_size_nor_on_the_number_of_questions(config, tmp_path):
    config = replace(config, benchmarks=("page", "choice"))
    first = evaluate(config, progress=False)
    other = evaluate(replace(config, batch_size=1, out=str(tmp_path / "other")), progress=False)
    assert other.table.read_bytes() == first.table.read_bytes()
    assert answers(config.out) == answers(tmp_path / "other")
    evaluate(replace(config, batch_size=64, n=5, out=str(tmp_path / "few")), progress=False)
    few = answers(tmp_path / "few")
    assert len(few) == 2 * 6 * 5
    assert few == {key: record for key, record in answers(config.out).items() if key in few}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"methods": ("guess",)}, "method 'guess' is unknown"),
        ({"keeps": (0.0,)}, "keep is 0.0"),
        ({"keeps": (float("nan"),)}, "keep is nan"),
        ({"n": 0}, "n is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"selector": None}, "--selector"),
        ({"selector": None, "methods": ("selector+fastv",)}, "--selector"),
        ({"methods": ("random+dyrate",)}, "--dyrate"),
        ({"inside": 0.0}, "inside is 0.0"),
        ({"layer": 0}, "layer is 0"),
        ({"compare": ("fastv@x:full",)}, "number after @"),
        ({"compare": ("selector",)}, "compare is 'selector'"),
        ({"budget": "page"}, "budget is 'page'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_a_configuration_is_checked_before_anything_is_loaded(config, change, line):
    with pytest.raises(TokenselError, match=line):
        replace(config, **change)


def test_schedules_that_do_not_fit_the_model_are_refused_before_anything_is_asked(config, tmp_path):
    for change in ({"methods": ("fastv",)}, {"methods": ("vtw",), "vtw_layer": 2}):
        with pytest.raises(TokenselError, match="layer 2 is not inside the 2 layers"):
            evaluate(replace(config, **change), progress=False)
    RatePredictor(RateConfig(heads=3, layer=1)).save_pretrained(tmp_path / "dyrate")
    with pytest.raises(TokenselError, match="4 attention heads but this rate predictor was made for 3"):
        evaluate(replace(config, methods=("dyrate",), dyrate=str(tmp_path / "dyrate")), progress=False)
    assert not answers(config.out)


def test_unknown_options_are_refused(config):
    with pytest.raises(TokenselError, match="unknown option 'keep': did you mean 'keeps'"):
        EvalConfig.from_dict({"model": "m", "keep": 0.5})
    with pytest.raises(TypeError):
        EvalConfig(model="m", keep=0.5)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"suite": "no_such_suite"}, "no module named no_such_suite"),
        ({"suite": "json"}, "no table BENCHMARKS"),
        ({"benchmarks": ("pages",)}, "benchmark pages: not in suite_tiny"),
    ],
)
def test_unknown_suites_and_benchmarks(config, change, line):
    with pytest.raises(TokenselError, match=line):
        evaluate(replace(config, **change), progress=False)
