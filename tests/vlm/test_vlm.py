"""The integration with LLaVA-NeXT against the stock model: nothing changes but what is dropped."""

from itertools import product

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import (
    GivenScores,
    ask,
    logits,
    noise_image,
    scale_up,
    tiny_config,
    tiny_llava,
    tiny_onevision,
    tiny_processor,
    tiny_selector,
    tiny_vlm,
)
from transformers import CLIPVisionConfig, LlavaNextForConditionalGeneration

from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Choices, Vlm, encode, load_vlm, reduce, reduce_inputs
from tokensel.vlm.choose import add_newlines, choose_cells
from tokensel.vlm.encode import content_keys
from tokensel.vlm.layout import read_layout, tile_counts


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return tiny_vlm()


# What the tower sees, and where packed tokens come from


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3, 4], [None, [1, 3], 2]])
def test_features_are_those_the_projector_is_given(vlm, rows):
    inputs = ask(vlm, rows)
    seen = []
    handle = vlm.model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    logits(vlm.model, inputs)
    handle.remove()
    assert torch.equal(encode(vlm.model, inputs).features.tokens, seen[0])


@pytest.mark.parametrize("layer", [[-2, -1], -1, 1])
def test_features_of_other_layers_too(layer):
    config = tiny_config()
    config.vision_feature_layer = layer
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    scale_up(model)
    vlm = Vlm(model, tiny_processor(), "tiny")
    inputs = ask(vlm, [0, 3])
    assert torch.equal(logits(model, reduce_inputs(model, inputs)), logits(model, inputs))


