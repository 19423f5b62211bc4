"""What stands in the place of dropped tokens: masks that equal removal, blanks, and copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_proportional import BATCHES, MODELS, batches, drawn_kept, encoded_pages, everywhere, generated, load
from tiny import ask, logits

from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import encode, reduce
from tokensel.vlm.dropped import nearest_kept

FILLED = ("blank", "copied")
filling = pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3_vl"])


@everywhere
@batches
def test_masked_tokens_change_as_much_as_removed_ones(name, attn, rows):
    vlm = load(name, attn)
    encoded, norm = encode(vlm.model, ask(vlm, rows)), make_scorer("norm")
    for choices in ({"newline": "row"}, {"attention": "proportional"}):
        removed, masked = (reduce(encoded, norm, 0.3, **choices, dropped=d) for d in ("removed", "masked"))
        assert masked["attention_mask"].shape[1] > removed["attention_mask"].shape[1]
        assert torch.equal(masked.kept, removed.kept) and torch.equal(masked.n_visual, masked.n_visual_full)
        tokens, expected = generated(vlm, removed)
        masked_tokens, ours = generated(vlm, masked)
        assert torch.equal(masked_tokens, tokens) and (ours - expected).abs().max() < 1e-4


@filling
@pytest.mark.parametrize("dropped", FILLED)
def test_places_of_dropped_tokens_hold_a_blank_or_the_kept_one_most_like_them(name, dropped):
    vlm = load(name)
    inputs = ask(vlm, BATCHES[1])
    encoded, norm = encode(vlm.model, inputs), make_scorer("norm")
    whole, filled = reduce(encoded), reduce(encoded, norm, 0.3, dropped=dropped, newline="drop")
    assert filled.attn_bias is None and torch.equal(filled["attention_mask"], whole["attention_mask"])
    # all text, and all newlines, are what they were
    layout, text = encoded.layout, ~whole.visual
    assert torch.equal(filled["inputs_embeds"][text], whole["inputs_embeds"][text])
    before, after = (reduced["inputs_embeds"][reduced.visual] for reduced in (whole, filled))
    kept = torch.zeros_like(layout.cell)
    kept[layout.cell] = filled.kept.flatten()[layout.source[layout.cell]]
    same = kept | ~layout.cell
    assert torch.allclose(after[same], before[same], atol=1e-5)
    tokens = encoded.features.tokens.flatten(0, 1)
    for place in (~same).nonzero()[:, 0].tolist():
        own = layout.image == layout.image[place]
        if dropped == "blank":
            expected = before[own & ~same].mean(0)
        else:
            stay = (own & kept).nonzero()[:, 0]
            alike = torch.cosine_similarity(
                tokens[layout.source[place]], tokens[layout.source[stay]].double(), dim=-1
            )
            expected = before[stay[alike.argmax()]]
        assert torch.allclose(after[place], expected, atol=1e-5)
    changed = (logits(vlm.model, filled) - logits(vlm.model, whole))[:, -1].abs().amax(1)
    assert (changed > 1e-2).tolist() == [row is not None for row in BATCHES[1]]


@pytest.mark.parametrize("name", ["mistral", "onevision", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "choices", [{"dropped": d} for d in ("masked", *FILLED)] + [{"attention": "uniform"}]
)
def test_with_nothing_dropped_no_logit_changes(name, choices):
    vlm = load(name)
    inputs = ask(vlm, BATCHES[1])
    reduced = reduce(encode(vlm.model, inputs), make_scorer("norm"), 1.0, **choices)
    assert reduced.attn_bias is None
    assert torch.equal(logits(vlm.model, reduced), logits(vlm.model, inputs))


def test_uniform_attention_gives_every_kept_cell_of_an_image_an_equal_share_of_its_cells():
    vlm = load("mistral")
    encoded = encode(vlm.model, ask(vlm, [[0], None, [1]]))
    reduced = reduce(encoded, make_scorer("norm"), 0.3, attention="uniform", strength=0.5)
    for row in (0, 2):
        cells = reduced.visual[row] & ~reduced.newlines[row]
        share = reduced.n_visual_full[row] / reduced.n_visual[row]
        assert torch.allclose(reduced.attn_bias[row][cells], 0.5 * share.log())
        assert not reduced.attn_bias[row][~cells].any()
    assert not reduced.attn_bias[1].any()


@given(data=st.data(), name=st.sampled_from(("llama", "onevision", "qwen2_5_vl")))
@settings(deadline=None, max_examples=20)
def test_the_nearest_kept_cell_is_of_the_same_image_and_for_a_kept_one_itself(data, name):
    encoded = encoded_pages(name)
    layout = encoded.layout
    kept = drawn_kept(data, encoded)
    nearest, places = nearest_kept(encoded, kept), torch.arange(len(kept))
    cells = kept & layout.cell
    assert torch.equal(layout.image[nearest], layout.image)
    some = torch.bincount(layout.image[cells], minlength=len(layout.tiles))[layout.image] > 0
    stays = ~layout.cell | kept | ~some
    assert torch.equal(nearest[stays], places[stays]) and cells[nearest[~stays]].all()


def test_what_cannot_be_right_gets_one_line():
    norm = make_scorer("norm")
    pages, deeper = encoded_pages("llama"), encoded_pages("qwen3_vl")
    for dropped in FILLED:
        with pytest.raises(TokenselError, match="Qwen3-VL adds features of a dropped token"):
            reduce(deeper, norm, 0.3, dropped=dropped)
        with pytest.raises(TokenselError, match=f"attention is 'uniform' and dropped is '{dropped}'"):
            reduce(pages, norm, 0.3, dropped=dropped, attention="uniform")
    with pytest.raises(TokenselError, match="dropped is 'gone': choose one of removed, masked"):
        reduce(pages, norm, 0.3, dropped="gone")
