"""Prompts, answers and evaluations where the model is on a device of its own: all as on the host."""

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import suite_tiny
import tiny_families
import torch
from reference import SCHEDULES, dyrate, prompt, vlm_of
from staged_reference import STAGED
from stand_in import NAME, stand_in
from tiny import (
    ask,
    noise_image,
    onevision_processor,
    tiny_learned,
    tiny_onevision,
    tiny_selector,
    tiny_vlm,
)

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.budget import fraction_count, hard, rank, top_count, top_fraction
from tokensel.cost import answer_costs, answer_work
from tokensel.data.encoders import VisionEncoder
from tokensel.doctor import examine
from tokensel.methods import Batch, methods, prepare
from tokensel.schedules import Clse, FastOcr, FastV
from tokensel.schedules.vtw import withdrawal_divergence
from tokensel.scorers import SCORERS, make_scorer
from tokensel.serving import embeddings_field, prompt_embeddings
from tokensel.serving.places import append_places, pending_positions, placed_positions, split_places
from tokensel.serving.pruning import GridPruner, TilePruner
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, count_tokens, encode, load_encoder, load_vlm, reduce, reduce_inputs
from tokensel.vlm.bias import biased
from tokensel.vlm.followup import follow_up
from tokensel.vlm.forced import answer_mass, force, forced_logits
from tokensel.vlm.horizon import measure_horizon
from tokensel.vlm.kept import kept_by_place, kept_cells
from tokensel.vlm.native import switch_off

ROWS = [1, 3]


def close(there: torch.Tensor, here: torch.Tensor) -> bool:
    """Whether a tensor of the device has the values of one on the host, up to rounding."""
    return there.device.type == NAME and torch.allclose(there.cpu(), here, rtol=1e-4, atol=1e-5)


@pytest.fixture
def device():
    with stand_in() as device:
        yield device


def llava_next() -> Vlm:
    return tiny_vlm()


def llava_onevision() -> Vlm:
    model, processor = tiny_onevision(), onevision_processor()
    return Vlm(model, processor, "tiny", switch_off(model, processor))


def pair(make, device) -> tuple[Vlm, Vlm]:
    """The same model on the host and on the device."""
    here, there = make(), make()
    there.model.to(device)
    return here, there


@pytest.mark.parametrize(
    ("name", "attn"),
    [
        ("fastv-drop", "eager"),
        ("fastv-3", "sdpa"),
        ("vtw", "sdpa"),
        ("fixed", "sdpa"),
        ("exponential-row", "sdpa"),
        ("dyrate", "sdpa"),
        ("fastocr", "sdpa"),
        *[(name, "sdpa") for name in STAGED],
    ],
)
def test_a_schedule_drops_the_same_in_prefill_and_decoding(device, name, attn):
    here, there = pair(lambda: vlm_of("mistral", attn), device)
    schedules = [(SCHEDULES | STAGED | {"fastocr": FastOcr(2, 0.3)})[name]] * 2
    if name == "dyrate":
        schedules = [dyrate(), dyrate()]
        schedules[1].predictor.to(device)
    outputs = [
        vlm.generate_output(prompt(vlm, ROWS), 3, schedule)
        for vlm, schedule in zip((here, there), schedules, strict=True)
    ]
    expected, output = outputs
    assert output.tokens.device.type == output.lengths.device.type == NAME
    assert output.texts == expected.texts and torch.equal(output.tokens.cpu(), expected.tokens)
    for counts in ("left", "cells"):
        for step, of_host in zip(
            getattr(output.pruning, counts), getattr(expected.pruning, counts), strict=True
        ):
            assert step.device.type == "cpu" and torch.equal(step, of_host)
    for drop, of_host in zip(output.pruning.drops, expected.pruning.drops, strict=True):
        assert drop.columns.device.type == "cpu" and torch.equal(drop.columns, of_host.columns)
    works = [
        answer_work(vlm.model, prompt(vlm, ROWS), out)
        for vlm, out in zip((here, there), outputs, strict=True)
    ]
    assert works[0] == works[1]
    costs = [
        answer_costs(vlm.model, prompt(vlm, ROWS), out)
        for vlm, out in zip((here, there), outputs, strict=True)
    ]
    assert costs[0] == costs[1]


def test_several_answers_and_sampled_ones(device):
    here, there = pair(lambda: vlm_of("llama"), device)
    for options in ({"num_beams": 2, "num_return_sequences": 2}, {"output_logits": True}):
        texts = [vlm.generate(prompt(vlm, ROWS, 0.5), 3, **options) for vlm in (here, there)]
        assert texts[0] == texts[1]
    torch.manual_seed(0)
    sampled = {"do_sample": True, "num_return_sequences": 2, "schedule": SCHEDULES["fastv"]}
    assert len(there.generate(prompt(there, ROWS), 2, **sampled)) == 2 * len(ROWS)


