"""Ways to generate: each works, alone and under a schedule, or gives one clear line."""

import threading
from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dyrate, generated, prompt, vlm_of
from tiny import ask, cache_argument
from transformers import DynamicCache, GenerationConfig, StaticCache

from tokensel.cost.answers import answer_costs
from tokensel.schedules import Exponential, FastV, Fixed, Vtw, make_schedule, pruned
from tokensel.schedules.decoder import attention_of as decoder_attention
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, reduce_inputs
from tokensel.vlm.generate import generate

CASES = [FastV(2, 0.5), Vtw(2), Fixed(1, 0.4), Exponential(2, 0.7), dyrate()]


@pytest.fixture
def vlm() -> Vlm:
    return vlm_of("llama")


def hooks(vlm: Vlm) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for module in vlm.model.model.language_model.modules()
    )


@pytest.mark.parametrize("schedule", CASES, ids=lambda s: s.name)
def test_samples_of_one_prompt_are_rows_of_their_own(vlm, schedule):
    reduced = prompt(vlm, [0, 1])
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    output = vlm.generate_output(reduced, 4, schedule, **options)
    assert output.tokens.shape == (6, 4) and len(output.texts) == 6
    # the same draws from prompts that are repeated by hand
    torch.manual_seed(0)
    rows = [row for row in (0, 1) for _ in range(3)]
    questions = [f"what{'?' * (row + 1)}" for row in rows]
    repeated = reduce_inputs(vlm.model, ask(vlm, rows, questions))
    assert torch.equal(vlm.generate_output(repeated, 4, schedule, do_sample=True).tokens, output.tokens)
    assert len(answer_costs(vlm.model, reduced, output)) == 6


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_beams": 4, "do_sample": True}, "num_beams=4"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"cache_implementation": "static"}, "cache_implementation=static"),
        ({"cache_implementation": "quantized"}, "cache_implementation=quantized"),
        ({"cache_implementation": "offloaded"}, "cache_implementation=offloaded"),
        ({"use_cache": False}, "use_cache=False"),
        ({"past_key_values": DynamicCache()}, "past_key_values=DynamicCache"),
        ({"cache": DynamicCache()}, "cache=DynamicCache"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["call", "checkpoint", "configuration"])
def test_what_cannot_work_under_a_schedule_gets_one_line(vlm, option, line, where):
    reduced, given_options = prompt(vlm, [0]), option
    if where != "call" and set(option) & {"past_key_values", "cache"}:
        pytest.skip("an argument of the call, not an option of a configuration")
    if where == "checkpoint":
        if set(option) & {"num_beams", "do_sample"}:
            pytest.skip("greedy by default, whatever the checkpoint says")
        vlm.model.generation_config.update(**option)
        given_options = {}
    if where == "configuration":
        given_options = {"generation_config": GenerationConfig(**option)}
    with pytest.raises(TokenselError, match=line) as error:
        vlm.generate(reduced, 2, schedule=FastV(1, 0.5), **given_options)
    assert "\n" not in str(error.value) and hooks(vlm) == 0


