"""What the adapter returns is a mapping of inputs that keeps its counts when it is copied or extended."""

import copy
from dataclasses import fields

import pytest
import torch
from tiny import ask, tiny_vlm

from tokensel.scorers import make_scorer
from tokensel.vlm import Reduced, reduce_inputs


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def reduced(vlm) -> Reduced:
    return reduce_inputs(vlm.model, ask(vlm, [0, None]), make_scorer("norm"), 0.3)


@pytest.mark.parametrize(
    "change", [copy.copy, copy.deepcopy, Reduced.copy, lambda reduced: reduced | {"use_cache": True}]
)
def test_copies_and_unions_keep_the_counts_and_generate_the_same(vlm, reduced, change):
    changed = change(reduced)
    assert isinstance(changed, Reduced) and changed.inputs is not reduced.inputs
    for field in fields(Reduced):
        if field.name != "inputs":
            before, after = getattr(reduced, field.name), getattr(changed, field.name)
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert set(reduced) <= set(changed) and len(changed) >= len(reduced)
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(vlm.model.generate(**changed, **options), vlm.model.generate(**reduced, **options))


def test_a_union_replaces_inputs_and_with_a_dictionary_first_gives_a_dictionary(reduced):
    mask = torch.zeros_like(reduced["attention_mask"])
    assert (reduced | {"attention_mask": mask})["attention_mask"] is mask
    assert reduced["attention_mask"] is not mask
    merged = {"max_new_tokens": 4} | reduced
    assert type(merged) is dict and set(merged) == {"max_new_tokens", *reduced}
    assert reduced.get("input_ids") is None and "inputs_embeds" in reduced
