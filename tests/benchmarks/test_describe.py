"""Every method of the registry describes itself, and its paper is among the references."""

from pathlib import Path

import pytest
from reference import generated, prompt, vlm_of

from tokensel.benchmarks.describe import PLACES, all_methods, describe
from tokensel.methods import methods
from tokensel.schedules import SCHEDULES, cuts_at_depth, make_schedule, schedule_options
from tokensel.scorers import SCORERS
from tokensel.utils.errors import TokenselError

BIBLIOGRAPHY = (Path(__file__).parents[2] / "references.bib").read_text(encoding="utf-8")
BASELINES = {"selector", "random", "uniform", "norm", "cls", "fixed", "exponential", "random-cut"}


@pytest.mark.parametrize("name", all_methods())
def test_every_method_says_what_it_does_and_where_it_is_from(name):
    found = describe(name)
    assert found.name == name and found.idea and "arXiv" not in found.idea and ": " not in found.idea
    assert bool(found.source) == (name in {*SCORERS, *SCHEDULES} - BASELINES)
    assert found.source in BIBLIOGRAPHY
    row = methods().get(name)
    if name in SCHEDULES:
        assert found.place == PLACES[2]
    else:
        assert (found.place in PLACES[:2]) == row.chooses
    assert found.trained == any(need.startswith("a trained") for need in found.needs)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dyrate"])
def test_attention_is_named_where_it_is_read(name):
    vlm = vlm_of("llama", layers=6)
    options = cuts_at_depth(name, 6) | ({"layer": 2} if "layer" in schedule_options(name) else {})
    _, pruning = generated(vlm, prompt(vlm, [0]), make_schedule(name, **options), 3)
    assert ("the language model's attention" in describe(name).needs) == bool(pruning.ranked)


def test_what_a_method_needs():
    assert describe("visionzip").place == describe("pool").place == PLACES[1]
    assert describe("visionzip").needs == ("CLS attention",)
    assert describe("cdpruner").needs == ("the question",)
    assert describe("random").needs == describe("random-cut").needs == ("a seed",)
    both = describe("selector+fastv")
    assert both.place == "before the model, then inside the model" and both.trained
    assert describe("lowest-cls").needs == ("CLS attention",)
    assert describe("diversity").source == "2503.02175"
    with pytest.raises(TokenselError, match="unknown"):
        describe("nothing")