def test_teacher_forcing_and_attention_mass(device):
    here, there = pair(lambda: vlm_of("qwen2"), device)
    masses = []
    for vlm in (here, there):
        reduced = prompt(vlm, ROWS)
        output = vlm.generate_output(reduced, 4)
        forced = force(vlm.model, reduced, output.tokens, output.lengths)
        masses.append(answer_mass(vlm.model, forced))
    tensors = (*forced.inputs.values(), forced.visual, forced.cells, forced.types, forced.attn_mask)
    assert all(tensor.device.type == NAME for tensor in (*tensors, forced.labels))
    assert close(masses[1], masses[0])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_proportional_attention(device, attn):
    here, there = pair(lambda: vlm_of("mistral", attn), device)
    results = []
    for vlm in (here, there):
        reduced = reduce_inputs(
            vlm.model, ask(vlm, ROWS), make_scorer("norm"), 0.3, attention="proportional", strength=0.5
        )
        output = vlm.generate_output(reduced, 4, num_beams=2)
        with torch.no_grad():
            forced = force(vlm.model, reduced, output.tokens, output.lengths)
            logits = forced_logits(vlm.model, forced)
        with biased(vlm.model, reduced.attn_bias, layers=[1], heads=[0, 3]):
            results.append((reduced.attn_bias, logits, vlm.model(**reduced).logits.detach(), output.texts))
    assert results[0][3] == results[1][3]
    assert all(close(one, other) for one, other in zip(results[1][:3], results[0][:3], strict=True))


@pytest.mark.parametrize("dropped", ["masked", "blank", "copied"])
def test_something_else_in_the_place_of_dropped_tokens(device, dropped):
    texts, logits = [], []
    for vlm in pair(lambda: vlm_of("mistral"), device):
        reduced = reduce_inputs(vlm.model, ask(vlm, ROWS), make_scorer("norm"), 0.3, dropped=dropped)
        texts.append(vlm.generate(reduced, 3))
        with biased(vlm.model, reduced.attn_bias):
            logits.append(vlm.model(**reduced).logits.detach())
    assert texts[0] == texts[1] and close(logits[1], logits[0])


def test_vtw_chooses_its_layer(device):
    divergences = [
        withdrawal_divergence(vlm.model, [prompt(vlm, [0]), prompt(vlm, [1, 3])])
        for vlm in pair(lambda: vlm_of("llama"), device)
    ]
    assert divergences[1] == pytest.approx(divergences[0], rel=1e-3)


def test_the_horizon_and_where_tokens_are_kept(device):
    curves, shares = [], []
    for vlm in pair(lambda: vlm_of("llama"), device):
        curve = measure_horizon(vlm, [noise_image(40, 48), None], ["what?", "who?"], ["a", "no"])
        curves.append(np.concatenate([curve.full, curve.blind, curve.withdrawn.flat]))
        encoded = encode(vlm.model, ask(vlm, ROWS, ["what?", "who??"], seed=0))
        whole, norm = reduce(encoded), reduce(encoded, make_scorer("norm"), 0.4)
        pruning = vlm.generate_output(whole, 1, FastV(2, 0.4)).pruning
        kept = [kept_cells(encoded, chosen) for chosen in (norm, pruning)]
        assert all(marks.device.type == "cpu" for marks in kept)
        shares.append(torch.stack([kept_by_place(marks, encoded.layout.centres[:, 0], 4) for marks in kept]))
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert torch.equal(*shares)


def test_a_second_question_on_the_kept_cache(device):
    for schedule in (None, FastV(2, 0.4)):
        asked = [
            follow_up(vlm, prompt(vlm, ROWS, 0.5 if schedule is None else 1.0), ["who", "why?"], 3, schedule)
            for vlm in pair(lambda: vlm_of("llama"), device)
        ]
        assert asked[1].output.tokens.device.type == NAME and asked[1].spans.device.type == "cpu"
        assert torch.equal(asked[0].spans, asked[1].spans)
        assert (asked[0].first, asked[0].second) == (asked[1].first, asked[1].second)


