"""Dropping inside the language model equals masking without removal and without a cache, in every logit."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from tiny import ask, scale_up, tiny_config, tiny_processor, tiny_vlm
from transformers import LlavaNextForConditionalGeneration, Qwen2Config

from tokensel.budget import fraction_count, top_count
from tokensel.cost import held_tokens, kv_bytes
from tokensel.profiling.timing import watch_peak
from tokensel.schedules import DyRate, Exponential, FastV, Fixed, RatePredictor, Vtw, make_schedule, pruned
from tokensel.schedules.attention import TYPES
from tokensel.schedules.dyrate import RateConfig
from tokensel.schedules.vtw import choose_layer, withdrawal_divergence
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, reduce_inputs

STEPS = 16


def dyrate(layer: int = 2, heads: int = 4, certain: bool = False) -> DyRate:
    """Eight rates, the smaller the more a row looks at its picture and its answer. Or always the first."""
    predictor = RatePredictor(RateConfig(heads=heads, layer=layer, rates=8)).eval()
    each = torch.tensor([0.0, 1.0, 0.0, 20.0])  # system, image, instruction, response
    rate = torch.arange(8.0)[:, None]
    predictor.linear.weight.data = (0.0 if certain else rate) * each.repeat(heads).expand(8, -1)
    predictor.linear.bias.data = -(rate[:, 0] ** 2)
    return DyRate(predictor)


SCHEDULES = {
    "fastv": FastV(1, 0.5),
    "fastv-3": FastV(2, 0.3),
    "vtw": Vtw(2),
    "none": FastV(3, 0.0),
    "fixed": Fixed(2, 0.3),
    "exponential": Exponential(1, 0.8),
    "dyrate": dyrate(),
}


def vlm_of(text: str, attn: str = "sdpa", layers: int = 4) -> Vlm:
    torch.manual_seed(0)
    config = tiny_config("llama" if text == "qwen2" else text, attn, num_hidden_layers=layers)
    if text == "qwen2":
        shared = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        config.text_config = Qwen2Config(
            **{name: getattr(config.text_config, name) for name in (*shared, "vocab_size", "max_position_embeddings")},
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        config._attn_implementation = attn
    model = LlavaNextForConditionalGeneration(config).eval()
    scale_up(model)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return Vlm(model, tiny_processor(), "tiny")


def prompt(vlm: Vlm, rows: list[int], keep: float = 1.0):
    scorer = make_scorer("norm") if keep < 1 else None
    return reduce_inputs(vlm.model, ask(vlm, rows), scorer, keep)


@torch.no_grad()
def generated(vlm: Vlm, reduced, schedule):
    options = {
        "output_logits": True,
        "return_dict_in_generate": True,
        "do_sample": False,
        "max_new_tokens": STEPS,
    }
    with pruned(vlm.model, reduced.visual, reduced["attention_mask"], schedule) as pruning:
        out = vlm.model.generate(**reduced, **options)
    return out, pruning


@torch.no_grad()
def masked_reference(vlm: Vlm, reduced, schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding where nothing is removed or cached: dropped columns are hidden from the later layers.

    The tokens of a step, the prompt being step 0, do not see what went at that step or before.
    """
    lm, visual, layers = vlm.model.model.language_model, reduced.visual, vlm.model.model.language_model.layers
    embeds, mask, logits, said = reduced["inputs_embeds"], reduced["attention_mask"], [], []
    (start,), prompt = schedule.layers(), visual.shape[1]
    gone_at = torch.full(visual.shape, STEPS)  # the step at which each column of the prompt went

    def hide(index, _layer, args, kwargs):
        length = args[0].shape[1]
        gone = torch.zeros(len(visual), length, length, dtype=torch.bool)
        if index >= start:
            at = (torch.arange(length) - prompt + 1).clamp(min=0)
            gone[:, :, :prompt] = gone_at[:, None] <= at[:, None]
        allowed = mask.bool()[:, None] & ~gone & torch.ones(length, length, dtype=torch.bool).tril()
        allowed |= torch.eye(length, dtype=torch.bool)
        return args, kwargs | {
            "attention_mask": torch.zeros(allowed.shape).masked_fill_(~allowed, -1e30)[:, None]
        }

    def mass(attention):
        """By hand, row by row: what stands before the first visual token, the visual ones, the rest, the answer."""
        found = torch.zeros(len(visual), attention.shape[1], len(TYPES))
        for row, paid in enumerate(attention):
            first = int(visual[row].nonzero()[0])
            behind = ~visual[row] & (torch.arange(prompt) > first)
            parts = (
                paid[:, :first],
                paid[:, :prompt][:, visual[row]],
                paid[:, :prompt][:, behind],
                paid[:, prompt:],
            )
            found[row] = torch.stack([part.sum(1) for part in parts], 1)
        return found

    vlm.model.set_attn_implementation("eager")
    hooks = [
        layer.register_forward_pre_hook(partial(hide, i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    for step in range(STEPS):
        attentions = lm(
            inputs_embeds=embeds, attention_mask=mask, output_attentions=True, use_cache=False
        ).attentions
        paid = attentions[start - 1][:, :, -1]
        keep = schedule.entering(start, step, lambda: mass(paid))
        remain = visual & (gone_at > step)
        count = (
            fraction_count(visual.sum(1), keep)
            if torch.is_tensor(keep) or keep > 0
            else torch.zeros(len(visual)).long()
        )
        gone_at[remain & ~top_count(paid.mean(1)[:, :prompt], count, remain)] = step
        hidden = lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
        logits.append(vlm.model.lm_head(hidden))
        said.append(logits[-1].argmax(-1))
        embeds = torch.cat([embeds, lm.embed_tokens(said[-1])[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    for hook in hooks:
        hook.remove()
    vlm.model.set_attn_implementation("sdpa")
    return torch.stack(said, 1), torch.stack(logits, 1)


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
    seen = []

    def weigh(_decoder, _args, out):
        seen.append([layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers])

    handle = vlm.model.model.language_model.register_forward_hook(weigh)
    out, pruning = generated(vlm, reduced, schedule)
    handle.remove()
    text, visual = int((~reduced.visual).sum()), int(reduced.visual.sum())
    config = vlm.model.config.text_config
    left = torch.stack(pruning.left)[:, :, 0]
    held = held_tokens(text, left.numpy())
    assert len(seen) == STEPS and seen == (held * kv_bytes(config, 1, 4) // config.num_hidden_layers).tolist()
    if schedule.name == "fastv":
        assert left.unique(dim=0).tolist() == [[visual, visual, round(0.25 * visual), round(0.25 * visual)]]
    if schedule.name == "exponential":
        assert left[:, 3].tolist() == [max(1, round(0.7**step * visual)) for step in range(STEPS)]
    if schedule.name == "dyrate":
        assert len(left[:, 2].unique()) > 2 and pruning.ranked == [(step, 1) for step in range(STEPS)]


def test_what_is_told_about_drops_is_what_is_left():
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
from tokensel.schedules import FastV, pruned
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=16, num_attention_heads=4,
                                     vocab_size=100, pad_token_id=0, eos_token_id=None)).eval()
model.generation_config.eos_token_id = None
embeds, mask = torch.randn(8, 64, 256), torch.ones(8, 64, dtype=torch.long)
visual = torch.zeros(8, 64, dtype=torch.bool)
visual[:, 4:60] = True
with torch.no_grad():
    model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=2)  # what the libraries take for themselves
    embeds, mask, visual = embeds.repeat(1, 12, 1), mask.repeat(1, 12), visual.repeat(1, 12)
    peak = watch_peak(torch.device("cpu"))
    before = peak()
    with pruned(model, visual, mask, FastV(1, float(sys.argv[1]))):
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=64, do_sample=False)
print(peak() - before)
"""


@pytest.mark.skipif(
    watch_peak(torch.device("cpu"))() is None, reason="this system does not tell its peak memory"
)
def test_the_peak_memory_of_a_generation_falls():
    """By at least half the bytes that the formula says are not cached; the system counts in pages and keeps some."""
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
    with torch.no_grad(), pruned(vlm.model, reduced.visual, reduced["attention_mask"], FastV(2, 0.5)):
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
    "option", [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_ways_to_generate_that_cannot_work_are_refused(option):
    vlm = tiny_vlm()
    with pytest.raises(TokenselError, match=next(iter(option))):
        vlm.generate(prompt(vlm, [0]), 2, schedule=FastV(1, 0.5), **option)


def test_a_prompt_without_a_picture_and_a_sliding_window_are_refused():
    vlm = vlm_of("llama")
    blind = reduce_inputs(vlm.model, ask(vlm, [None]))
    with pytest.raises(TokenselError, match="no visual tokens"):
        vlm.generate(blind, 2, schedule=FastV(2, 0.5))
    mistral = vlm_of("mistral")
    mistral.model.model.language_model.config.sliding_window = 16
    with pytest.raises(TokenselError, match="sliding window"):
        mistral.generate(prompt(mistral, [0]), 2, schedule=FastV(2, 0.5))


@torch.no_grad()
def test_vtw_chooses_the_first_layer_behind_which_the_picture_no_longer_tells():
    vlm = vlm_of("llama")
    samples = [prompt(vlm, [0, 1]), prompt(vlm, [3])]
    divergence = withdrawal_divergence(vlm.model, samples)
    assert list(divergence) == [1, 2, 3] and all(value > 0 for value in divergence.values())
    for layer in divergence:
        total = 0.0
        for sample in samples:
            full = vlm.model(**sample).logits[:, -1].double().softmax(-1)
            with pruned(vlm.model, sample.visual, sample["attention_mask"], Vtw(layer)):
                given = vlm.model(**sample).logits[:, -1].double().softmax(-1)
            total += float((given * (given / full).log()).sum())
        assert divergence[layer] == pytest.approx(total / 3, rel=1e-4)
    assert (
        choose_layer({1: 0.5, 2: 0.002, 3: 0.004}) == 2 and choose_layer({1: 0.5, 2: 0.2}, threshold=1.0) == 1
    )
    with pytest.raises(TokenselError, match="no layer is below it, the lowest is 0.2"):
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