@pytest.mark.parametrize(
    "option",
    [
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 8},
        {"token_healing": True},
        {"input_ids": torch.ones(1, 2).long()},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_needs_the_ids_of_the_prompt_gets_one_line_without_a_schedule_too(vlm, option):
    with pytest.raises(TokenselError, match=next(iter(option))):
        vlm.generate(prompt(vlm, [0]), 2, **option)
    with pytest.raises(TokenselError, match="assistant_model"):
        vlm.generate(prompt(vlm, [0]), 2, assistant_model=vlm.model)


def test_greedy_is_the_default_whatever_the_checkpoint_says(vlm):
    reduced = prompt(vlm, [0, 1])
    greedy = vlm.generate(reduced, 6)
    beams = vlm.generate(reduced, 6, num_beams=3)
    vlm.model.generation_config.update(num_beams=3, do_sample=True, num_return_sequences=2)
    assert vlm.generate(reduced, 6) == greedy
    assert len(vlm.generate(reduced, 6, schedule=FastV(1, 0.5))) == 2
    assert vlm.generate(reduced, 6, num_beams=3) == beams
    assert vlm.generate(reduced, 6, generation_config=GenerationConfig(num_beams=3)) == beams


@pytest.mark.parametrize("schedule", [None, FastV(1, 0.5)], ids=str)
def test_a_whole_output_and_another_end_token(vlm, schedule):
    reduced = prompt(vlm, [0, 1])
    plain = vlm.generate_output(reduced, 6, schedule)
    whole = vlm.generate_output(reduced, 6, schedule, return_dict_in_generate=True, output_logits=True)
    assert plain.model_output is None and torch.equal(whole.tokens, plain.tokens)
    assert len(whole.model_output.logits) == 6
    end = int(plain.tokens[0, 2])
    first = plain.tokens[0].tolist().index(end) + 1
    assert int(vlm.generate_output(reduced, 6, schedule, eos_token_id=end).lengths[0]) == first


@pytest.mark.parametrize("number", [0, -1, 2.5, "5", None, True])
def test_a_number_of_new_tokens_that_is_none_gets_one_line(vlm, number):
    with pytest.raises(TokenselError, match="max_new_tokens is") as error:
        unwrap(generate)(vlm.model, vlm.processor.tokenizer, prompt(vlm, [0]), number)
    assert "give a whole number of at least 1" in str(error.value)


@settings(deadline=None, max_examples=12)
@given(more=st.integers(-3, 6), new=st.integers(1, 6), case=st.sampled_from(CASES))
def test_a_sliding_window_that_prompt_and_answer_reach_gets_one_line(more, new, case):
    vlm = vlm_of("mistral")
    reduced = prompt(vlm, [0])
    length = reduced.visual.shape[1]
    whole = vlm.generate(reduced, new, schedule=case)
    vlm.model.model.language_model.config.sliding_window = length + more
    vlm.model.config.text_config.sliding_window = length + more
    if length + new - 1 < length + more:
        assert vlm.generate(reduced, new, schedule=case) == whole
    else:
        with pytest.raises(TokenselError, match="sliding window"):
            vlm.generate(reduced, new, schedule=case)
    assert hooks(vlm) == 0


@pytest.mark.parametrize("schedule", CASES, ids=lambda s: s.name)
def test_the_model_itself_cannot_be_led_astray(vlm, schedule):
    """What ``pruned`` meets in the model's own ``generate``, where no option can be checked beforehand."""
    reduced = prompt(vlm, [0, 1])
    cache = StaticCache(config=vlm.model.config.text_config, max_cache_len=300)
    for options, line in (
        ({cache_argument(vlm.model): cache}, "StaticCache cannot shrink"),
        ({"num_beams": 3}, "reorders the cache's rows"),
        ({"prefill_chunk_size": 8}, None),  # transformers itself fails: a reduced prompt has no ids
    ):
        error = pytest.raises((TokenselError, RuntimeError), match=line)
        with error, torch.no_grad(), pruned(vlm.model, reduced.prompt, schedule):
            vlm.model.generate(**reduced, max_new_tokens=12, do_sample=False, **options)
        assert hooks(vlm) == 0
    single = prompt(vlm, [0])
    with (
        pytest.raises(TokenselError, match="every other pass one token more"),
        torch.no_grad(),
        pruned(vlm.model, single.prompt, schedule),
    ):
        vlm.model.generate(**single, max_new_tokens=12, prompt_lookup_num_tokens=3)
    with (
        pytest.raises(TokenselError, match="where the prompt has"),
        torch.no_grad(),
        pruned(vlm.model, reduced.prompt, schedule),
    ):
        vlm.model(**single)


def test_a_schedule_that_fails_leaves_no_hook(vlm, monkeypatch):
    class Broken:
        name, uses_keep, newline = "broken", False, "keep"

        def entering(self, layer, step=0, mass=None):
            raise RuntimeError("broken")

        def layers(self):
            return (1, 2.0)

    reduced = prompt(vlm, [0])
    before = vlm.generate(reduced, 3)
    with pytest.raises(TypeError):
        vlm.generate(reduced, 3, schedule=Broken())
    assert hooks(vlm) == 0 and vlm.generate(reduced, 3) == before
    monkeypatch.setattr(Broken, "layers", lambda self: (1, 2))
    with pytest.raises(RuntimeError, match="broken"):
        vlm.generate(reduced, 3, schedule=Broken())
    assert hooks(vlm) == 0 and vlm.generate(reduced, 3) == before
    # some hooks are on the model when the second layer's cannot be made
    asked = []

    def attention_of(decoder, index):
        asked.append(index)
        if len(asked) == 2:
            raise RuntimeError("no attention")
        return decoder_attention(decoder, index)

    monkeypatch.setattr("tokensel.schedules.prune.attention_of", attention_of)
    with pytest.raises(RuntimeError, match="no attention"):
        vlm.generate(reduced, 3, schedule=Broken())
    assert len(asked) == 2 and hooks(vlm) == 0 and vlm.generate(reduced, 3) == before
    with pytest.raises(TokenselError, match=r"layer is 2\.0"):
        make_schedule("fastv", layer=2.0)


def test_two_schedules_at_a_time_get_one_line(vlm):
    reduced = prompt(vlm, [0])
    refused = pytest.raises(TokenselError, match="vtw: fastv drops tokens of this model already")
    with pruned(vlm.model, reduced.prompt, FastV(1, 0.5)), refused:
        vlm.generate(reduced, 2, schedule=Vtw(1))
    assert hooks(vlm) == 0


def test_threads_have_schedules_of_their_own(vlm):
    """Four threads on one model, under three schedules and none: each gets what it gets alone."""
    jobs = [(prompt(vlm, [0]), FastV(1, 0.3)), (prompt(vlm, [1, 3]), Exponential(2, 0.7))]
    jobs += [(prompt(vlm, [3]), None), (prompt(vlm, [0, 1]), dyrate())]
    alone = [vlm.generate(reduced, 8, schedule=schedule) for reduced, schedule in jobs]
    start, results = threading.Barrier(len(jobs)), {}

    def run(number):
        start.wait()
        try:
            results[number] = [vlm.generate(jobs[number][0], 8, schedule=jobs[number][1]) for _ in range(3)]
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(len(jobs))] == [[answer] * 3 for answer in alone]
    assert hooks(vlm) == 0


