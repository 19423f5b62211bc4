"""Dropping inside the language model equals masking without removal and without a cache, in every logit."""

import inspect
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from reference import SCHEDULES, STEPS, cache_bytes, dyrate, generated, masked_reference, prompt, vlm_of
from tiny import ask, tiny_vlm

from tokensel.cost import held_tokens, kv_bytes
from tokensel.methods import check_method
from tokensel.profiling.timing import watch_peak
from tokensel.schedules import SCHEDULES as TABLE
from tokensel.schedules import (
    Exponential,
    FastV,
    Fixed,
    RatePredictor,
    Schedule,
    Vtw,
    make_schedule,
    pruned,
    schedule_options,
)
from tokensel.schedules.dyrate import RateConfig
from tokensel.schedules.vtw import choose_layer, withdrawal_divergence
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import reduce_inputs


@pytest.mark.parametrize("rows", [[0], [0, 1, 3]], ids=["one", "ragged"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_removal_equals_masking(text, schedule, rows):
    vlm = vlm_of(text)
    reduced = prompt(vlm, rows)
    out, _ = generated(vlm, reduced, schedule)
    said, logits = masked_reference(vlm, reduced, schedule)
    assert torch.equal(out.sequences, said)
    assert torch.allclose(torch.stack(out.logits, 1), logits, atol=1e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_keeping_all_changes_no_logit(attn):
    vlm = vlm_of("llama", attn)
    reduced = prompt(vlm, [0, 1])
    plain = vlm.model.generate(
        **reduced, output_logits=True, return_dict_in_generate=True, do_sample=False, max_new_tokens=STEPS
    )
    for schedule in (FastV(2, 1.0), Fixed(2, 1.0), Exponential(2, 1.0), dyrate(certain=True)):
        out, pruning = generated(vlm, reduced, schedule)
        assert all(torch.equal(one, two) for one, two in zip(plain.logits, out.logits, strict=True)), (
            schedule.name
        )
        assert not pruning.drops and len(pruning.left) == STEPS


@pytest.mark.parametrize("schedule", [FastV(2, 0.3), dyrate()], ids=["fastv", "dyrate"])
def test_eager_and_sdpa_agree(schedule):
    one, two = (
        generated(vlm, prompt(vlm, [0, 1, 3]), schedule)[0]
        for vlm in (vlm_of("llama"), vlm_of("llama", "eager"))
    )
    assert torch.equal(one.sequences, two.sequences)


@pytest.mark.parametrize(
    "schedule", [FastV(2, 0.5), Exponential(2, 0.8), dyrate()], ids=["fastv", "exponential", "dyrate"]
)
def test_a_ragged_batch_equals_its_rows_alone_and_a_scorer_may_choose_before(schedule):
    vlm = vlm_of("llama")
    together, pruning = generated(vlm, prompt(vlm, [0, 1, 3], keep=0.6), schedule)
    for place, row in enumerate([0, 1, 3]):
        inputs = ask(vlm, [row], [f"what{'?' * (place + 1)}"], seed=0)
        alone, by_itself = generated(
            vlm, reduce_inputs(vlm.model, inputs, make_scorer("norm"), 0.6), schedule
        )
        assert torch.equal(alone.sequences[0], together.sequences[place])
        assert torch.equal(torch.stack(pruning.left)[:, :, place], torch.stack(by_itself.left)[:, :, 0])


@pytest.mark.parametrize(
    "schedule", [FastV(2, 0.25), Vtw(3), Fixed(1, 0.4), Exponential(2, 0.7), dyrate()], ids=lambda s: s.name
)
def test_cached_bytes_are_those_of_the_formula_in_every_layer_at_every_step(schedule):
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0])
    with cache_bytes(vlm) as seen:
        _, pruning = generated(vlm, reduced, schedule)
    text, visual, cells = int((~reduced.visual).sum()), int(reduced.visual.sum()), int(reduced.n_visual)
    config = vlm.model.config.text_config
    left = torch.stack(pruning.left)[:, :, 0]
    held = held_tokens(text, left.numpy())
    assert len(seen) == STEPS and seen == (held * kv_bytes(config, 1, 4) // config.num_hidden_layers).tolist()
    if schedule.name == "fastv":
        kept = round(0.25 * cells) + visual - cells  # newlines stay
        assert left.unique(dim=0).tolist() == [[visual, visual, kept, kept]]
    if schedule.name == "exponential":
        counts = torch.stack(pruning.cells)[:, 3, 0]
        assert counts.tolist() == [max(1, round(0.7**step * cells)) for step in range(STEPS)]
        assert torch.equal(left[:, 3] - counts, torch.full((STEPS,), visual - cells))
    if schedule.name == "dyrate":
        assert len(left[:, 2].unique()) > 2 and list(pruning.ranked) == [(step, 1) for step in range(STEPS)]


def test_recorded_drops_are_what_is_left():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0, 1, 3])
    _, pruning = generated(vlm, reduced, dyrate())
    assert len(pruning.drops) > 2
    for drop, following in zip(pruning.drops, [*pruning.drops[1:], None]):
        for row in range(3):
            columns = drop.columns[row][drop.columns[row] >= 0]
            assert bool((columns.diff() > 0).all())
            assert int(reduced.visual[row, columns].sum()) == int(pruning.left[drop.step][drop.layer, row])
            if following is not None:
                assert set(following.columns[row].tolist()) - {-1} <= set(columns.tolist())


