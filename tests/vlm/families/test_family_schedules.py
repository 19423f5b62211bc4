"""Schedules inside the language models of all families: what is removed equals what is only masked."""

import pytest
import tiny_families
import torch
from reference import SCHEDULES, dyrate, generated, masked_reference
from staged_reference import STAGED, staged_reference
from tiny import noise_image

from tokensel.schedules import Clse, Feather
from tokensel.schedules.decoder import decoder_of
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, reduce_inputs
from tokensel.vlm.families.base import run_lengths
from tokensel.vlm.forced import answer_mass, force

SIZES = [(40, 48), (24, 56), (64, 20)]
BATCHES = ([[1]], [[2], [0, 1], []])  # an oblong image; one, two and no image in a row
STEPS = 8
# "row" needs rows that end in newlines, which these families do not have; the others are alike
ONE_LAYER = {name: SCHEDULES[name] for name in ("fastv", "vtw", "none", "exponential", "dyrate")}


# their language models read image tokens both ways, which a shortened causal mask does not say
REFUSED = ("gemma3", "paligemma")


@pytest.fixture(scope="module", params=[name for name in tiny_families.MAKERS if name not in REFUSED])
def vlm(request, tmp_path_factory) -> Vlm:
    loaded = tiny_families.loaded(request.param, tmp_path_factory.mktemp(request.param))
    loaded.model.generation_config.update(eos_token_id=None)
    return loaded


def ask(vlm: Vlm, rows: list[list[int]]):
    images = [[noise_image(*SIZES[i], seed=i) for i in row] for row in rows]
    return vlm.inputs(images, [vlm.prompt("what" + "?" * (n + 2), len(row)) for n, row in enumerate(rows)])


def grids_by_hand(vlm: Vlm, inputs, rows: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Rows and columns of the tiles of each row's images, from the processor's output alone."""
    if "image_grid_thw" in inputs:
        merged = iter((inputs["image_grid_thw"][:, 1:] // 2).tolist())
        return [[tuple(next(merged)) for _ in row] for row in rows]
    if "image_sizes" in inputs:  # Mistral 3 and Pixtral, in pixels; a token is 8 pixels wide
        merged = iter((inputs["image_sizes"] // 8).tolist())
        return [[tuple(next(merged)) for _ in row] for row in rows]
    side = 6 if vlm.model.config.model_type == "llava" else 3
    image = inputs["input_ids"] == vlm.model.config.image_token_id
    return [[(side, side)] * (sum(run_lengths(row[None])) // side**2) for row in image]


@pytest.mark.parametrize("family", REFUSED)
def test_a_language_model_in_which_it_cannot_be_right_gets_one_line(family, tmp_path):
    vlm = tiny_families.loaded(family, tmp_path)
    reduced = reduce_inputs(vlm.model, ask(vlm, [[0]]))
    tokens, lengths = torch.ones(1, 2, dtype=torch.long), torch.tensor([2])
    for call, line in (
        (
            lambda: vlm.generate(reduced, 2, schedule=SCHEDULES["fastv"]),
            "tokens can be dropped or weighed inside one of",
        ),
        (lambda: force(vlm.model, reduced, tokens, lengths), "use model.generate"),
    ):
        with pytest.raises(TokenselError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", BATCHES, ids=["one", "ragged"])
@pytest.mark.parametrize("name", ONE_LAYER)
def test_removal_equals_masking(vlm, name, rows):
    reduced = reduce_inputs(vlm.model, ask(vlm, rows))
    out, pruning = generated(vlm, reduced, ONE_LAYER[name], STEPS)
    tokens, logits = masked_reference(vlm, reduced, ONE_LAYER[name], STEPS)
    assert pruning.drops
    assert torch.equal(out.sequences, tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("rows", BATCHES, ids=["one", "ragged"])
@pytest.mark.parametrize("name", sorted(set(STAGED) - {"clse-lowest"}))
def test_removal_in_stages_equals_masking(vlm, name, rows):
    inputs = ask(vlm, rows)
    reduced = reduce_inputs(vlm.model, inputs)
    out, pruning = generated(vlm, reduced, STAGED[name], STEPS)
    by_hand = grids_by_hand(vlm, inputs, rows)
    tokens, logits = staged_reference(vlm, reduced, STAGED[name], STEPS, by_hand)
    assert pruning.drops
    assert torch.equal(out.sequences, tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-4


def test_a_schedule_after_a_scorer_equals_masking(vlm):
    reduced = reduce_inputs(vlm.model, ask(vlm, BATCHES[1]), make_scorer("norm"), 0.6)
    for schedule in (SCHEDULES["fastv"], dyrate()):
        out, _ = generated(vlm, reduced, schedule, STEPS)
        tokens, logits = masked_reference(vlm, reduced, schedule, STEPS)
        assert torch.equal(out.sequences, tokens)
        assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-4
    for schedule in (Clse(0.5, (1, 2, 3)), Feather(0.5, (1, 2))):
        with pytest.raises(TokenselError, match="cells of an image are missing") as caught:
            vlm.generate(reduced, 2, schedule=schedule)
        assert "\n" not in str(caught.value)


def test_several_samples_of_a_prompt(vlm):
    reduced = reduce_inputs(vlm.model, ask(vlm, [[0], [1, 2]]))
    for schedule in (SCHEDULES["fastv"], Clse(0.5, (1, 2, 3))):
        greedy = vlm.generate(reduced, 4, schedule=schedule)
        coldest = vlm.generate(
            reduced, 4, schedule=schedule, do_sample=True, temperature=1e-4, num_return_sequences=2
        )
        assert coldest == [text for text in greedy for _ in range(2)]


@torch.no_grad()
def test_an_answer_read_at_once_equals_its_steps(vlm):
    reduced = reduce_inputs(vlm.model, ask(vlm, BATCHES[1]))
    options = dict(max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    out = vlm.model.generate(**reduced, **options)
    answer = force(vlm.model, reduced, out.sequences, torch.full((3,), STEPS))
    hidden = decoder_of(vlm.model)(**answer.inputs, use_cache=False).last_hidden_state[:, -STEPS:]
    logits = vlm.model.lm_head(hidden)
    assert (logits - torch.stack(out.logits, 1)).abs().max() < 1e-4
    mass = answer_mass(vlm.model, answer)  # [layers, rows, steps, heads, types]
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
