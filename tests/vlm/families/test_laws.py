"""What holds for every family: nothing dropped changes nothing, and dropping equals masking."""

import pytest
import tiny_families
import torch
from tiny import noise_image, tiny_selector

from tokensel.scorers import SCORERS, make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, downsample, encode, reduce, reduce_inputs
from tokensel.vlm.families import family_of

SIZES = [(40, 48), (24, 56), (32, 32), (64, 20)]
# rows by number of image: one row; two ragged rows with one and two images; an image row and a text row
BATCHES = ([[0]], [[1], [2, 0]], [[3], []], [[], [0, 1], [2]])
NEW = 8


@pytest.fixture(scope="module", params=tiny_families.MAKERS)
def vlm(request, tmp_path_factory) -> Vlm:
    return tiny_families.loaded(request.param, tmp_path_factory.mktemp(request.param))


def fitting(vlm: Vlm, rows: list[list[int]]) -> list[list[int]]:
    """The rows, with an image in each where the family needs one."""
    needs_image = family_of(vlm.model.config).needs_image
    return [row or [3] for row in rows] if needs_image else rows


def ask(vlm: Vlm, rows: list[list[int]]):
    images = [[noise_image(*SIZES[i], seed=i) for i in row] for row in rows]
    prompts = [vlm.prompt("what" + "?" * n, len(row)) for n, row in enumerate(rows)]
    return vlm.inputs(images, prompts)