def test_cls_attention_is_that_of_the_eager_tower(vlm):
    inputs = ask(vlm, [0, 1])
    encoded = encode(vlm.model, inputs)
    eager, _ = tiny_llava(attn="eager")
    tower = eager.model.vision_tower
    with torch.no_grad():
        attentions = tower(encoded.pixel_values, output_attentions=True).attentions
    wanted = attentions[-2].mean(1)[:, 0, 1:]  # the layer that makes hidden_states[-2]
    torch.testing.assert_close(encoded.cls_attention, wanted, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(wanted, attentions[-1].mean(1)[:, 0, 1:], atol=1e-3)


@given(height=st.integers(8, 130), width=st.integers(8, 130))
@settings(deadline=None, max_examples=25)
def test_layout_says_where_every_packed_token_comes_from(vlm, height, width):
    inputs = vlm.inputs([noise_image(height, width)], [vlm.prompt("?")])
    encoded = encode(vlm.model, inputs)
    layout, core = encoded.layout, vlm.model.model
    with torch.no_grad():
        packed = core.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
        projected = core.multi_modal_projector(encoded.features.tokens).flatten(0, 1)
    cell = layout.cell
    assert torch.equal(packed[cell], projected[layout.source[cell]])
    assert torch.equal(packed[~cell], core.image_newline.expand(int((~cell).sum()), -1))
    assert layout.thumbnail.sum() == layout.tokens and bool(
        (layout.source[layout.thumbnail] < layout.tokens).all()
    )
    assert len(layout.source[cell].unique()) == int(cell.sum()) == int(layout.valid.sum())


def test_a_batch_and_its_rows_have_the_same_keys(vlm):
    inputs = ask(vlm, [0, [1, 2], None, 3])
    encoded = encode(vlm.model, inputs)
    assert len(encoded.features.keys.unique()) == len(encoded.features.keys)
    alone = encode(vlm.model, ask(vlm, [3]))
    assert torch.equal(encoded.features.keys[-len(alone.features.keys) :], alone.features.keys)
    named = encode(vlm.model, inputs, keys=[7, 8, 9, 10]).features.keys
    assert torch.equal(named, encode(vlm.model, inputs, keys=torch.tensor([7, 8, 9, 10])).features.keys)
    assert not torch.equal(named, encoded.features.keys)
    assert torch.equal(
        named[-len(alone.features.keys) :], encode(vlm.model, ask(vlm, [3]), keys=[10]).features.keys
    )
    pixels = encoded.pixel_values
    changed = pixels.clone()
    changed[2, 0, 3, 3] += 0.01
    assert (content_keys(pixels) != content_keys(changed)).nonzero().flatten().tolist() == [2]


# Everything kept: the stock model, to the last bit


@pytest.mark.parametrize(("text", "attn"), list(product(["llama", "mistral"], ["sdpa", "eager"])))
def test_keeping_everything_changes_no_logit(text, attn):
    vlm = tiny_vlm(text, attn)
    scorer = make_scorer("norm")
    for rows in ([0], [0, 1], [None, [2, 4], 3]):
        inputs = ask(vlm, rows)
        stock = logits(vlm.model, inputs)
        for reduced in (
            reduce_inputs(vlm.model, inputs),
            reduce_inputs(vlm.model, inputs, scorer, 1.0, budget="tile"),
        ):
            assert (logits(vlm.model, reduced) - stock).abs().max() == 0.0
            assert torch.equal(reduced.n_visual, reduced.n_visual_full)
        wanted = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        for positions in ("compact", "original"):
            reduced = reduce_inputs(vlm.model, inputs, positions=positions)
            assert torch.equal(vlm.model.generate(**reduced, max_new_tokens=8, do_sample=False), wanted)


def test_logits_depend_on_the_image(vlm):
    # without this, all of the above would hold for a model that sees nothing
    one, other = ask(vlm, [0]), ask(vlm, [0], seed=50)
    assert (logits(vlm.model, one)[:, -1] - logits(vlm.model, other)[:, -1]).abs().max() > 0.05
    some = reduce_inputs(vlm.model, one, make_scorer("norm"), 0.5)
    assert (logits(vlm.model, some)[:, -1] - logits(vlm.model, one)[:, -1]).abs().max() > 0.05


def test_batches_padded_on_the_right_are_fine(vlm):
    inputs = ask(vlm, [0, 1])
    lengths = inputs["attention_mask"].sum(1)
    right = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        right[name] = torch.zeros_like(inputs[name])
        for row, n in enumerate(lengths.tolist()):
            right[name][row, :n] = inputs[name][row, -n:]
    assert torch.equal(logits(vlm.model, reduce_inputs(vlm.model, right)), logits(vlm.model, inputs))


def test_half_precision():
    model, processor = tiny_llava()
    vlm = Vlm(model.to(torch.bfloat16), processor, "tiny")
    inputs = ask(vlm, [0, 1])
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(logits(model, reduce_inputs(model, inputs)), logits(model, inputs))
    names = ["random", "uniform", "norm", "cls", "diversity"]
    for scorer in [make_scorer(name) for name in names] + [make_scorer("selector", selector=tiny_selector())]:
        reduced = reduce_inputs(model, inputs, scorer, 0.3)
        assert reduced["inputs_embeds"].dtype == torch.bfloat16 and bool(
            logits(model, reduced).isfinite().all()
        )


# Some kept


ALL_CHOICES = [
    dict(zip(("budget", "thumbnail", "newline", "positions"), values, strict=True))
    for values in product(
        ("image", "tile"),
        ("compete", "keep", "last", "drop"),
        ("keep", "drop", "row"),
        ("compact", "original"),
    )
]


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_a_ragged_batch_equals_its_rows_alone(text):
    vlm = tiny_vlm(text)
    scorers = [make_scorer(name, seed=2) for name in ("random", "diversity")]
    scorers.append(make_scorer("selector", selector=tiny_selector()))
    rows = [0, None, [1, 3], 4]
    together = encode(vlm.model, ask(vlm, rows, ["a?", "bb?", "c?", "dddd?"]))
    alone = [
        encode(vlm.model, ask(vlm, [row], [q]))
        for row, q in zip(rows, ["a?", "bb?", "c?", "dddd?"], strict=True)
    ]
    for number, choices in enumerate(ALL_CHOICES):
        scorer, keep = scorers[number % 3], (0.1, 0.3, 0.7)[number // 3 % 3]
        reduced = reduce(together, scorer, keep, **choices)
        out = logits(vlm.model, reduced)
        for row, single in enumerate(alone):
            one = reduce(single, scorer, keep, **choices)
            count = one["inputs_embeds"].shape[1]
            assert int(reduced["attention_mask"][row].sum()) == count
            assert reduced["attention_mask"][row, -count:].all()  # padded on the left
            assert reduced.n_visual[row] == one.n_visual[0] and reduced.n_newline[row] == one.n_newline[0]
            assert (out[row, -count:] - logits(vlm.model, one)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_greedy_with_and_without_cache_agree(positions, attn):
    vlm = tiny_vlm("mistral", attn)
    for rows in ([0], [0, 1, None]):
        reduced = reduce_inputs(vlm.model, ask(vlm, rows), make_scorer("random"), 0.3, positions=positions)
        options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
        options |= dict(eos_token_id=None)  # no row ends early
        cached = vlm.model.generate(**reduced, **options)
        plain = vlm.model.generate(**reduced, **options, use_cache=False)
        assert torch.equal(cached.sequences, plain.sequences) and cached.sequences.shape[1] == 12
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_original_positions_equal_a_full_sequence_with_the_dropped_tokens_masked(text):
    """A token that is masked for every query is not there; so dropping with original positions must agree."""
    vlm = tiny_vlm(text)
    inputs = ask(vlm, [0, 1])
    encoded = encode(vlm.model, inputs)
    full = reduce(encoded)
    reduced = reduce(encoded, make_scorer("random"), 0.3, newline="row", positions="original")
    options = dict(
        max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None
    )
    out = vlm.model.generate(**reduced, **options)

    kept = add_newlines(
        encoded.layout,
        choose_cells(encoded.layout, encoded.score(make_scorer("random")), 0.3, Choices()),
        "row",
    )
    mask = inputs["attention_mask"].clone()
    mask[encoded.places[:, 0], encoded.places[:, 1]] = kept.long()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    embeds = full["inputs_embeds"]
    for step in range(6):
        with torch.no_grad():
            wanted = vlm.model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            )
        torch.testing.assert_close(out.logits[step], wanted.logits[:, -1], atol=1e-4, rtol=0)
        token = out.sequences[:, step : step + 1]
        embeds = torch.cat([embeds, vlm.model.get_input_embeddings()(token)], 1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    # and the numbering matters: compact positions give something else
    compact = vlm.model.generate(
        **reduce(encoded, make_scorer("random"), 0.3, newline="row", positions="compact"), **options
    )
    assert (compact.logits[0] - out.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_beams(vlm, positions):
    scorer = make_scorer("random")
    reduced = reduce_inputs(vlm.model, ask(vlm, [0, 1, None]), scorer, 0.3, positions=positions)
    beams = vlm.model.generate(**reduced, num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, single in enumerate([0, 1, None]):
        inputs = ask(vlm, [single], [f"what{'?' * (row + 1)}"])
        one = reduce_inputs(vlm.model, inputs, scorer, 0.3, positions=positions)
        alone = vlm.model.generate(**one, num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(beams[row], alone[0])


def test_kept_tokens_are_the_stock_embeddings_in_their_old_order(vlm):
    inputs = ask(vlm, [0, [1, 2], None])
    encoded = encode(vlm.model, inputs)
    full = reduce(encoded)["inputs_embeds"]
    generator = torch.Generator().manual_seed(0)
    scorer = GivenScores(torch.rand(encoded.features.tokens.shape[:2], generator=generator))
    for choices in ALL_CHOICES:
        reduced = reduce(encoded, scorer, 0.4, **choices)
        cells = choose_cells(encoded.layout, encoded.score(scorer), 0.4, Choices(**choices))
        assert torch.equal(reduced.kept, encoded.layout.spread(cells))
        kept = add_newlines(encoded.layout, cells, choices["newline"])
        stay = encoded.attention_mask.clone()
        stay[encoded.places[:, 0], encoded.places[:, 1]] = kept
        for row in range(3):
            count = int(stay[row].sum())
            torch.testing.assert_close(
                reduced["inputs_embeds"][row, -count:], full[row, stay[row]], atol=1e-6, rtol=0
            )


# Other models


def test_true_vision_and_projector_of_llava_next_7b(tmp_path):
    """CLIP-L/14-336, projector and pinpoints of llava-v1.6-mistral-7b, from a folder; one language layer."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = tiny_config(
        "mistral",
        vision=vision,
        pinpoints=pinpoints,
        hidden_size=4096,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    config.dtype = torch.bfloat16
    model = LlavaNextForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path)
    tiny_processor(336, 14, pinpoints).save_pretrained(tmp_path)
    del model
    vlm = load_vlm(tmp_path, device="cpu", dtype=torch.float32)
    inputs = vlm.inputs([noise_image(100, 230)], [vlm.prompt("what?")])
    assert inputs["pixel_values"].shape == (1, 3, 3, 336, 336)
    encoded = encode(vlm.model, inputs)
    assert encoded.features.tokens.shape == (3, 576, 1024)
    assert encoded.n_visual.item() == 576 + 20 * 48  # two letterbox rows are cut off above and two below
    selector = make_scorer("selector", selector=TokenSelector(SelectorConfig(width=1024, layers=1)))
    reduced = reduce(encoded, selector, 0.3)
    assert reduced.n_visual.item() == round(0.3 * encoded.n_visual.item())
    assert vlm.model.generate(**reduced, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 3)


def test_a_siglip_tower_without_cls_goes_through_the_same_functions():
    """LLaVA-OneVision packs like LLaVA-NeXT while its interpolation is off, and is refused while it is on."""
    model, sizes = tiny_onevision("anyres_max_1000"), torch.tensor([[90, 130], [24, 24]])
    counts = tile_counts(model, {"image_sizes": sizes})
    lengths = torch.bincount(read_layout(model.model, counts, 36, sizes).image).tolist()
    pixels = torch.zeros(2, max(counts), 3, 24, 24)
    for image, count in enumerate(counts):
        pixels[image, :count] = torch.randn(count, 3, 24, 24)
    rows = [[10, 11, *[4] * lengths[0], 12], [10, *[4] * lengths[1], 12, 13]]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }
    encoded = encode(model, inputs)
    assert encoded.cls_attention is None
    assert (logits(model, reduce(encoded)) - logits(model, inputs)).abs().max() == 0.0
    reduced = reduce(encoded, make_scorer("norm"), 0.3)
    assert reduced.n_visual.tolist() == [round(0.3 * n) for n in encoded.n_visual.tolist()]
    assert bool(logits(model, reduced).isfinite().all())
    with pytest.raises(TokenselError, match="no CLS attention"):
        reduce(encoded, make_scorer("cls"), 0.3)
    with pytest.raises(TokenselError, match=r"interpolates visual tokens.*load_vlm.*anyres_max_1000"):
        encode(tiny_onevision("anyres_max_1"), inputs)


def test_the_image_column_of_a_dataset_is_a_list_of_images(vlm):
    images = [Image.new("RGB", (40, 24), colour) for colour in ("red", "blue")]
    column = datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image()))["image"]
    prompts = [vlm.prompt("what?")] * 2
    assert torch.equal(
        vlm.inputs(column, prompts)["pixel_values"], vlm.inputs(images, prompts)["pixel_values"]
    )
