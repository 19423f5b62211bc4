"""The tiny models that the book and the tests share."""

import pytest
import torch

from tokensel.book.tiny import MAKERS, save_tiny
from tokensel.cost.towers import TOWERS
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm
from tokensel.vlm.families import FAMILIES


def test_every_family_but_those_of_the_paper_has_a_tiny_model_and_a_formula():
    others = {name for name, family in FAMILIES.items() if not family.tiled}
    assert set(MAKERS) == others == set(TOWERS)


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn(tmp_path):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_tiny("llava", tmp_path / folder, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (load_vlm(tmp_path / name, "cpu").model.lm_head.weight for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_another_family_is_refused(tmp_path):
    with pytest.raises(TokenselError, match="blip"):
        save_tiny("blip", tmp_path)
