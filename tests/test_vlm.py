"""The seam with LLaVA-NeXT against the stock model: nothing changes when all is kept, nothing else when it is not."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import noise_image, scale_up, tiny_config, tiny_llava, tiny_processor
from transformers import CLIPVisionConfig, LlavaNextForConditionalGeneration

from tokensel.errors import TokenselError
from tokensel.features import Features
from tokensel.scorers import make_scorer
from tokensel.selector import SelectorConfig, TokenSelector
from tokensel.vlm import Choices, Encoded, Vlm, downsample, encode, load_vlm, reduce, reduce_inputs
from tokensel.vlm.choose import add_newlines, choose_cells
from tokensel.vlm.downsample import _pack_coarse, coarse_grid
from tokensel.vlm.encode import content_keys
from tokensel.vlm.layout import read_layout, tile_counts

SIZES = [(40, 48), (30, 90), (24, 24), (100, 31), (17, 60)]  # height, width: several grids, letterboxes on either side


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return Vlm(*tiny_llava(), "tiny")


def batch(vlm: Vlm, rows: list[int | list[int] | None], questions: list[str] | None = None, seed: int = 0):
    """Processed rows: each an index into SIZES, several of them, or no image."""
    questions = questions or [f"what{'?' * (i + 1)}" for i in range(len(rows))]
    images = [
        None if row is None else [noise_image(*SIZES[i], seed=seed + i) for i in ([row] if isinstance(row, int) else row)]
        for row in rows
    ]
    prompts = [vlm.prompt(q, 0 if i is None else len(i)) for q, i in zip(questions, images, strict=True)]
    return vlm.inputs(images, prompts)


class Given:
    """A scorer that says what it is told: scores by (tile, token)."""

    name, needs_cls_attention, scope, adaptive = "given", False, "tile", True

    def __init__(self, scores: torch.Tensor):
        self.scores = scores

    def __call__(self, features):
        return self.scores


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


# What the tower sees, and where packed tokens come from


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3, 4], [None, [1, 3], 2]])
def test_features_are_those_the_projector_is_given(vlm, rows):
    inputs = batch(vlm, rows)
    seen = []
    handle = vlm.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
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
    inputs = batch(vlm, [0, 3])
    assert torch.equal(logits(model, reduce_inputs(model, inputs)), logits(model, inputs))


def test_cls_attention_is_that_of_the_eager_tower(vlm):
    inputs = batch(vlm, [0, 1])
    encoded = encode(vlm.model, inputs)
    eager, _ = tiny_llava(attn="eager")
    tower = eager.model.vision_tower
    with torch.no_grad():
        attentions = tower(encoded.pixel_values, output_attentions=True).attentions
    wanted = attentions[-2].mean(1)[:, 0, 1:]  # the layer that makes hidden_states[-2]
    torch.testing.assert_close(encoded.features.cls_attention, wanted, atol=1e-6, rtol=1e-5)
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
    assert layout.thumbnail.sum() == layout.tokens and bool((layout.source[layout.thumbnail] < layout.tokens).all())
    assert len(layout.source[cell].unique()) == int(cell.sum()) == int(layout.valid.sum())


def test_a_batch_and_its_rows_have_the_same_keys(vlm):
    inputs = batch(vlm, [0, [1, 2], None, 3])
    encoded = encode(vlm.model, inputs)
    assert len(encoded.features.keys.unique()) == len(encoded.features.keys)
    alone = encode(vlm.model, batch(vlm, [3]))
    assert torch.equal(encoded.features.keys[-len(alone.features.keys) :], alone.features.keys)
    named = encode(vlm.model, inputs, keys=[7, 8, 9, 10]).features.keys
    assert torch.equal(named, encode(vlm.model, inputs, keys=torch.tensor([7, 8, 9, 10])).features.keys)
    assert not torch.equal(named, encoded.features.keys)
    assert torch.equal(named[-len(alone.features.keys) :], encode(vlm.model, batch(vlm, [3]), keys=[10]).features.keys)
    pixels = encoded.pixel_values
    changed = pixels.clone()
    changed[2, 0, 3, 3] += 0.01
    assert (content_keys(pixels) != content_keys(changed)).nonzero().flatten().tolist() == [2]


# Everything kept: the stock model, to the last bit


@pytest.mark.parametrize(("text", "attn"), list(product(["llama", "mistral"], ["sdpa", "eager"])))
def test_keeping_everything_changes_no_logit(text, attn):
    vlm = Vlm(*tiny_llava(text, attn), "tiny")
    scorer = make_scorer("norm")
    for rows in ([0], [0, 1], [None, [2, 4], 3]):
        inputs = batch(vlm, rows)
        stock = logits(vlm.model, inputs)
        for reduced in (reduce_inputs(vlm.model, inputs), reduce_inputs(vlm.model, inputs, scorer, 1.0, budget="tile")):
            assert (logits(vlm.model, reduced) - stock).abs().max() == 0.0
            assert torch.equal(reduced.n_visual, reduced.n_visual_full)
        wanted = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for positions in ("compact", "original"):
            reduced = reduce_inputs(vlm.model, inputs, positions=positions)
            assert torch.equal(vlm.model.generate(**reduced, max_new_tokens=8, do_sample=False), wanted)


def test_logits_depend_on_the_picture(vlm):
    # without this, all of the above would hold for a model that sees nothing
    one, other = batch(vlm, [0]), batch(vlm, [0], seed=50)
    assert (logits(vlm.model, one)[:, -1] - logits(vlm.model, other)[:, -1]).abs().max() > 0.05
    some = reduce_inputs(vlm.model, one, make_scorer("norm"), 0.5)
    assert (logits(vlm.model, some)[:, -1] - logits(vlm.model, one)[:, -1]).abs().max() > 0.05


def test_batches_padded_on_the_right_are_fine(vlm):
    inputs = batch(vlm, [0, 1])
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
    inputs = batch(vlm, [0, 1])
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(logits(model, reduce_inputs(model, inputs)), logits(model, inputs))
    names = ["random", "uniform", "norm", "cls", "diversity"]
    for scorer in [make_scorer(name) for name in names] + [make_scorer("selector", selector=tiny_selector())]:
        reduced = reduce_inputs(model, inputs, scorer, 0.3)
        assert reduced["inputs_embeds"].dtype == torch.bfloat16 and bool(logits(model, reduced).isfinite().all())


# Some kept


def tiny_selector(width: int = 32) -> TokenSelector:
    torch.manual_seed(1)
    return TokenSelector(SelectorConfig(width=width, heads=4))


ALL_CHOICES = [
    dict(zip(("budget", "thumbnail", "newline", "positions"), values, strict=True))
    for values in product(("image", "tile"), ("compete", "keep", "drop"), ("keep", "drop", "row"), ("compact", "original"))
]


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_a_ragged_batch_equals_its_rows_alone(text):
    vlm = Vlm(*tiny_llava(text), "tiny")
    scorers = [make_scorer(name, seed=2) for name in ("random", "diversity")]
    scorers.append(make_scorer("selector", selector=tiny_selector()))
    rows = [0, None, [1, 3], 4]
    together = encode(vlm.model, batch(vlm, rows, ["a?", "bb?", "c?", "dddd?"]))
    alone = [encode(vlm.model, batch(vlm, [row], [q])) for row, q in zip(rows, ["a?", "bb?", "c?", "dddd?"], strict=True)]
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
    vlm = Vlm(*tiny_llava("mistral", attn), "tiny")
    for rows in ([0], [0, 1, None]):
        reduced = reduce_inputs(vlm.model, batch(vlm, rows), make_scorer("random"), 0.3, positions=positions)
        options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
        options |= dict(eos_token_id=None)  # no row ends early
        cached = vlm.model.generate(**reduced, **options)
        plain = vlm.model.generate(**reduced, **options, use_cache=False)
        assert torch.equal(cached.sequences, plain.sequences) and cached.sequences.shape[1] == 12
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_original_positions_equal_a_full_sequence_with_the_dropped_tokens_masked(text):
    """A token that is masked for every query is not there; so dropping with original positions must agree."""
    vlm = Vlm(*tiny_llava(text), "tiny")
    inputs = batch(vlm, [0, 1])
    encoded = encode(vlm.model, inputs)
    full = reduce(encoded)
    reduced = reduce(encoded, make_scorer("random"), 0.3, newline="row", positions="original")
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    out = vlm.model.generate(**reduced, **options)

    kept = add_newlines(encoded.layout, choose_cells(encoded.layout, encoded.score(make_scorer("random")), 0.3, Choices()), "row")
    mask = inputs["attention_mask"].clone()
    mask[encoded.places[:, 0], encoded.places[:, 1]] = kept.long()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    embeds = full["inputs_embeds"]
    for step in range(6):
        with torch.no_grad():
            wanted = vlm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        torch.testing.assert_close(out.logits[step], wanted.logits[:, -1], atol=1e-4, rtol=0)
        token = out.sequences[:, step : step + 1]
        embeds = torch.cat([embeds, vlm.model.get_input_embeddings()(token)], 1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    # and the numbering matters: compact positions give something else
    compact = vlm.model.generate(**reduce(encoded, make_scorer("random"), 0.3, newline="row"), **options)
    assert (compact.logits[0] - out.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_beams(vlm, positions):
    scorer = make_scorer("random")
    reduced = reduce_inputs(vlm.model, batch(vlm, [0, 1, None]), scorer, 0.3, positions=positions)
    beams = vlm.model.generate(**reduced, num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, single in enumerate([0, 1, None]):
        inputs = batch(vlm, [single], [f"what{'?' * (row + 1)}"])
        one = reduce_inputs(vlm.model, inputs, scorer, 0.3, positions=positions)
        alone = vlm.model.generate(**one, num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(beams[row], alone[0])


def test_kept_tokens_are_the_stock_embeddings_in_their_old_order(vlm):
    inputs = batch(vlm, [0, [1, 2], None])
    encoded = encode(vlm.model, inputs)
    full = reduce(encoded)["inputs_embeds"]
    generator = torch.Generator().manual_seed(0)
    scorer = Given(torch.rand(encoded.features.tokens.shape[:2], generator=generator))
    for choices in ALL_CHOICES:
        reduced = reduce(encoded, scorer, 0.4, **choices)
        cells = choose_cells(encoded.layout, encoded.score(scorer), 0.4, Choices(**choices))
        assert torch.equal(reduced.kept, encoded.layout.spread(cells))
        kept = add_newlines(encoded.layout, cells, choices["newline"])
        stay = encoded.attention_mask.clone()
        stay[encoded.places[:, 0], encoded.places[:, 1]] = kept
        for row in range(3):
            count = int(stay[row].sum())
            torch.testing.assert_close(reduced["inputs_embeds"][row, -count:], full[row, stay[row]], atol=1e-6, rtol=0)


# The choices


def test_counts_follow_the_budget(vlm):
    encoded = encode(vlm.model, batch(vlm, [0, [1, 2], None, 3]))
    layout, scorer = encoded.layout, make_scorer("random")
    cells = torch.bincount(layout.image[layout.cell])
    for keep in (0.01, 0.1, 0.3, 0.5, 0.9, 1.0):
        wanted = [max(1, round(keep * n)) for n in cells.tolist()]
        for budget, thumbnail in product(("image", "tile"), ("compete", "keep", "drop")):
            chosen = choose_cells(layout, encoded.score(scorer), keep, Choices(budget, thumbnail))
            counts = torch.bincount(layout.image[chosen], minlength=4).tolist()
            small = torch.bincount(layout.image[layout.thumbnail], minlength=4).tolist()
            room = [n - t if thumbnail == "drop" else n for n, t in zip(cells.tolist(), small, strict=True)]
            assert counts == [min(w, r) for w, r in zip(wanted, room, strict=True)]
            assert not (chosen & ~layout.cell).any()
            mine = torch.bincount(layout.image[chosen & layout.thumbnail], minlength=4).tolist()
            if thumbnail == "drop":
                assert mine == [0, 0, 0, 0]
            if thumbnail == "keep":
                assert mine == [min(w, t) for w, t in zip(wanted, small, strict=True)]


def test_a_budget_per_tile_gives_every_tile_its_share(vlm):
    encoded = encode(vlm.model, batch(vlm, [0, 3]))
    tiles, tokens = encoded.features.tokens.shape[:2]
    scorer = Given(torch.arange(tiles * tokens).view(tiles, tokens).float())  # later tiles score higher
    share = reduce(encoded, scorer, 0.25, budget="tile").kept.sum(1)
    exact = encoded.layout.valid.sum(1) * 0.25
    assert ((share - exact).abs() <= 1).all()
    greedy = reduce(encoded, scorer, 0.25, budget="image").kept.sum(1)
    assert greedy[0] == 0 and greedy.sum() == share.sum()


def test_newlines_of_rows_stay_with_their_rows(vlm):
    encoded = encode(vlm.model, batch(vlm, [0, [1, 2]]))
    layout = encoded.layout
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        cells = (torch.rand(len(layout.source), generator=generator) > 0.93) & layout.cell
        kept = add_newlines(layout, cells, "row")
        row_has_cell = False
        for i in range(len(layout.source)):  # the rule, spelt out one token at a time
            if layout.cell[i]:
                assert kept[i] == cells[i]
                row_has_cell |= bool(cells[i]) and not bool(layout.thumbnail[i])
            else:
                assert bool(kept[i]) == row_has_cell
                row_has_cell = False
        assert torch.equal(add_newlines(layout, cells, "drop"), cells)
        assert torch.equal(add_newlines(layout, cells, "keep"), cells | ~layout.cell)


def test_the_adaptive_mask_keeps_what_scores_above_zero(vlm):
    encoded = encode(vlm.model, batch(vlm, [0, 1]))
    scores = torch.randn(encoded.features.tokens.shape[:2], generator=torch.Generator().manual_seed(0)) - 0.5
    reduced = reduce(encoded, Given(scores), None)
    assert torch.equal(reduced.kept, (scores > 0) & encoded.layout.valid)
    assert reduce(encoded, Given(scores - 100), None).n_visual.tolist() == [0, 0]
    with pytest.raises(TokenselError, match="'norm' has no threshold of its own: give keep"):
        reduce(encoded, make_scorer("norm"), None)


def test_scores_are_computed_once(vlm):
    encoded, calls = encode(vlm.model, batch(vlm, [0])), []
    scorer = Given(torch.rand(encoded.features.tokens.shape[:2]))
    scorer.__class__ = type("Counted", (Given,), {"__call__": lambda self, f: calls.append(1) or self.scores})
    for keep in (0.1, 0.5):
        reduce(encoded, scorer, keep)
    assert len(calls) == 1


def test_only_kept_tokens_are_projected(vlm):
    encoded, sizes = encode(vlm.model, batch(vlm, [0, 1])), []
    projector = vlm.model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:-1].numel()))
    reduced = reduce(encoded, make_scorer("norm"), 0.3)
    handle.remove()
    assert sizes == [int(reduced.n_visual.sum())]


def test_diversity_ranges_over_all_tokens_of_an_image(vlm):
    encoded = encode(vlm.model, batch(vlm, [0, 3]))
    scorer = make_scorer("diversity")
    rows, slot, features = encoded.by_image()
    assert features.valid.sum(1).tolist() == encoded.n_visual.tolist()
    first = int(encoded.n_visual[0])
    alone = encode(vlm.model, batch(vlm, [0]))
    torch.testing.assert_close(features.tokens[0, :first], alone.by_image()[2].tokens[0], atol=1e-5, rtol=1e-5)
    best = encoded.score(scorer)[encoded.layout.cell & (encoded.layout.image == 0)].argsort(descending=True)
    alone_best = alone.score(scorer)[alone.layout.cell].argsort(descending=True)
    assert best[:50].tolist() == alone_best[:50].tolist()


# Down-sampling


@pytest.mark.parametrize(("keep", "grid"), [(1.0, (8, 8)), (0.5, (5, 6)), (0.3, (4, 5)), (0.25, (4, 4)), (0.1, (2, 3))])
def test_coarse_grid_is_the_nearest(keep, grid):
    assert coarse_grid(keep, 8) == grid


@given(height=st.integers(8, 130), width=st.integers(8, 130))
@settings(deadline=None, max_examples=15)
def test_downsampling_by_nothing_is_the_stock_model(vlm, height, width):
    inputs = vlm.inputs([noise_image(height, width)], [vlm.prompt("?")])
    encoded = encode(vlm.model, inputs)
    for positions in ("compact", "original"):
        assert torch.equal(
            downsample(encoded, 1.0, positions=positions)["inputs_embeds"], reduce(encoded)["inputs_embeds"]
        )


def test_downsampling_comes_near_its_budget(vlm):
    rows = [0, None, [1, 2], 3]
    encoded = encode(vlm.model, batch(vlm, rows))
    for keep in (0.1, 0.25, 0.5, 0.75):
        cells = coarse_grid(keep, 6)[0] * coarse_grid(keep, 6)[1]
        for choices in ({}, {"newline": "drop"}, {"positions": "original"}):
            reduced = downsample(encoded, keep, **choices)
            wanted = encoded.n_visual * cells / 36
            assert ((reduced.n_visual - wanted).abs() <= 0.15 * wanted + 1).all()  # unpadding cuts whole rows
            out = logits(vlm.model, reduced)
            assert out.shape[1] == int(reduced["attention_mask"].sum(1).max()) and bool(out.isfinite().all())
            visible = reduced["attention_mask"].sum(1) - reduced.n_visual - reduced.n_newline
            text = encoded.attention_mask.sum(1) - torch.bincount(encoded.places[:, 0], minlength=4)
            assert torch.equal(visible, text)
    alone = downsample(encode(vlm.model, batch(vlm, [3], ["what????"])), 0.25)
    count = alone["inputs_embeds"].shape[1]
    together = logits(vlm.model, downsample(encoded, 0.25))[3, -count:]
    assert (together - logits(vlm.model, alone)[0]).abs().max() < 1e-4


@given(height=st.integers(3, 300), width=st.integers(3, 300), keep=st.floats(0.02, 1.0))
@settings(deadline=None, max_examples=40)
def test_every_coarse_token_has_a_place_of_its_own(layouts, height, width, keep):
    encoded = layouts(height, width)
    side, grid = 6, coarse_grid(keep, 6)
    source, place = _pack_coarse(encoded, 0, grid, side)
    assert len(source) == len(place)
    assert bool((place[1:] > place[:-1]).all()) and int(place[-1]) < len(encoded.layout.source)
    assert torch.equal(source < 0, ~encoded.layout.cell[place])
    cells = source[source >= 0]
    assert len(cells.unique()) == len(cells) and int(cells.max()) < encoded.layout.tiles[0] * grid[0] * grid[1]


@pytest.fixture(scope="module")
def layouts(vlm):
    """The layout of an image of any size, without running the tower."""

    def make(height: int, width: int) -> Encoded:
        sizes = torch.tensor([[height, width]])
        counts = tile_counts(vlm.model, {"image_sizes": sizes})
        layout = read_layout(vlm.model.model, counts, 36, sizes)
        ids = torch.full((1, len(layout.source)), vlm.model.config.image_token_id)
        features = Features(torch.zeros(sum(counts), 36, 1))
        return Encoded(vlm.model, ids, torch.ones_like(ids).bool(), ids.nonzero(), features, layout, None, sizes)

    return make


# Bad input


def test_what_does_not_fit_is_told_in_one_line(vlm):
    inputs = batch(vlm, [0, 1])
    encoded = encode(vlm.model, inputs)
    norm = make_scorer("norm")
    for keep in (0.0, 1.5, float("nan"), -1.0):
        with pytest.raises(TokenselError, match="keep is"):
            reduce(encoded, norm, keep)
        with pytest.raises(TokenselError, match="keep is"):
            downsample(encoded, keep)
    with pytest.raises(TokenselError, match="no scorer says which"):
        reduce(encoded, None, 0.5)
    with pytest.raises(TokenselError, match="'budgets' is no choice: the choices are budget, thumbnail"):
        reduce(encoded, norm, 0.5, budgets="tile")
    with pytest.raises(TokenselError, match="newline is 'maybe': choose one of keep, drop, row"):
        reduce(encoded, norm, 0.5, newline="maybe")
    with pytest.raises(TokenselError, match="width 64, these have 32"):
        reduce(encoded, make_scorer("selector", selector=TokenSelector(SelectorConfig(width=64))), 0.5)
    with pytest.raises(TokenselError, match="3 keys for 2 rows"):
        encode(vlm.model, inputs, keys=[1, 2, 3])
    cut = dict(inputs) | {"input_ids": inputs["input_ids"][:, 60:], "attention_mask": inputs["attention_mask"][:, 60:]}
    with pytest.raises(TokenselError, match="image placeholders in input_ids, but the images give"):
        encode(vlm.model, cut)
    with pytest.raises(TokenselError, match="packs no image tiles"):
        encode(vlm.model.model.language_model, inputs)
    with pytest.raises(TokenselError, match="2 rows of images for 1 prompts"):
        vlm.inputs([None, None], ["x"])


# Loading and asking


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_three_lines_put_a_selector_in_front_of_a_llava(folder, tmp_path):
    tiny_selector().save_pretrained(tmp_path)
    vlm = load_vlm(folder)
    selector = make_scorer("selector", selector=tmp_path)
    image = noise_image(40, 48)
    answer = vlm.answer(image, "what is this?", scorer=selector, keep=0.3, max_new_tokens=5)
    inputs = vlm.inputs([image], [vlm.prompt("what is this?")])
    assert answer == vlm.generate(reduce_inputs(vlm.model, inputs, selector, 0.3), 5)[0]
    # nothing kept back: the stock model's own answer
    stock = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert vlm.answer(image, "what is this?", max_new_tokens=5) == vlm.processor.batch_decode(
        stock, skip_special_tokens=True
    )[0].strip()
    assert isinstance(vlm.answer(None, "and without?", max_new_tokens=5), str)


def test_missing_and_damaged_models(folder, tmp_path):
    with pytest.raises(TokenselError, match="'nobody/no-such-llava'.*give a local folder") as caught:
        load_vlm("nobody/no-such-llava")
    assert "\n" not in str(caught.value)
    with pytest.raises(TokenselError, match="this folder holds no such model"):
        load_vlm(tmp_path)
    vlm = load_vlm(folder)
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(TokenselError, match="cut short or damaged"):
        load_vlm(tmp_path)


def test_a_model_without_tiles_is_refused(vlm, tmp_path):
    vlm.processor.save_pretrained(tmp_path)
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = tiny_config()
    plain = LlavaConfig(vision_config=config.vision_config, text_config=config.text_config, image_token_index=4)
    LlavaForConditionalGeneration(plain).save_pretrained(tmp_path)
    with pytest.raises(TokenselError, match="packs no image tiles"):
        load_vlm(tmp_path)


def test_true_vision_and_projector_of_llava_next_7b(tmp_path):
    """CLIP-L/14-336, projector to 4096 and the pinpoints of llava-v1.6-mistral-7b, from a folder, one language layer."""
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