@pytest.mark.parametrize("make", [llava_next, llava_onevision])
def test_every_method_makes_the_same_prompts(device, make):
    images, questions = [noise_image(40, 48), None, noise_image(90, 30)], ["what?", "and?", "who?"]
    batches = [Batch(vlm, images, questions) for vlm in pair(make, device)]
    with torch.no_grad():
        for name, row in methods().items():
            if row.needs_cls_attention if make is llava_onevision else name == "native":
                continue
            results = []
            for batch, where in zip(batches, ("cpu", device), strict=True):
                scorer = make_scorer(row.scorer, **tiny_learned(where)) if row.scorer else None
                choices = {"newline": "row", "thumbnail": "keep"} if row.chooses else {}
                results.append(prepare(batch, name, 0.3, choices, scorer))
            expected, reduced = results
            assert close(reduced["inputs_embeds"], expected["inputs_embeds"])
            assert close(reduced["attention_mask"], expected["attention_mask"])
            assert reduced.visual.device.type == NAME
            for counts in ("n_visual", "n_visual_full", "n_newline", "n_tiles"):
                count = getattr(reduced, counts)
                assert count.device.type == "cpu" and torch.equal(count, getattr(expected, counts))


@pytest.mark.parametrize("family", tiny_families.MAKERS)
def test_other_families_make_the_same_prompts_and_answers(device, family, tmp_path):
    tiny_families.save(family, tmp_path)
    needs_image = family == "paligemma"
    images = [noise_image(40, 48), noise_image(20, 30) if needs_image else None, [noise_image(30, 60)] * 2]
    questions = ["what?", "and?", "who?"]
    batches = [
        Batch(vlm, images, questions) for vlm in pair(lambda: load_vlm(tmp_path, device="cpu"), device)
    ]
    for name in ("full", *([] if needs_image else ["none"]), "norm", "uniform", "cdpruner", "apet"):
        scorer = make_scorer(name) if name in SCORERS else None
        if (name, family) == ("apet", "qwen3_vl"):
            with pytest.raises(TokenselError, match="merges dropped tokens"):
                prepare(batches[1], name, 0.4, {}, scorer)
            continue
        expected, reduced = (prepare(batch, name, 0.4, {}, scorer) for batch in batches)
        assert reduced.keys() == expected.keys()
        assert all(close(reduced[key], expected[key]) for key in expected if key != "mm_encoder_outputs")
        expected, answers = (
            batch.vlm.generate(made, 6) for batch, made in zip(batches, (expected, reduced), strict=True)
        )
        assert answers == expected
    if family not in ("gemma3", "paligemma"):  # no schedule runs inside these
        full, schedule = [prepare(batch, "full") for batch in batches], Clse(0.5, (1, 2, 3))
        expected, answers = (
            batch.vlm.generate(made, 6, schedule) for batch, made in zip(batches, full, strict=True)
        )
        assert answers == expected
    assert examine(batches[1].vlm)[4:] == examine(batches[0].vlm)[4:]  # all but where the model is
    encoder = load_encoder(tmp_path)
    expected = encoder.encode([noise_image(40, 48), noise_image(30, 60)])
    there = encoder.to(device).encode([noise_image(40, 48), noise_image(30, 60)])
    assert there.tokens.device.type == "cpu" and torch.allclose(there.tokens, expected.tokens, atol=1e-4)
    scorer = make_scorer("selector", selector=tiny_selector(encoder.width).to(device))
    scores = scorer(expected.to(device))
    on_host = make_scorer("selector", selector=tiny_selector(encoder.width))
    assert scores.device.type == NAME and close(scores, on_host(expected))


@pytest.mark.parametrize("name", [*SCORERS, "lowest-norm"])
def test_scorers_and_budgets_stay_with_their_features(device, name):
    encoder = VisionEncoder.from_vlm(tiny_vlm().model, tiny_vlm().processor)
    pixels = encoder.preprocess([noise_image(40, 48), noise_image(30, 20)], tiles="anyres")
    scorer = make_scorer(name, **tiny_learned(device))
    on_host = encoder.features(pixels, cls_attention=True)
    on_host.keys = torch.arange(len(on_host))
    generator, shape = torch.Generator().manual_seed(0), on_host.tokens.shape[:2]
    on_host.valid = torch.rand(shape, generator=generator) < 0.9
    on_host.tile = torch.arange(len(on_host))[:, None].expand(shape)
    on_host.centre, on_host.relevance = torch.rand(*shape, 2, generator=generator), torch.rand(shape)
    on_device = on_host.to(device)
    encoder.to(device)
    assert close(encoder.features(pixels, cls_attention=True).tokens, on_host.tokens)
    scores = scorer(on_device)
    kept = top_fraction(scores, 0.3, on_device.valid)
    count = fraction_count(on_device.valid.sum(1), 0.3)
    assert scores.device.type == kept.device.type == count.device.type == NAME
    assert torch.equal(top_count(scores, count, on_device.valid), kept)
    assert hard(scores, on_device.valid).device.type == NAME
    assert torch.equal(rank(scores, on_device.valid).cpu(), rank(scores.cpu(), on_host.valid))
    if name == "selector":
        chooser = scorer.model
        assert torch.equal(chooser.keep_mask(on_device.tokens, 0.3, on_device.valid).cpu(), kept.cpu())
        assert chooser.keep_mask(on_device.tokens, None, on_device.valid).device.type == NAME
    scorer = make_scorer(name, **tiny_learned())
    assert close(scores, scorer(on_host))
    assert encoder.encode([noise_image(24, 24)]).tokens.device.type == "cpu"
    assert (
        encoder.fingerprint() == VisionEncoder.from_vlm(tiny_vlm().model, tiny_vlm().processor).fingerprint()
    )


