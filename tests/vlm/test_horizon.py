"""What the image tells at each depth, and where the kept tokens are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import generated, vlm_of
from suite_tiny import page
from tiny import ask

from tokensel.schedules import FastV, RandomCut, Vtw
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import downsample, encode, reduce, reduce_inputs
from tokensel.vlm.horizon import Horizon, measure_horizon
from tokensel.vlm.kept import kept_by_place, kept_cells


def log_likelihood(vlm, image, question, answer, layer):
    """Of an answer that generation with a cache is made to give, step by step: mean log of its tokens."""
    tokenizer = vlm.processor.tokenizer
    ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    images = None if image is None else [image]
    inputs = vlm.inputs(images, [vlm.prompt(question, image is not None)])
    output = vlm.generate_output(
        reduce_inputs(vlm.model, inputs),
        len(ids),
        None if layer is None else Vtw(layer),
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda _row, so_far: [ids[so_far.shape[-1]]],
    )
    assert output.tokens[0].tolist() == ids
    logs = torch.stack(output.model_output.logits, 1)[0].log_softmax(-1)
    return float(logs.gather(1, torch.tensor(ids)[:, None]).mean())


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_likelihoods_are_those_of_the_steps_of_a_generation(text):
    vlm = vlm_of(text)
    images, questions, answers = [page(1), page(2)], ["what??", "where?"], ["cat", "a"]
    found = measure_horizon(vlm, images, questions, answers)
    assert found.withdrawn.shape == (3, 2)
    for i, case in enumerate(zip(images, questions, answers)):
        assert np.log(found.full[i]) == pytest.approx(log_likelihood(vlm, *case, None), abs=1e-4)
        assert np.log(found.blind[i]) == pytest.approx(log_likelihood(vlm, None, *case[1:], None), abs=1e-4)
        for layer in (1, 2, 3):
            expected = log_likelihood(vlm, *case, layer)
            assert np.log(found.withdrawn[layer - 1, i]) == pytest.approx(expected, abs=1e-4)
    assert len({*found.full, *found.blind, *found.withdrawn.flat}) == 2 * 5, "all of them differ"


def test_what_is_told_and_where_the_horizon_is():
    curve = Horizon(np.array([0.9]), np.array([0.1]), np.array([[0.1], [0.5], [0.9], [0.9]]))
    assert curve.told == pytest.approx([0, 0.5, 1, 1])
    assert curve.layer() == 3 and curve.layer(0.4) == 2 and curve.layer(1.1) is None
    dips = Horizon(np.array([0.9]), np.array([0.1]), np.array([[0.9], [0.5], [0.9]]))
    assert dips.layer() == 3, "all later layers have to do without the image as well"
    with pytest.raises(TokenselError, match="likelier"):
        _ = Horizon(np.array([0.1]), np.array([0.1]), np.array([[0.1]])).told
    with pytest.raises(TokenselError, match="1 images, 0 questions"):
        measure_horizon(vlm_of("llama"), [None], [], [])


def test_kept_cells_of_a_scorer_and_of_a_schedule():
    vlm = vlm_of("llama")
    encoded = encode(vlm.model, ask(vlm, [0, 1], ["what?", "where??"], seed=0))
    whole = reduce(encoded)
    assert kept_cells(encoded, whole).all()
    by_norm = reduce(encoded, make_scorer("norm"), 0.4)
    kept = kept_cells(encoded, by_norm)
    assert int(kept.sum()) == int(by_norm.n_visual.sum())
    assert torch.equal(kept, by_norm.kept.flatten()[encoded.layout.source[encoded.layout.cell]])

    _, pruning = generated(vlm, whole, FastV(2, 0.4), 2)
    kept = kept_cells(encoded, pruning)
    assert len(kept) == len(encoded.layout.centres)
    first = int(whole.n_visual[0])
    assert [int(kept[:first].sum()), int(kept[first:].sum())] == pruning.cells[0][-1].tolist()
    marked = whole.visual.clone().fill_(False)
    marked[whole.prompt.cells] = kept
    columns = pruning.drops[-1].columns[0]
    assert set(marked[0].nonzero()[:, 0].tolist()) <= set(columns.tolist())
    _, pruning = generated(vlm, whole, RandomCut(2, 1.0), 2)
    assert kept_cells(encoded, pruning).all()
    with pytest.raises(TokenselError, match="another size"):
        kept_cells(encoded, downsample(encoded, 0.4))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=40), st.integers(1, 12))
def test_shares_by_place_add_up_to_what_is_kept(cells, bins):
    kept, place = torch.tensor([one for one, _ in cells]), torch.tensor([two for _, two in cells])
    shares = kept_by_place(kept, place.float(), bins)
    part = (place.float() * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(part, minlength=bins)
    assert torch.equal(shares.isnan(), counts == 0)
    assert float((shares.nan_to_num() * counts).sum()) == pytest.approx(int(kept.sum()), abs=1e-4)
    assert kept_by_place(torch.ones_like(kept), place.float(), bins).nan_to_num(1).eq(1).all()
