"""Schedules of the field: each equals its masked reference, and keeps the laws of its own ranking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import STEPS, cache_bytes, generated, prompt, vlm_of
from staged_reference import STAGED, staged_reference
from tiny import ask

from tokensel.cost import held_tokens, kv_bytes
from tokensel.cost.answers import answer_work, work_cost
from tokensel.methods import check_method
from tokensel.schedules import (
    Clse,
    Feather,
    PriorTR,
    Prompt,
    PyramidDrop,
    RandomCut,
    SparseVLM,
    View,
    cuts_at_depth,
    make_schedule,
    pruned,
)
from tokensel.schedules.clse import evolution, gate, high_pass
from tokensel.schedules.feather import grid_cells
from tokensel.schedules.grids import grids
from tokensel.schedules.sparsevlm import raters
from tokensel.schedules.staged import scaled_cuts
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import reduce_inputs


@pytest.mark.parametrize("rows", [[0], [0, 1, 3]], ids=["one", "ragged"])
@pytest.mark.parametrize("schedule", STAGED.values(), ids=list(STAGED))
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_removal_equals_masking(text, schedule, rows):
    vlm = vlm_of(text)
    reduced = prompt(vlm, rows)
    out, pruning = generated(vlm, reduced, schedule)
    tokens, logits = staged_reference(vlm, reduced, schedule)
    assert pruning.drops
    assert torch.equal(out.sequences, tokens)
    assert torch.allclose(torch.stack(out.logits, 1), logits, atol=1e-4)


WHOLE = [
    PyramidDrop(1.0, (1, 2)),
    Feather(1.0, (1, 2)),
    SparseVLM(0.0, (1, 2)),
    PriorTR(2, 1.0),
    Clse(1.0, (1, 2, 3)),
    RandomCut(2, 1.0),
]


def test_a_ratio_of_1_changes_no_logit():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0, 1])
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    plain = vlm.model.generate(**reduced, **options, do_sample=False)
    for schedule in WHOLE:
        out, pruning = generated(vlm, reduced, schedule, 4)
        assert all(torch.equal(*pair) for pair in zip(plain.logits, out.logits, strict=True)), schedule
        assert not pruning.drops and not pruning.ranked


@pytest.mark.parametrize("schedule", STAGED.values(), ids=list(STAGED))
def test_cached_bytes_and_costs_are_as_counted(schedule):
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0])
    with cache_bytes(vlm) as seen:
        output = vlm.generate_output(reduced, STEPS, schedule)
    config, text = vlm.model.config.text_config, int((~reduced.visual).sum())
    cached = torch.stack(output.pruning.cached)[:, :, 0]
    bytes_each = kv_bytes(config, 1, 4) // config.num_hidden_layers
    assert seen == (held_tokens(text, cached.numpy()) * bytes_each).tolist()
    (work,) = answer_work(vlm.model, reduced, output)
    _, mean_bytes = work_cost(vlm.model.config, work, 4)
    assert mean_bytes == pytest.approx(sum(map(sum, seen)) / len(seen))
    visual, left = int(reduced.visual.sum()), output.pruning.left[0][:, 0].tolist()
    assert left[0] == visual, "the first layer reads the whole prompt in the prefill"
    evicts = getattr(schedule, "evicts", False)
    assert cached[0].tolist() == ([left[-1]] * len(left) if evicts else left)


@pytest.mark.parametrize("schedule", STAGED.values(), ids=list(STAGED))
def test_a_row_is_cut_alike_in_every_batch(schedule):
    vlm = vlm_of("llama")
    together, pruning = generated(vlm, prompt(vlm, [0, 3]), schedule, 2)
    for place, row in enumerate([0, 3]):
        alone = reduce_inputs(vlm.model, ask(vlm, [row], [f"what{'?' * (place + 1)}"], seed=0))
        out, by_itself = generated(vlm, alone, schedule, 2)
        assert torch.equal(out.sequences[0], together.sequences[place])
        assert torch.equal(torch.stack(pruning.left)[:, :, place], torch.stack(by_itself.left)[:, :, 0])
        ranked = [(p.ranked_in(r, 2), len(p.drops)) for p, r in ((pruning, place), (by_itself, 0))]
        if not isinstance(schedule, SparseVLM) and getattr(schedule, "queries", "last") == "last":
            assert ranked[0] == ranked[1]


def test_a_row_without_an_image_and_attention_of_both_kinds():
    texts: dict[str, list[list[str]]] = {}
    for attn in ("sdpa", "eager"):
        vlm = vlm_of("llama", attn)
        reduced, alone = prompt(vlm, [None, 2]), prompt(vlm, [None])
        plain = vlm.generate(alone, 2)
        for name, schedule in STAGED.items():
            texts.setdefault(name, []).append(vlm.generate(reduced, 2, schedule=schedule))
            assert texts[name][-1][:1] == plain
        under = vlm.generate_output(alone, 2, PriorTR(2, 0.5))
        assert under.texts == plain and not under.pruning.drops
    assert all(sdpa == eager for sdpa, eager in texts.values())


# CLSE


def states(seed: int, height: int = 6, width: int = 9, channels: int = 8) -> torch.Tensor:
    return torch.randn(height, width, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (1, 7), (8, 1), (1, 1)])
def test_clse_of_constant_features_is_zero(shape):
    flat = torch.arange(1.0, 9).expand(*shape, 8)
    assert high_pass(flat).max() < 1e-6
    assert evolution(flat, 3 * flat).max() < 1e-3


@given(seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9), scale=st.floats(0.1, 9))
@settings(deadline=None, max_examples=15)
def test_clse_moves_with_flips_and_ignores_a_common_scale(seed, height, width, scale):
    one, two = states(seed, height, width), states(seed + 1, height, width)
    change = evolution(one, two)
    assert bool((change >= 0).all() and (change <= 1).all())
    for dims in ((0,), (1,), (0, 1)):
        torch.testing.assert_close(
            evolution(one.flip(dims), two.flip(dims)), change.flip(dims), rtol=1e-3, atol=1e-4
        )
    turned = evolution(one.transpose(0, 1), two.transpose(0, 1))
    torch.testing.assert_close(turned, change.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(evolution(scale * one, scale * two), change, rtol=1e-3, atol=1e-3)


def test_clse_finds_the_odd_patch_and_its_gate_opens_for_what_changes():
    flat = torch.ones(7, 8, 4)
    odd = flat.clone()
    odd[2, 5] += 3
    assert int(high_pass(odd).argmax()) == 2 * 8 + 5
    opened = gate(evolution(states(0), states(1)))
    change = evolution(states(0), states(1))
    assert bool(((opened > 0.5) == (change > change.mean())).all())


# FEATHER, SparseVLM, grids, the random cut


def columns(*rows: str) -> Prompt:
    """A batch from letters: text ``t``, thumbnail ``s``, cell ``c``, newline ``n``, padding ``-``."""
    letters = [list(row) for row in rows]

    def marks(*kinds: str) -> torch.Tensor:
        return torch.tensor([[letter in kinds for letter in row] for row in letters])

    return Prompt((~marks("-")).long(), marks("s", "c", "n"), marks("n"), marks("s"))


def test_grids_are_read_from_newlines_and_thumbnails():
    read = grids("clse", columns("-t" + "ssss" + "cccn" * 2 + "ttt", "t" + "c" * 9 + "n" + "ccccn" + "t"))
    assert [[list(g.shape) for g in row] for row in read] == [[[2, 2], [2, 3]], [[3, 3], [2, 2]]]
    assert read[0][1].tolist() == [[6, 7, 8], [10, 11, 12]]
    # two images side by side, one of a single tile
    (both,) = grids("clse", columns("ssss" + "cccccn" * 2 + "ccccn" + "t"))
    assert [list(g.shape) for g in both] == [[2, 2], [2, 5], [2, 2]]
    for broken in ("sss" + "ccn", "ssss" + "cccn" + "ccn", "tccct", "ccccn" + "cccn"):
        with pytest.raises(TokenselError, match="cells of an image are missing"):
            grids("clse", columns(broken))
    # without marks, what stands together is a square or one line
    bare = Prompt(torch.ones(1, 8).long(), torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1]]).bool())
    assert [list(g.shape) for g in grids("clse", bare)[0]] == [[2, 2], [1, 2]]


def test_feather_s_grid_is_uniform_and_survives_the_first_cut():
    marked = grid_cells("feather", columns("s" * 16 + ("c" * 7 + "n") * 4 + "t"), 3)
    assert marked[0].nonzero()[:, 0].tolist() == [0, 3, 12, 15, 16, 19, 22, 40, 43, 46]
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0])
    _, pruning = generated(vlm, reduced, Feather(0.4, (1, 3)), 1)
    kept = set(pruning.drops[0].columns[0].tolist())
    assert set(grid_cells("feather", reduced.prompt, 3)[0].nonzero()[:, 0].tolist()) <= kept


def test_attention_without_rotation_does_not_depend_on_positions():
    vlm, seen = vlm_of("llama"), []

    class Spy(Feather):
        def rank(self, view):
            seen.append((view.last(rotate=False), view.last()))
            return super().rank(view)

    reduced = prompt(vlm, [0])
    positions = torch.arange(reduced.visual.shape[1])[None]
    for places in (positions, positions * 3 + 5):
        with torch.no_grad(), pruned(vlm.model, reduced.prompt, Spy(0.5, (1, 3))):
            vlm.model(**(dict(reduced) | {"position_ids": places}), use_cache=False, logits_to_keep=1)
    torch.testing.assert_close(seen[0][0], seen[2][0])
    assert not torch.allclose(seen[0][1], seen[2][1])


def test_sparsevlm_s_raters_are_the_words_that_fit_the_image():
    embeddings = torch.zeros(6, 4)
    embeddings[:3, 0] = 1.0  # the cells
    embeddings[3, 0], embeddings[4, 1], embeddings[5, 2] = 2.0, 2.0, 2.0
    words, cells = torch.arange(6) > 2, torch.arange(6) < 3
    assert raters(embeddings, words, cells).tolist() == [False, False, False, True, False, False]
    embeddings[3] = 0  # no word fits better than another
    assert raters(embeddings, words, cells).tolist() == words.tolist()


@given(scale=st.floats(0.0, 1.0, exclude_min=True), rank=st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_sparsevlm_keeps_at_least_the_rank_and_at_scale_1_no_more(scale, rank):
    vlm = Prompt(torch.ones(1, 16).long(), (torch.arange(16) < 12)[None])
    noise = torch.Generator().manual_seed(rank)
    paid = torch.rand(4, rank, generator=noise) @ torch.rand(rank, 16, generator=noise)
    view = View(
        1, vlm, torch.arange(16)[None], vlm, *[torch.ones(1, 16, 2)] * 3, rows=lambda *_: paid[None, None]
    )
    count = int(SparseVLM(scale, (1,)).count(view))
    assert count == 12 - int(scale * (12 - rank)) >= rank


def test_the_random_cut_depends_on_the_seed():
    vlm = vlm_of("llama")
    kept = [
        set(generated(vlm, prompt(vlm, [0]), RandomCut(2, 0.3, seed=seed), 1)[1].drops[0].columns[0].tolist())
        for seed in (0, 1, 0)
    ]
    assert kept[0] == kept[2] != kept[1] and len(kept[0]) == len(kept[1])


# options


def test_cuts_move_to_the_depth_of_the_model():
    assert scaled_cuts((8, 16, 24), 32) == (8, 16, 24)
    assert scaled_cuts((1, 11, 21), 28) == (1, 10, 18)
    assert scaled_cuts((2, 6, 15), 6) == (1, 2, 3)
    assert cuts_at_depth("clse", 6) == {"cuts": (1, 2, 4)} and cuts_at_depth("fastv", 6) == {}
    assert check_method("random-cut").uses_seed and not check_method("clse").uses_seed


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("pyramiddrop", {"cuts": (3, 2)}, r"cuts is \(3, 2\): give rising layers"),
        ("pyramiddrop", {"cuts": ()}, "give the layers to drop tokens at"),
        ("feather", {"cuts": (0, 2)}, "layer is 0"),
        ("feather", {"stride": 0}, "stride is 0"),
        ("sparsevlm", {"scale": 1.5}, r"scale is 1\.5"),
        ("priortr", {"queries": "all"}, "queries is 'all': choose one of last, question"),
        ("clse", {"cuts": (1, 2)}, "give three layers"),
        ("clse", {"tau": 0.0}, "tau is 0"),
        ("random-cut", {"seed": 1.5}, r"seed is 1\.5: give a whole number"),
    ],
)
def test_bad_options_get_one_line(name, options, line):
    with pytest.raises(TokenselError, match=line) as error:
        make_schedule(name, **options)
    assert "\n" not in str(error.value)


def test_a_scorer_before_a_grid_and_a_fraction_in_advance_get_one_line():
    vlm = vlm_of("llama")
    chosen = reduce_inputs(vlm.model, ask(vlm, [0]), make_scorer("norm"), 0.5)
    for schedule in (Clse(0.5, (1, 2, 3)), Feather(0.5, (1, 2))):
        with pytest.raises(TokenselError, match="cells of an image are missing"):
            vlm.generate(chosen, 2, schedule=schedule)
    with pytest.raises(TokenselError, match="depends on the prompt"):
        SparseVLM(0.5, (1,)).entering(1)


@pytest.mark.parametrize("schedule", [PriorTR(2, 0.4), Clse(0.5, (1, 2, 3))], ids=lambda s: s.name)
def test_several_samples_of_a_prompt_under_a_schedule_that_evicts_everywhere(schedule):
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0, 1])
    greedy = vlm.generate(reduced, 4, schedule=schedule)
    torch.manual_seed(0)
    several = vlm.generate_output(reduced, 4, schedule, do_sample=True, num_return_sequences=2)
    assert len(several.texts) == 4
    coldest = vlm.generate(
        reduced, 4, schedule=schedule, do_sample=True, temperature=1e-4, num_return_sequences=2
    )
    assert coldest == [text for text in greedy for _ in range(2)]
