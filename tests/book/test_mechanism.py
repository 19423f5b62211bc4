"""Interventions on shortened prompts: what they must leave alone, and what a table says of them."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from tokensel.book.mini import mechanism, residual
from tokensel.book.mini.mechanism import REFERENCE, Setting
from tokensel.scorers import SCORERS, make_scorer
from tokensel.vlm import load_vlm, reduce

ROOT = Path(__file__).parents[2]
MODEL, SELECTOR = ROOT / "data" / "mini" / "llava-next", ROOT / "data" / "mini" / "selector"


@pytest.fixture(scope="module")
def vlm():
    return load_vlm(MODEL, device="cpu")


@pytest.fixture(scope="module")
def selector():
    return make_scorer("selector", selector=str(SELECTOR))


@pytest.fixture(autouse=True)
def without_oracles():
    """The recorder registers the oracles for the whole process; other tests run in it."""
    yield
    for name in ("oracle", "drawn"):
        SCORERS.pop(name, None)


def test_what_is_hidden_everywhere_is_as_good_as_removed(vlm, selector):
    settings = mechanism.settings_of(6, 6)
    chosen = {name: settings[name] for name in (REFERENCE, "masked", "newlines of kept rows")}
    chosen["hidden"] = Setting({"dropped": "blank"}, "hidden")
    chosen["hidden in all layers"] = replace(chosen["hidden"], layers=tuple(range(6)))
    table = mechanism.points(vlm, selector, 0.3, "forms", chosen, 6, "validation")
    for name in ("masked", "hidden", "hidden in all layers"):
        assert table[name].equals(table[REFERENCE]), name


def test_settings_cover_every_layer_and_head_once():
    settings = mechanism.settings_of(2, 3)
    assert next(iter(settings)) == REFERENCE and settings[REFERENCE] == Setting()
    assert [s.layers for name, s in settings.items() if "only in layer" in name] == [(1,), (0,)]
    assert [s.heads for name, s in settings.items() if "not in head" in name] == [(0,), (1,), (2,)]


def test_moving_what_fills_the_gaps_keeps_all_embeddings_and_the_order_of_kept_ones(vlm, selector):
    encoded, _ = next(residual._pages(vlm, "validation", 3))
    reduced = reduce(encoded, selector, 0.3, thumbnail="last", dropped="blank")
    moved = mechanism._behind(encoded, reduced)
    kept, cell, image = residual.kept_cells(encoded, reduced), encoded.layout.cell, encoded.layout.image
    before, after = (prompt["inputs_embeds"][reduced.visual] for prompt in (reduced, moved))
    assert torch.equal(before[~cell], after[~cell]), "newlines stay where they are"
    for number in range(3):
        own = (image == number) & cell
        count = int((own & kept).sum())
        assert torch.equal(after[own][:count], before[own & kept])
        assert torch.equal(after[own][count:], before[own & ~kept])


def test_a_table_has_paired_differences():
    points = pd.DataFrame({REFERENCE: [0.0, 1.0, 1.0, 0.0], "better": [1.0, 1.0, 1.0, 0.0]})
    table = mechanism.differences(points).set_index("setting")
    assert table.loc[REFERENCE, "difference"] == 0 and table.loc["better", "difference"] == 25
    assert table.loc["better", "score"] == 75 and table.loc["better", "ci_low"] == 0
    assert (table["n"] == 4).all()


def test_a_record_resumes_and_probes_find_letters(vlm, selector, tmp_path, monkeypatch):
    monkeypatch.setattr(mechanism, "TASKS", ("forms",))
    monkeypatch.setattr(mechanism, "CHOSEN", (("selector", 0.3),))
    monkeypatch.setattr(residual, "TASKS", ("posters",))
    few = {name: Setting() for name in (REFERENCE, "again")}
    monkeypatch.setattr(mechanism, "settings_of", lambda *_: few)
    table = mechanism.record_mechanism(MODEL, SELECTOR, tmp_path / "a.csv", tmp_path / "parts", 12, "train")
    first, probes = pd.read_csv(table), pd.read_csv(table.with_suffix(".residual.csv"))
    whole = probes[(probes["setting"] == "all tokens") & (probes["target"] == "letter")]
    assert len(probes) == 7 * 4 * 2 * len(residual.SETTINGS) and (whole["difference"] == 0).all()
    assert whole["right"].mean() > 80, "the pages are those of the fit"
    for module, name in ((mechanism, "points"), (residual, "probed")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} is computed twice"))
    again = mechanism.record_mechanism(MODEL, SELECTOR, tmp_path / "b.csv", tmp_path / "parts", 12, "train")
    pd.testing.assert_frame_equal(pd.read_csv(again), first)
