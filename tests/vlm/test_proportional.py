"""A kept token with the bias log(w) has the effect of w copies of its key and value."""

from functools import cache, partial

import pytest
import tiny_families
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import vlm_of
from tiny import GivenScores, ask, logits, onevision_processor, tiny_learned, tiny_onevision

from tokensel.book.tiny import scale_up
from tokensel.schedules import FastV, pruned
from tokensel.scorers import SCORERS, make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, downsample, encode, pool, reduce, reduce_inputs
from tokensel.vlm.bias import biased
from tokensel.vlm.dropped import token_weights
from tokensel.vlm.forced import answer_mass, force, forced_logits
from tokensel.vlm.native import switch_off

CURE = {"attention": "proportional"}
BATCHES = ([[0]], [[1], None, [2, 0], [3]])  # one row; ragged rows, one of text alone, one with two images
NEW = 8


@cache
def load(name: str, attn: str = "sdpa") -> Vlm:
    if name == "onevision":
        model, processor = tiny_onevision(), onevision_processor()
        model.set_attn_implementation(attn)
        model.generation_config.update(eos_token_id=None)
        return Vlm(model, processor, name, switch_off(model, processor))
    if name in tiny_families.MAKERS:
        torch.manual_seed(0)
        model, processor = tiny_families.MAKERS[name]()
        scale_up(model)
        model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
        if attn != "sdpa":  # the default of all that have it
            model.set_attn_implementation(attn)
        return Vlm(model.eval(), processor, name)
    return vlm_of(name, attn)


MODELS = ("llama", "mistral", "qwen2", "onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3")
# eager attention adds its mask itself, alike in all of them
everywhere = pytest.mark.parametrize(
    ("name", "attn"), [*((name, "sdpa") for name in MODELS), ("mistral", "eager"), ("qwen2_5_vl", "eager")]
)
batches = pytest.mark.parametrize("rows", BATCHES, ids=["one", "ragged"])
kernels = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def weighed(vlm: Vlm, rows, keep: float = 0.2, strength: float = 1.0, question: str | None = None):
    inputs = ask(vlm, rows, None if question is None else [question])
    return reduce_inputs(vlm.model, inputs, make_scorer("norm"), keep, **CURE, strength=strength)


def generated(vlm: Vlm, reduced, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens ``[rows, steps]`` and logits ``[rows, steps, words]``."""
    options = {"output_logits": True, "return_dict_in_generate": True} | options
    out = vlm.generate_output(reduced, NEW, **options)
    return out.tokens, torch.stack(out.model_output.logits, 1)


@torch.no_grad()
def with_copies(vlm: Vlm, reduced, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each step of one row's answer where the prompt has each key and value as often as it weighs.

    Nothing is cached and no bias added. All copies of a token see each other, so that they stay equal.
    """
    decoder, row = vlm.model.get_decoder(), reduced.for_decoder
    answer = vlm.model.get_input_embeddings()(tokens[:, :-1])
    embeds = torch.cat([row["inputs_embeds"], answer], 1)
    columns, length = embeds.shape[1], reduced["attention_mask"].shape[1]
    weights = torch.ones(columns, dtype=torch.long)
    weights[:length] = reduced.attn_bias[0].exp().round().long()
    places = reduced.get("position_ids", torch.arange(length)[None])
    places = torch.cat([places, places[..., -1:] + 1 + torch.arange(columns - length)], -1)
    index = torch.arange(columns).repeat_interleave(weights)
    allowed = index[:, None] >= index[None, :]
    mask_added = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)[None, None]
    more = {}
    if "visual_pos_masks" in row:  # what Qwen3-VL adds to visual tokens after its first layers
        visual = torch.cat([row["visual_pos_masks"], torch.zeros(1, columns - length, dtype=torch.bool)], 1)
        more["visual_pos_masks"] = visual[:, index]
        copies = weights[visual[0]]
        more["deepstack_visual_embeds"] = [
            layer.repeat_interleave(copies, 0) for layer in row["deepstack_visual_embeds"]
        ]

    def hide(_layer, args, kwargs):
        return args, kwargs | {"attention_mask": mask_added}

    attn = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in decoder.layers]
    mask = torch.ones(1, len(index), dtype=torch.long)
    states = decoder(
        inputs_embeds=embeds[:, index],
        attention_mask=mask,
        position_ids=places[..., index],
        use_cache=False,
        **more,
    ).last_hidden_state
    for hook in hooks:
        hook.remove()
    vlm.model.set_attn_implementation(attn)
    return vlm.model.get_output_embeddings()(states[:, -tokens.shape[1] :])


