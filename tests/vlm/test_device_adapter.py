"""Scorers, adapter and methods with a model on another device, for which "meta" stands in.

Mixing devices raises there, and so does reading a value on the host; only the scores are given values.
"""

import pytest
import torch
from test_device import Fetches
from tiny import ask, onevision_processor, tiny_learned, tiny_onevision, tiny_vlm

from tokensel.data.features import Features
from tokensel.methods import EncodedBatch, methods, prepare
from tokensel.scorers import SCORERS, make_scorer
from tokensel.vlm import Encoded, Vlm, encode, reduce_inputs
from tokensel.vlm.encode import content_keys

ROWS = [0, None, [1, 3]]


def on_meta(vlm: Vlm) -> Vlm:
    """The model on the device; inputs that its processor made before are on the host."""
    vlm.model.to("meta")
    return vlm


class Given(EncodedBatch):
    """Rows that are processed already."""

    def __init__(self, model, inputs, blind, native):
        self.model, self.inputs, self.blind_inputs, self.native = model, inputs, blind, native

    def encode(self, with_images: bool) -> Encoded:
        return encode(self.model, self.inputs if with_images else self.blind_inputs)


def scorer(name: str):
    return make_scorer(name, **tiny_learned("meta"), seed=1)


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_on_the_device_of_the_features_in_single_precision(name):
    for dtype in (torch.float32, torch.bfloat16):
        tokens = torch.zeros(3, 16, 32, dtype=dtype, device="meta")
        keys = torch.zeros(3, dtype=torch.long, device="meta")
        features = Features(
            tokens,
            cls_attention=torch.zeros(3, 16, device="meta"),
            keys=keys,
            tile=torch.zeros(3, 16, dtype=torch.long, device="meta"),
            centre=torch.zeros(3, 16, 2, device="meta"),
            relevance=torch.zeros(3, 16, device="meta"),
        )
        scores = scorer(name)(features)
        assert scores.is_meta and scores.shape == (3, 16) and scores.dtype == torch.float32
    assert content_keys(torch.zeros(2, 3, 8, 8, device="meta")).is_meta


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
@torch.no_grad()
def test_every_method_gives_prompts_on_the_device_and_counts_on_the_host(family):
    if family == "llava-next":
        vlm, native = tiny_vlm(), None
    else:
        ratio = "anyres_max_1000"
        vlm, native = Vlm(tiny_onevision(ratio), onevision_processor(ratio=ratio), "tiny"), "anyres_max_9"
    batch = Given(vlm.model, ask(vlm, ROWS), ask(vlm, [None, None, None]), native)
    on_meta(vlm)
    for method, row in methods().items():
        if (method == "native" and native is None) or (row.needs_cls_attention and native):
            continue
        if row.uses_question:  # runs the language model, whose own code reads its mask on the host
            continue
        for choices in ({}, {"budget": "tile", "newline": "row", "thumbnail": "keep"}):
            with Fetches() as fetches:
                chosen = scorer(row.scorer) if row.scorer else None
                reduced = prepare(batch, method, 0.3, choices, chosen)
            assert fetches.count == (1 if row.scorer else 0), method
            assert all(tensor.is_meta for tensor in (*reduced.values(), reduced.visual))
            counts = (reduced.n_visual, reduced.n_visual_full, reduced.n_newline, reduced.n_tiles)
            assert not any(tensor.is_meta for tensor in counts)
            assert reduced.kept is None or not reduced.kept.is_meta
            assert reduced["inputs_embeds"].shape[:2] == reduced["attention_mask"].shape


@torch.no_grad()
def test_inputs_may_be_on_the_host_or_on_the_device():
    vlm = tiny_vlm()
    inputs = dict(ask(vlm, ROWS))
    on_meta(vlm)
    for name in ("pixel_values", "image_sizes", "input_ids", "attention_mask"):
        assert not inputs[name].is_meta
    pixels = inputs | {"pixel_values": inputs["pixel_values"].to("meta")}
    for given in (inputs, pixels):
        with Fetches():
            reduced = reduce_inputs(vlm.model, given, scorer("norm"), 0.3, positions="compact")
        assert reduced["inputs_embeds"].is_meta