def generated(vlm: Vlm, inputs, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens ``[rows, steps]`` and logits ``[rows, steps, words]`` of the prefill and further steps."""
    options = dict(min_new_tokens=NEW + 1, max_new_tokens=NEW + 1, do_sample=False) | options
    out = vlm.model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -NEW - 1 :], torch.stack(out.logits, 1)


@pytest.mark.parametrize("rows", BATCHES)
def test_nothing_dropped_changes_no_logit(vlm, rows):
    rows = fitting(vlm, rows)
    inputs = ask(vlm, rows)
    reduced = reduce_inputs(vlm.model, inputs)
    tokens, logits = generated(vlm, inputs)
    for given in (reduced, reduce_inputs(vlm.model, inputs, make_scorer("norm"), 1.0)):
        ours, ours_logits = generated(vlm, given)
        assert (ours_logits - logits).abs().max() == 0.0 and torch.equal(ours, tokens)
    assert torch.equal(reduced.n_visual, reduced.n_visual_full)
    assert ((reduced.n_visual > 0) == torch.tensor([len(row) > 0 for row in rows])).all()
    assert logits.std() > 0.3  # else every equality here would hold by being near zero


@torch.no_grad()
def masked_logits(vlm: Vlm, inputs, kept: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """One full-length forward of prompt and answer in which nobody attends to the dropped placeholders."""
    steps = tokens.shape[1] - 1
    full = reduce_inputs(vlm.model, inputs)
    prompt = inputs["attention_mask"].bool()
    positions = full.get("position_ids", (prompt.long().cumsum(-1) - 1).clamp(min=0))
    further = positions[..., -1:] + 1 + torch.arange(steps)
    stay = prompt.clone()
    stay[encode(vlm.model, inputs).places.unbind(1)] = kept
    embedding = vlm.model.get_input_embeddings()
    more = {name: value for name, value in full.items() if name.startswith("mm_")}
    if "input_ids" in full:  # Gemma 3 and PaliGemma
        prompts, outputs = embedding(full["input_ids"]), more.pop("mm_encoder_outputs")
        prompts = prompts.masked_scatter(full.visual[..., None], torch.cat(outputs["image"].pooler_output))
        pali = vlm.model.config.model_type == "paligemma"
        # an answer is read one way, and positions begin at 1 in PaliGemma
        types = torch.full_like(tokens[:, :-1], int(pali))
        more["token_type_ids"] = torch.cat([full["token_type_ids"], types], 1)
        positions, further = positions + pali, further + pali
    else:
        prompts = full["inputs_embeds"]
    embeds = torch.cat([prompts, embedding(tokens[:, :-1])], 1)
    out = vlm.model(
        inputs_embeds=embeds,
        attention_mask=torch.cat([stay, torch.ones_like(tokens[:, :-1]).bool()], 1).long(),
        position_ids=torch.cat([positions, further], -1),
        **more,
    )
    return out.logits[:, -steps - 1 :]


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("scorer", ["norm", "uniform"])
def test_half_dropped_equals_the_masked_full_prompt(vlm, rows, scorer):
    inputs = ask(vlm, fitting(vlm, rows))
    encoded = encode(vlm.model, inputs)
    reduced = reduce(encoded, make_scorer(scorer), 0.5)
    assert reduced["attention_mask"].shape[1] < inputs["input_ids"].shape[1]
    tokens, logits = generated(vlm, reduced)
    places = encoded.layout.source  # without newlines each packed token is a cell
    kept = reduced.kept.flatten()[places]
    masked = masked_logits(vlm, inputs, kept, tokens)
    assert (logits - masked).abs().max() < 1e-4
    whole = masked_logits(vlm, inputs, torch.ones_like(kept), tokens)
    assert (whole - masked).abs().max() > 1e-2  # what is dropped is seen in the logits


@pytest.mark.parametrize("scorer", ["norm", "uniform", "random", "diversity"])
def test_a_batch_equals_its_rows_alone(vlm, scorer):
    rows = fitting(vlm, [[1], [2, 0], [], [3]])
    batch = reduce_inputs(vlm.model, ask(vlm, rows), make_scorer(scorer), 0.4)
    tokens, logits = generated(vlm, batch)
    prompts = [vlm.prompt("what" + "?" * n, len(row)) for n, row in enumerate(rows)]
    for n, row in enumerate(rows):
        images = [[noise_image(*SIZES[i], seed=i) for i in row]]
        alone = reduce_inputs(vlm.model, vlm.inputs(images, prompts[n : n + 1]), make_scorer(scorer), 0.4)
        assert torch.equal(alone.n_visual, batch.n_visual[n : n + 1])
        ours, ours_logits = generated(vlm, alone)
        assert torch.equal(ours[0], tokens[n]) and (ours_logits[0] - logits[n]).abs().max() < 1e-4


def new_tokens(vlm: Vlm, reduced, **options) -> torch.Tensor:
    """What ``generate`` returns, without the prompt, which comes first where it is given ids."""
    prompt = reduced["input_ids"].shape[1] if "input_ids" in reduced else 0
    return vlm.model.generate(**reduced, **options)[:, prompt:]


def test_beams_and_several_sequences_equal_those_of_rows_alone(vlm):
    rows = [[1], [2, 0]]
    batch = reduce_inputs(vlm.model, ask(vlm, rows), make_scorer("norm"), 0.5)
    options = dict(num_beams=2, num_return_sequences=2, max_new_tokens=5, do_sample=False)
    tokens = new_tokens(vlm, batch, **options)
    assert tokens.shape[0] == 4
    assert torch.equal(new_tokens(vlm, batch, **options), tokens)  # the inputs are what they were
    prompts = [vlm.prompt("what" + "?" * n, len(row)) for n, row in enumerate(rows)]
    for n, row in enumerate(rows):
        images = [[noise_image(*SIZES[i], seed=i) for i in row]]
        alone = reduce_inputs(vlm.model, vlm.inputs(images, prompts[n : n + 1]), make_scorer("norm"), 0.5)
        ours = new_tokens(vlm, alone, **options)
        assert torch.equal(ours[:, : tokens.shape[1]], tokens[2 * n : 2 * n + 2, : ours.shape[1]])


@torch.no_grad()
def test_other_embeddings_take_the_places_of_the_visual_tokens(vlm):
    rows = fitting(vlm, [[0, 1], [], [2]])
    encoded = encode(vlm.model, ask(vlm, rows))
    reduced = reduce(encoded)
    visual = encoded.family.project(encoded, torch.ones(len(encoded.layout.source), dtype=torch.bool))
    logits = vlm.model(**reduced).logits
    assert torch.equal(vlm.model(**reduced.with_visual(visual)).logits, logits)
    other = vlm.model(**reduced.with_visual(visual * 2)).logits
    moved = (other - logits).abs().amax((1, 2))
    for row, change in zip(rows, moved):  # a row of text alone stays what it was
        assert change > 1e-2 if row else change < 1e-4


def test_a_keep_ratio_is_kept_for_each_image(vlm):
    encoded = encode(vlm.model, ask(vlm, [[0, 1], [2]]))
    for budget in ("image", "tile"):
        kept = reduce(encoded, make_scorer("uniform"), 0.3, budget=budget).kept
        image = encoded.layout.image[kept.flatten()[encoded.layout.source]]
        full = torch.bincount(encoded.layout.image)
        assert torch.bincount(image).tolist() == [max(1, round(0.3 * n)) for n in full.tolist()]


def test_every_scorer_works_or_is_refused_in_one_line(vlm):
    encoded = encode(vlm.model, ask(vlm, [[0], [1, 2]]))
    worked = set()
    for name in set(SCORERS) - {"selector"}:
        try:
            reduced = reduce(encoded, make_scorer(name), 0.4)
        except TokenselError as error:
            assert "\n" not in str(error)
        else:
            assert 0 < int(reduced.n_visual[0]) < int(reduced.n_visual_full[0])
            worked.add(name)
    assert worked >= {"random", "uniform", "norm", "diversity", "dart"}
    assert ("apet" in worked) == (vlm.model.config.model_type != "qwen3_vl")  # which merges tokens
    with pytest.raises(TokenselError, match=r"no selector is trained|was trained for features of width"):
        reduce(encoded, make_scorer("selector", selector=tiny_selector(12)), 0.4)


def test_what_cannot_be_right_is_refused_in_one_line(vlm):
    inputs = ask(vlm, [[0]])
    encoded = encode(vlm.model, inputs)
    several_axes = encoded.positions is not None
    calls = [
        (lambda: downsample(encoded, 0.5), "know LLaVA.s tiles"),
        (
            lambda: encode(vlm.model, {**inputs, "pixel_values_videos": torch.zeros(1)}),
            "without video_grid_thw" if encoded.family.videos else "videos cannot be reduced in",
        ),
    ]
    if several_axes:
        calls.append((lambda: reduce(encoded, positions="compact"), "use 'original'"))
    if encoded.family.needs_image:
        calls.append((lambda: vlm.inputs([None], ["what?"]), "give at least one image"))
        text = torch.ones(1, 3, dtype=torch.long)
        calls.append((lambda: encode(vlm.model, {"input_ids": text}), "give each row one"))
    if encoded.cls_attention is None:
        calls.append((lambda: reduce(encoded, make_scorer("cls"), 0.5), "no CLS attention"))
    for call, line in calls:
        with pytest.raises(TokenselError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_prompt_longer_than_the_sliding_window_is_reported_where_tokens_are_dropped(
    family, tmp_path, recwarn
):
    vlm = tiny_families.loaded(family, tmp_path)
    encoded = encode(vlm.model, ask(vlm, [[0]]))
    reduce(encoded, make_scorer("uniform"), 0.5)
    vlm.model.config.text_config.sliding_window = 8
    reduce(encoded)
    assert not [warning for warning in recwarn if "window" in str(warning.message)]
    with pytest.warns(UserWarning, match="more than the sliding window of 8"):
        reduce(encoded, make_scorer("uniform"), 0.5)