@everywhere
def test_a_weight_equals_copies_of_key_and_value_in_prefill_and_decoding(name, attn):
    vlm = load(name, attn)
    for rows in ([[0]], [[2, 0]]):
        reduced = weighed(vlm, rows)
        assert reduced.attn_bias.max() > 1.0  # several copies of some
        tokens, ours = generated(vlm, reduced)
        reference = with_copies(vlm, reduced, tokens)
        assert torch.equal(reference.argmax(-1), tokens)
        assert (ours - reference).abs().max() < 1e-4
        plain = generated(vlm, reduce_inputs(vlm.model, ask(vlm, rows), make_scorer("norm"), 0.2))[1]
        assert (plain[:, 0] - ours[:, 0]).abs().max() > 0.05  # what the bias is there for


@everywhere
@batches
def test_keeping_all_or_a_strength_of_zero_changes_no_logit(name, attn, rows):
    vlm = load(name, attn)
    inputs, norm = ask(vlm, rows), make_scorer("norm")
    whole = reduce_inputs(vlm.model, inputs, norm, 1.0, **CURE)
    assert whole.attn_bias is None
    assert (logits(vlm.model, whole) - logits(vlm.model, inputs)).abs().max() == 0.0
    plain = generated(vlm, reduce_inputs(vlm.model, inputs, norm, 0.3))
    off = generated(vlm, reduce_inputs(vlm.model, inputs, norm, 0.3, **CURE, strength=0))
    assert torch.equal(plain[1], off[1]) and torch.equal(plain[0], off[0])


@everywhere
def test_a_batch_equals_its_rows_alone(name, attn):
    vlm = load(name, attn)
    reduced = weighed(vlm, BATCHES[1], 0.3)
    tokens, batched = generated(vlm, reduced)
    assert not reduced.attn_bias[~reduced.visual].any() and not reduced.attn_bias[reduced.newlines].any()
    for row, images in enumerate(BATCHES[1]):
        alone = weighed(vlm, [images], 0.3, question=f"what{'?' * (row + 1)}")
        assert (alone.attn_bias is None) == (images is None)
        own_tokens, own = generated(vlm, alone)
        assert torch.equal(own_tokens[0], tokens[row])
        assert (own[0] - batched[row]).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
@batches
def test_cached_steps_equal_full_passes_and_any_cache_gives_the_same(name, rows):
    vlm = load(name)
    reduced = weighed(vlm, rows, strength=0.5)
    tokens, cached = generated(vlm, reduced)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        other_tokens, other = generated(vlm, reduced, **options)
        assert torch.equal(other_tokens, tokens) and (other - cached).abs().max() < 1e-4, options


@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_a_forced_answer_has_the_logits_of_the_generated_one(name):
    vlm = load(name)
    reduced = weighed(vlm, BATCHES[1])
    tokens, cached = generated(vlm, reduced)
    forced = force(vlm.model, reduced, tokens, torch.full((len(tokens),), NEW))
    with torch.no_grad():
        assert (forced_logits(vlm.model, forced) - cached).abs().max() < 1e-4
    with pytest.raises(TokenselError, match="give them with attention 'plain'"):
        answer_mass(vlm.model, forced)


