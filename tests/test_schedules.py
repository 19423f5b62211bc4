"""Dropping inside the language model equals masking without removal and without a cache, in every logit."""

from functools import partial

import pytest
import torch
from tiny import ask, scale_up, tiny_config, tiny_processor, tiny_vlm
from transformers import LlavaNextForConditionalGeneration, Qwen2Config

from tokensel.budget import fraction_count, top_count
from tokensel.cost import kv_bytes
from tokensel.errors import TokenselError
from tokensel.schedules import FastV, Vtw, make_schedule, pruned
from tokensel.scorers import make_scorer
from tokensel.vlm import Vlm, reduce_inputs

STEPS = 16
SCHEDULES = [FastV(1, 0.5), FastV(2, 0.3), Vtw(2), FastV(3, 0.0)]


def vlm_of(text: str, attn: str = "sdpa", layers: int = 4) -> Vlm:
    torch.manual_seed(0)
    config = tiny_config("llama" if text == "qwen2" else text, attn, num_hidden_layers=layers)
    if text == "qwen2":
        shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
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
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": STEPS}
    with pruned(vlm.model, reduced.visual, reduced["attention_mask"], schedule) as pruning:
        out = vlm.model.generate(**reduced, **options)
    return out, pruning


@torch.no_grad()
def masked_reference(vlm: Vlm, reduced, schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding where nothing is removed or cached: dropped columns are hidden from the later layers."""
    lm, real = vlm.model.model.language_model, reduced["attention_mask"].bool()
    visual, layers = reduced.visual, vlm.model.model.language_model.layers
    dropped: dict[int, torch.Tensor] = {}
    embeds, mask, logits, said = reduced["inputs_embeds"], reduced["attention_mask"], [], []

    def hide(index, _layer, args, kwargs):
        length = args[0].shape[1]
        gone = torch.zeros(len(real), length, dtype=torch.bool)
        for layer, columns in dropped.items():
            if index >= layer:
                gone[:, : columns.shape[1]] |= columns
        allowed = (mask.bool() & ~gone)[:, None] & torch.ones(length, length, dtype=torch.bool).tril()
        allowed |= torch.eye(length, dtype=torch.bool)
        return args, kwargs | {"attention_mask": torch.zeros(allowed.shape).masked_fill_(~allowed, -1e30)[:, None]}

    vlm.model.set_attn_implementation("eager")
    for layer in schedule.layers():
        if schedule.entering(layer) == 0:
            dropped[layer] = visual
            continue
        attentions = lm(inputs_embeds=embeds, attention_mask=mask, output_attentions=True, use_cache=False).attentions
        best = top_count(attentions[layer - 1][:, :, -1].mean(1), fraction_count(visual.sum(1), schedule.entering(layer)), visual)
        dropped[layer] = visual & ~best
    hooks = [layer.register_forward_pre_hook(partial(hide, i), with_kwargs=True) for i, layer in enumerate(layers)]
    for _ in range(STEPS):
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
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
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
    out, _ = generated(vlm, reduced, FastV(2, 1.0))
    assert all(torch.equal(one, two) for one, two in zip(plain.logits, out.logits, strict=True))


def test_eager_and_sdpa_agree():
    one, two = (generated(vlm, prompt(vlm, [0, 1, 3]), FastV(2, 0.3))[0] for vlm in (vlm_of("llama"), vlm_of("llama", "eager")))
    assert torch.equal(one.sequences, two.sequences)


def test_a_ragged_batch_equals_its_rows_alone_and_a_scorer_may_choose_before():
    vlm = vlm_of("llama")
    together, _ = generated(vlm, prompt(vlm, [0, 1, 3], keep=0.6), FastV(2, 0.5))
    for place, row in enumerate([0, 1, 3]):
        inputs = ask(vlm, [row], [f"what{'?' * (place + 1)}"], seed=0)
        alone, _ = generated(vlm, reduce_inputs(vlm.model, inputs, make_scorer("norm"), 0.6), FastV(2, 0.5))
        assert torch.equal(alone.sequences[0], together.sequences[place])


def test_cached_bytes_are_those_of_the_formula_in_every_layer():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0])
    out, _ = generated(vlm, reduced, FastV(2, 0.25))
    text, visual = int((~reduced.visual).sum()), int(reduced.visual.sum())
    config = vlm.model.config.text_config
    each = kv_bytes(config, 1, 4) // config.num_hidden_layers
    kept = [visual, visual, round(0.25 * visual), round(0.25 * visual)]
    for layer, count in zip(out.past_key_values.layers, kept, strict=True):
        assert layer.keys.nbytes + layer.values.nbytes == each * (text + count + STEPS - 1)


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
    ],
)
def test_bad_schedules_are_refused_in_one_line(name, options, line):
    vlm = vlm_of("llama")
    with pytest.raises(TokenselError, match=line) as error:
        vlm.generate(prompt(vlm, [0]), 2, schedule=make_schedule(name, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
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