def test_an_evaluation_writes_the_same_table(device, tmp_path):
    config = EvalConfig(
        model=str(suite_tiny.save_models(tmp_path)),
        selector=str(tmp_path / "selector"),
        suite="suite_tiny",
        benchmarks=("choice",),
        methods=("full", "selector+fastv"),
        keeps=(0.3,),
        layer=1,
        n=2,
        batch_size=2,
    )
    tables = [
        evaluate(replace(config, out=str(tmp_path / where), device=where), progress=False).table.read_text()
        for where in ("cpu", NAME)
    ]
    assert tables[0] == tables[1]


def test_prompts_leave_the_device_when_they_are_sent(device):
    here, there = pair(llava_next, device)
    rows, expected = (
        prompt_embeddings(vlm.model, ask(vlm, [0, 3]), make_scorer("norm"), 0.3) for vlm in (there, here)
    )
    assert all(close(row, of_host) for row, of_host in zip(rows, expected, strict=True))
    sent = torch.load(io.BytesIO(base64.b64decode(embeddings_field(rows[0]))), weights_only=True)
    assert torch.equal(sent, rows[0].cpu())


def test_an_engine_on_the_device_embeds_the_same_tokens(device):
    embeds = []
    for vlm in pair(llava_next, device):
        inputs, core = ask(vlm, [0, 3]), vlm.model.base_model
        vlm.model.config.tokensel = {"model": "tiny", "scorer": "norm"}

        def tower(pixels: torch.Tensor, vlm=vlm) -> torch.Tensor:
            encoded = replace(encode(vlm.model, ask(vlm, [0])), pixel_values=pixels)
            return encoded.family.run(encoded).tokens

        pruner = TilePruner(vlm.model.config, tower, core.multi_modal_projector, core.image_newline)
        embeds.append(pruner.embed(inputs["pixel_values"], inputs["image_sizes"], [0.5, 0.3]))
    assert all(close(there, here) for here, there in zip(*embeds, strict=True))


def test_an_engine_on_the_device_places_the_same_tokens(device, tmp_path):
    sent = []
    tiny_families.save("qwen2_5_vl", tmp_path)
    for where in ("cpu", device):
        vlm = load_vlm(tmp_path, device=where)
        core: Any = vlm.model.base_model
        inputs = vlm.inputs([noise_image(40, 90)], [vlm.prompt("what?")])
        vlm.model.config.tokensel = {"model": "tiny", "scorer": "norm"}

        def tower(pixels: torch.Tensor, grids: torch.Tensor, core=core) -> tuple[torch.Tensor, torch.Tensor]:
            out = core.get_image_features(pixels, grids.to(pixels.device), return_dict=True)
            return out.last_hidden_state, torch.cat(list(out.pooler_output))

        pruner = GridPruner(vlm.model.config, tower, core.visual.merger)
        grids = inputs["image_grid_thw"].cpu()
        ((embeds, places),) = pruner.embed(inputs["pixel_values"].to(where), grids, [0.3])
        embeds, places = split_places(append_places(embeds, places.to(embeds.device)))
        positions = pending_positions(len(embeds) + 2, [(1, len(embeds), 8)]).to(where)
        coming = torch.arange(1, len(embeds) + 1).to(where)
        sent.append((embeds, placed_positions(positions, coming, places)))
    (embeds, positions), (of_device, placed) = sent
    assert close(of_device, embeds) and torch.equal(placed.cpu(), positions)


def test_inputs_may_be_on_either_side(device):
    vlm = tiny_vlm()
    inputs = dict(ask(vlm, [0, None, [1, 3]]))
    vlm.model.to(device)
    expected = reduce_inputs(vlm.model, inputs, make_scorer("norm"), 0.3)
    moved = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }
    reduced = reduce_inputs(vlm.model, moved, make_scorer("norm"), 0.3)
    assert torch.equal(reduced["inputs_embeds"], expected["inputs_embeds"])
    assert torch.equal(reduced.copy()["inputs_embeds"], expected["inputs_embeds"])
    assert count_tokens(vlm.model, 40, 48)[0] > 1