def test_a_sliding_window_leaves_the_bias_at_its_columns():
    vlm = vlm_of("mistral")
    plain = reduce_inputs(vlm.model, ask(vlm, [[0], [2, 0]]), make_scorer("norm"), 0.2)
    vlm.model.model.language_model.config.sliding_window = plain["attention_mask"].shape[1] // 2
    reduced = weighed(vlm, [[0], [2, 0]])
    tokens, cached = generated(vlm, reduced)
    other_tokens, other = generated(vlm, reduced, use_cache=False)
    assert torch.equal(other_tokens, tokens) and (other - cached).abs().max() < 1e-4
    assert (generated(vlm, plain)[1][:, 0] - cached[:, 0]).abs().max() > 0.01


@kernels
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_beams_and_several_answers_repeat_the_rows(name, attn):
    vlm = load(name, attn)
    reduced = weighed(vlm, BATCHES[1])
    options = {"num_beams": 3, "num_return_sequences": 2}
    cached = vlm.generate_output(reduced, NEW, **options).tokens
    assert torch.equal(vlm.generate_output(reduced, NEW, use_cache=False, **options).tokens, cached)
    for row, images in enumerate(BATCHES[1]):
        alone = weighed(vlm, [images], question=f"what{'?' * (row + 1)}")
        own = vlm.generate_output(alone, NEW, **options).tokens
        assert torch.equal(own, cached[2 * row : 2 * row + 2])


@kernels
def test_layers_and_heads_that_are_left_out_see_no_bias(attn):
    vlm = load("llama", attn)
    reduced = weighed(vlm, [[0], [1]])
    decoder, changed = vlm.model.get_decoder(), {}
    originals = [layer.self_attn for layer in decoder.layers]

    def look(index, _attention, _args, kwargs):
        changed[index] = kwargs["attention_mask"]

    def masks(**options):
        changed.clear()
        with biased(vlm.model, reduced.attn_bias, **options):
            hooks = [
                a.register_forward_pre_hook(partial(look, i), with_kwargs=True)
                for i, a in enumerate(originals)
            ]
            vlm.model(**reduced)
            for hook in hooks:
                hook.remove()
        return dict(changed)

    with biased(vlm.model, reduced.attn_bias, layers=()):
        off = logits(vlm.model, reduced)
    plain = reduce_inputs(vlm.model, ask(vlm, [[0], [1]]), make_scorer("norm"), 0.2)
    assert torch.equal(off, logits(vlm.model, plain))
    all_layers, some = masks(), masks(layers=[1, 3])
    for index in range(4):
        last = all_layers[index][:, 0, -1]  # of the last query, which sees all columns but padding
        real = reduced["attention_mask"].bool()
        assert torch.equal(last[real], reduced.attn_bias[real]) and (last[~real] < -1e30).all()
        assert torch.equal(some[index], all_layers[index]) == (index in (1, 3))
    one = masks(heads=[2])[0]
    assert one.shape[1] == 4 and torch.equal(one[:, 2], all_layers[0][:, 0])
    assert not one[:, [0, 1, 3], -1][:, :, real[1]][1].any()


@given(data=st.data(), name=st.sampled_from(("llama", "onevision", "qwen2_5_vl")))
@settings(deadline=None, max_examples=30)
def test_weights_of_an_image_sum_to_its_visual_tokens(data, name):
    encoded = encoded_pages(name)
    layout = encoded.layout
    kept = drawn_kept(data, encoded) & layout.cell
    weights = token_weights(encoded, kept)
    tokens = encoded.features.tokens.flatten(0, 1)
    for image in range(len(layout.tiles)):
        own = layout.image == image
        cells, stay = own & layout.cell, own & kept
        if not bool(stay.any()):
            assert (weights[own] == 1).all()
            continue
        assert weights[cells].sum() == cells.sum() and (weights[stay] >= 1).all()
        assert (weights[cells & ~kept] == 0).all() and (weights[own & ~layout.cell] == 1).all()
        expected = torch.ones(int(stay.sum()))
        for place in (cells & ~kept).nonzero()[:, 0]:  # one by one
            alike = torch.cosine_similarity(
                tokens[layout.source[place]], tokens[layout.source[stay]].double(), dim=-1
            )
            expected[alike.argmax()] += 1
        assert torch.equal(weights[stay], expected)


@cache
def encoded_pages(name: str):
    vlm = load(name)
    return encode(vlm.model, ask(vlm, [[0], None, [2, 4], [1]]))