def test_a_model_that_is_used_in_another_thread_alone_gets_one_line(vlm):
    reduced = prompt(vlm, [0])
    refused = pytest.raises(TokenselError, match="in the thread that generates")
    with refused, pruned(vlm.model, reduced.prompt, FastV(1, 0.5)):
        thread = threading.Thread(target=vlm.generate, args=(reduced, 2))
        thread.start()
        thread.join()


class Quantised(torch.nn.Module):
    """Stands in for a linear layer of 8 bits: whole numbers and scales, without a floating-point weight."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, states):
        return states @ (self.weight.to(states) * self.scale).T


@pytest.mark.parametrize("schedule", CASES, ids=lambda s: s.name)
def test_a_quantised_language_model_drops_as_one_with_the_same_rounded_weights(schedule):
    rounded, quantised = vlm_of("llama"), vlm_of("llama")
    reduced = prompt(rounded, [0, 1])
    for plain, other in zip(
        rounded.model.model.language_model.layers, quantised.model.model.language_model.layers
    ):
        for part in ("self_attn", "mlp"):
            for name, linear in list(getattr(plain, part).named_children()):
                if isinstance(linear, torch.nn.Linear):
                    stand_in = Quantised(linear)
                    linear.weight.data = stand_in.weight.float() * stand_in.scale
                    setattr(getattr(other, part), name, stand_in)
    one, two = generated(rounded, reduced, schedule, 6)[0], generated(quantised, reduced, schedule, 6)[0]
    assert torch.equal(one.sequences, two.sequences)


@pytest.mark.parametrize("attn", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_attention_that_takes_no_mask_gets_one_line(vlm, attn):
    reduced = prompt(vlm, [0])
    vlm.model.model.language_model.config._attn_implementation_internal = attn
    with pytest.raises(
        TokenselError, match="takes no mask from this library: load the model with attn='sdpa'"
    ):
        vlm.generate(reduced, 2, schedule=FastV(1, 0.5))
