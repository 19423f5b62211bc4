"""Selection with interpolation: what each way leaves, and what it leaves as it is."""

import pandas as pd
import pytest
import suite_tiny
import torch
from test_device import Fetches
from tiny import ask, onevision_processor, tiny_onevision, tiny_selector

from tokensel.book.mini import interpolation
from tokensel.book.mini.interpolation import WAYS, Way, interpolated, way_scores
from tokensel.budget import fraction_count
from tokensel.scorers import make_scorer
from tokensel.vlm import Vlm, encode, reduce
from tokensel.vlm.native import native, switch_off


@pytest.fixture(scope="module")
def batch():
    model, processor = tiny_onevision("anyres_max_2"), onevision_processor(ratio="anyres_max_2")
    vlm = Vlm(model, processor, "tiny", switch_off(model, processor))
    return encode(vlm.model, ask(vlm, [0, 1, 2, 3, None])), vlm


@pytest.fixture(scope="module")
def scorer():
    return make_scorer("selector", selector=tiny_selector())


def visual(reduced):
    return reduced["inputs_embeds"][reduced.visual]


def test_with_every_token_the_map_stays_as_it_is(batch, scorer):
    encoded, _ = batch
    plain = reduce(encoded, scorer, 1.0)
    without = plain["inputs_embeds"][plain.visual & ~plain.thumbnail]
    for name, way in WAYS.items():
        if way.first > 0:
            assert torch.allclose(visual(interpolated(encoded, scorer, 1.0, way)), without, atol=1e-5), name


def test_the_coarser_map_is_the_models_own(batch, scorer, monkeypatch):
    encoded, vlm = batch
    there = native(encoded, vlm.native)
    # rows and columns as the model makes them, from its newlines
    shapes = []
    for row in range(4):
        cells = int((there.visual & ~there.newlines)[row].sum()) - encoded.layout.tokens
        lines = int(there.newlines[row].sum())
        shapes.append((lines, cells // lines) if cells else (6, 6))
    given = iter(shapes)
    monkeypatch.setattr(interpolation, "_shape", lambda *_: next(given))
    here = interpolated(encoded, scorer, 1.0, Way(1.0))
    for row in range(4):
        own, model = (part["inputs_embeds"][row][part.visual[row]] for part in (here, there))
        skipped = 0 if shapes[row] == (6, 6) and len(model) == 37 else encoded.layout.tokens
        assert torch.allclose(own, model[skipped:], atol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_scores_are_on_the_host_and_tokens_on_the_device(name):
    model, processor = tiny_onevision("anyres_max_2"), onevision_processor(ratio="anyres_max_2")
    vlm = Vlm(model, processor, "tiny", switch_off(model, processor))
    inputs = dict(ask(vlm, [0, 1]))
    inputs["pixel_values"] = inputs["pixel_values"].to("meta")
    elsewhere = make_scorer("selector", selector=tiny_selector().to("meta"))
    with Fetches(), torch.no_grad():
        reduced = interpolated(encode(model.to("meta"), inputs), elsewhere, 0.3, WAYS[name])
    assert all(tensor.is_meta for tensor in (*reduced.values(), reduced.visual))


@pytest.mark.parametrize("name", WAYS)
def test_a_way_leaves_its_budget(name, batch, scorer):
    encoded, _ = batch
    reduced = interpolated(encoded, scorer, 0.25, WAYS[name], neighbours=1)
    left, budget = reduced.n_visual[:4], fraction_count(reduced.n_visual_full[:4], 0.25)
    assert reduced.n_visual[4] == 0
    if WAYS[name].first == 1:  # whole rows and columns
        assert bool((left <= budget).all()) and bool((left >= 0.75 * budget).all())
    else:
        assert torch.equal(left, budget)


def test_positions_are_those_in_the_coarser_map(batch, scorer):
    encoded, _ = batch
    way = WAYS["scored before, best of a cell"]
    reduced, whole = (interpolated(encoded, scorer, 0.25, one) for one in (way, Way(1.0)))
    mask, positions = reduced["attention_mask"].bool(), reduced["position_ids"]
    for row in range(4):
        place = positions[row][mask[row]]
        assert bool((place.diff() > 0).all()) and int(place[0]) == 0
        assert int(place[-1]) < int(encoded.attention_mask[row].sum())
    assert "position_ids" not in whole or bool((whole["position_ids"].diff() <= 1).all())


def test_weights_pull_a_cell_towards_what_scores_high():
    values = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    weight = torch.tensor([[[[0.1, 0.9], [0.1, 0.9]]]])
    assert interpolation._coarser(values, torch.ones_like(weight), 1, 1).item() == pytest.approx(0.5)
    assert interpolation._coarser(values, weight, 1, 1).item() == pytest.approx(0.9)


def test_answers_do_not_depend_on_the_batch(batch, scorer):
    _, vlm = batch
    tasks = {name: suite_tiny.BENCHMARKS[name] for name in ("page", "choice")}
    ways = {name: WAYS[name] for name in ("interpolation alone", "interpolated, then scored")}
    few, many = (
        way_scores(vlm, scorer, ways, tasks, 0.25, 5, batch_size=size, neighbours=1) for size in (2, 5)
    )
    for task in tasks:
        pd.testing.assert_frame_equal(few[0][task], many[0][task])
        assert few[0][task].shape == (5, 2)
    assert few[1] == many[1] and few[0]["page"].to_numpy().max() > 0


def test_the_summary_pairs_each_way_with_one_of_them():
    scores = {"forms": pd.DataFrame({"one": [1.0, 0.0, 1.0, 0.0], "two": [0.5, 0.0, 1.0, 0.0]})}
    spent, groups = {"one": 0.25, "two": 0.2}, {"forms": "reading"}
    table = interpolation.summary(scores, spent, groups, "one").set_index("way")
    assert table.loc["one", ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    assert table.loc["two", "difference"] == -0.125 and table.loc["two", "spent"] == 0.2
    assert table.loc["two", "score"] == 0.375 and set(table["group"]) == {"reading"}