def drawn_kept(data, encoded):
    """Packed tokens that hypothesis keeps, newlines among them."""
    seed, keep = data.draw(st.integers(0, 10**6)), data.draw(st.floats(0.0, 1.0))
    return torch.rand(len(encoded.layout.cell), generator=torch.Generator().manual_seed(seed)) < keep


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_takes_it(scorer):
    vlm = load("llama")
    encoded = encode(vlm.model, ask(vlm, [[0], [1]]))
    made = make_scorer(scorer, **{n: m for n, m in tiny_learned().items() if n == scorer})
    reduced = reduce(encoded, made, 0.3, **CURE)
    total = (reduced.attn_bias.exp() * (reduced.visual & ~reduced.newlines)).sum(1)
    assert torch.allclose(total, reduced.n_visual_full.float())
    assert vlm.generate_output(reduced, 2).tokens.shape == (2, 2)


def test_an_image_that_keeps_nothing_has_no_one_to_count_for_it():
    vlm = load("llama")
    encoded = encode(vlm.model, ask(vlm, [[0], [1]]))
    scores = torch.ones(sum(encoded.layout.tiles), encoded.layout.tokens)
    scores[: encoded.layout.tiles[0]] = -1.0
    scores[encoded.layout.tiles[0], ::2] = -1.0
    reduced = reduce(encoded, GivenScores(scores), None, **CURE)
    assert reduced.n_visual[0] == 0 and not reduced.attn_bias[0].any() and reduced.attn_bias[1].any()


def test_what_cannot_be_right_gets_one_line():
    vlm = load("llama")
    reduced, other = weighed(vlm, [[0]]), weighed(vlm, [[0], [2, 0]])
    encoded, norm, fastv = encode(vlm.model, ask(vlm, [[0]])), make_scorer("norm"), FastV(1, 0.5)

    def another_prompt():
        with biased(vlm.model, other.attn_bias), biased(vlm.model, reduced.attn_bias):
            vlm.model(**reduced)

    def schedule_inside():
        with biased(vlm.model, reduced.attn_bias), pruned(vlm.model, reduced.prompt, fastv):
            vlm.model.generate(**reduced, max_new_tokens=2)

    def absent(**options):
        with biased(vlm.model, reduced.attn_bias, **options):
            pass

    calls = [
        ("use vlm.generate, or model.generate inside", lambda: vlm.model.generate(**reduced)),
        ("fastv drops tokens inside the model, which", lambda: vlm.generate(reduced, 2, schedule=fastv)),
        ("fastv drops tokens inside the model, which moves", schedule_inside),
        ("a bias of 2 rows", another_prompt),
        (r"layers is \[4\]: this model has 0 to 3", lambda: absent(layers=[4])),
        (r"heads is \[-1\]: this model has 0 to 3", lambda: absent(heads=[-1])),
        ("attention is 'flash': choose one of plain", lambda: reduce(encoded, norm, 0.3, attention="flash")),
        ("no token is dropped where the image is made", lambda: downsample(encoded, 0.3, **CURE)),
        ("no token is dropped where the image is made", lambda: pool(encoded, 0.3, dropped="blank")),
    ]
    calls += [
        ("give a number of at least 0", partial(reduce, encoded, norm, 0.3, strength=value))
        for value in (-1, "x", float("nan"), float("inf"), True, None)
    ]
    for line, call in calls:
        with pytest.raises(TokenselError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value), line


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_language_model_that_takes_no_bias_gets_one_line(family, tmp_path):
    vlm = tiny_families.loaded(family, tmp_path)
    with pytest.raises(TokenselError, match="tokens can be dropped or weighed inside one of"):
        weighed(vlm, [[0]])


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_a_kernel_that_takes_no_bias_gets_one_line(kernel):
    vlm = vlm_of("llama")
    vlm.model.model.language_model.config._attn_implementation_internal = kernel
    with pytest.raises(
        TokenselError, match="takes no mask from this library: load the model with attn='sdpa'"
    ):
        weighed(vlm, [[0]])