LONG = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tokensel.profiling.timing import watch_peak
from tokensel.schedules import FastV, Prompt, pruned
torch.manual_seed(0)
config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=16, num_attention_heads=4,
                     vocab_size=100, pad_token_id=0, eos_token_id=None)
model = LlamaForCausalLM(config).eval()
model.generation_config.eos_token_id = None
embeds, mask = torch.randn(8, 64, 256), torch.ones(8, 64, dtype=torch.long)
visual = torch.zeros(8, 64, dtype=torch.bool)
visual[:, 4:60] = True
with torch.no_grad():
    model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=2)  # the libraries' own memory
    embeds, mask, visual = embeds.repeat(1, 12, 1), mask.repeat(1, 12), visual.repeat(1, 12)
    peak = watch_peak(torch.device("cpu"))
    before = peak()
    with pruned(model, Prompt(mask, visual), FastV(1, float(sys.argv[1]))):
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=64, do_sample=False)
print(peak() - before)
"""


@pytest.mark.skipif(
    watch_peak(torch.device("cpu"))() is None, reason="this system does not tell its peak memory"
)
def test_the_peak_memory_of_a_generation_falls():
    """By at least half the bytes that the formula leaves uncached; the system counts in pages."""
    peak = {}
    for keep in (1.0, 0.2):
        done = subprocess.run(
            [sys.executable, "-c", LONG, str(keep)], capture_output=True, text=True, check=True
        )
        peak[keep] = int(done.stdout)
    layers, rows, width, visual = 15, 8, 256, 12 * 56
    assert peak[1.0] - peak[0.2] > 0.5 * (2 * 4 * layers * rows * width * 0.8 * visual)


def test_a_second_prompt_under_the_same_hooks_starts_afresh():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0, 1])
    with torch.no_grad(), pruned(vlm.model, reduced.prompt, FastV(2, 0.5)):
        one, two = (vlm.model.generate(**reduced, do_sample=False, max_new_tokens=5) for _ in range(2))
    assert torch.equal(one, two)


def test_answers_through_the_vlm_and_the_hooks_go_away():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0, 1])
    before = vlm.generate(reduced, 6)
    assert vlm.generate(reduced, 6, schedule=make_schedule("vtw", layer=1)) != before
    assert vlm.generate(reduced, 6) == before
    assert not any(layer._forward_pre_hooks for layer in vlm.model.model.language_model.layers)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("fastv", {"keep": 1.5}, "keep is 1.5"),
        ("fastv", {"layer": 0}, "layer is 0"),
        ("vtw", {"layer": 9}, "layer 9 is not inside the 4 layers"),
        ("slowv", {}, "schedule 'slowv' is unknown"),
        ("fixed", {"keep": -0.1}, "keep is -0.1"),
        ("exponential", {"layer": 4}, "layer 4 is not inside the 4 layers"),
        ("dyrate", {"predictor": dyrate(layer=7).predictor}, "layer 7 is not inside the 4 layers"),
        (
            "dyrate",
            {"predictor": dyrate(heads=6).predictor},
            "4 attention heads but this rate predictor was made for 6",
        ),
    ],
)
def test_bad_schedules_are_refused_in_one_line(name, options, line):
    vlm = vlm_of("llama")
    with pytest.raises(TokenselError, match=line) as error:
        vlm.generate(prompt(vlm, [0]), 2, schedule=make_schedule(name, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("vtw", {"keep": 0.5}, "schedule 'vtw' has no option 'keep': it takes layer"),
        ("fastv", {"ratio": 0.5}, "schedule 'fastv' has no option 'ratio': it takes layer, keep, newline"),
        ("dyrate", {}, "schedule 'dyrate' needs its option 'predictor'"),
        ("dyrate", {"predictor": "folder"}, "predictor is a str: give a RatePredictor"),
        ("fastv", {"layer": 2.0}, r"layer is 2\.0: give a whole number"),
        ("fixed", {"layer": np.float64(2)}, r"layer is np\.float64\(2\.0\): give a whole number"),
        ("vtw", {"layer": "2"}, "layer is '2': give a whole number"),
        ("vtw", {"layer": True}, "layer is True: give a whole number"),
        ("vtw", {"layer": None}, "layer is None: give a whole number"),
        ("fastv", {"keep": "0.5"}, r"keep is '0\.5': give a fraction"),
        ("exponential", {"keep": float("nan")}, "keep is nan: give a fraction"),
        ("fixed", {"keep": True}, "keep is True: give a fraction"),
        ("fastv", {"newline": "some"}, "newline is 'some': choose one of keep, drop, row"),
        ("dyrate", {"predictor": dyrate().predictor, "newline": None}, "newline is None: choose one of"),
    ],
)
def test_options_that_no_schedule_takes_get_one_line(name, options, line):
    with pytest.raises(TokenselError, match=line) as error:
        make_schedule(name, **options)
    assert "\n" not in str(error.value)


def test_a_name_of_another_type_gets_one_line():
    with pytest.raises(TokenselError, match=r"schedule \['fastv'\] is unknown: choose one of fastv, vtw"):
        inspect.unwrap(make_schedule)(["fastv"])  # without the type checks of the tests


def test_numbers_of_numpy_are_options_like_any_other():
    schedule = make_schedule("fastv", layer=np.int64(3), keep=np.float32(0.25))
    assert schedule == FastV(3, 0.25) and repr(schedule) == "FastV(layer=3, keep=0.25, newline='keep')"


@pytest.mark.parametrize("name", TABLE)
def test_options_are_read_from_the_class_and_the_protocol_holds(name):
    options = {"predictor": dyrate().predictor} if "predictor" in schedule_options(name) else {}
    schedule = make_schedule(name, **options)
    assert isinstance(schedule, Schedule) and schedule.name == name
    assert schedule.uses_keep == ("keep" in schedule_options(name))


def test_a_schedule_is_one_class_and_one_row(monkeypatch):
    @dataclass(frozen=True)
    class Late:
        """All visual tokens up to a decode step, none of them afterwards."""

        step: int = 2
        name: ClassVar[str] = "late"
        uses_keep: ClassVar[bool] = False
        newline: ClassVar[str] = "drop"

        def entering(self, layer, step=0, mass=None):
            return 1.0 if step < self.step else 0.0

        def layers(self):
            return (1,)

    monkeypatch.setitem(TABLE, "late", Late)
    assert check_method("norm+late").schedule == "late"
    vlm = tiny_vlm()
    output = vlm.generate_output(prompt(vlm, [0]), 4, schedule=make_schedule("late", step=3))
    assert [int(step[1, 0]) for step in output.pruning.left[2:4]] == [int(output.pruning.left[0][1, 0]), 0]


@torch.no_grad()
def test_vtw_chooses_the_first_layer_after_which_the_image_hardly_matters():
    vlm = vlm_of("llama")
    samples = [prompt(vlm, [0, 1]), prompt(vlm, [3])]
    divergence = withdrawal_divergence(vlm.model, samples)
    assert list(divergence) == [1, 2, 3] and all(value > 0 for value in divergence.values())
    for layer in divergence:
        total = 0.0
        for sample in samples:
            full = vlm.model(**sample).logits[:, -1].double().softmax(-1)
            with pruned(vlm.model, sample.prompt, Vtw(layer)):
                given = vlm.model(**sample).logits[:, -1].double().softmax(-1)
            total += float((given * (given / full).log()).sum())
        assert divergence[layer] == pytest.approx(total / 3, rel=1e-4)
    assert (
        choose_layer({1: 0.5, 2: 0.002, 3: 0.004}) == 2 and choose_layer({1: 0.5, 2: 0.2}, threshold=1.0) == 1
    )
    with pytest.raises(TokenselError, match=r"no layer is below it, the lowest is 0\.2"):
        choose_layer({1: 0.5, 2: 0.2})
    with pytest.raises(TokenselError, match="no samples"):
        withdrawal_divergence(vlm.model, [])


def test_a_predictor_saves_and_loads_with_its_card(tmp_path):
    predictor = dyrate().predictor
    predictor.save_pretrained(tmp_path / "dyrate")
    again = RatePredictor.from_pretrained(tmp_path / "dyrate")
    mass = torch.rand(5, 4, 4)
    assert torch.equal(again(mass), predictor(mass)) and again.config.layer == 2
    assert predictor.keeps.tolist() == [1 - k / 8 for k in range(8)]
    card = (tmp_path / "dyrate" / "README.md").read_text()
    assert "2501.14204" in card and "| rates | 8 |" in card
    with pytest.raises(TokenselError, match="no such folder"):
        RatePredictor.from_pretrained(tmp_path / "nothing")
    with pytest.raises(TokenselError, match="rates is 1"):
        RatePredictor(RateConfig(rates=1))
