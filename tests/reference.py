"""What schedules are compared with: greedy decoding in which nothing is removed or cached, only masked."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from tiny import ask, cache_argument, scale_up, tiny_config, tiny_processor
from transformers import LlavaNextForConditionalGeneration, Qwen2Config

from tokensel.schedules import DyRate, Exponential, FastV, Fixed, RatePredictor, Vtw, pruned
from tokensel.schedules.attention import TYPES
from tokensel.schedules.dyrate import RateConfig
from tokensel.scorers import make_scorer
from tokensel.vlm import Vlm, reduce_inputs

STEPS = 16


def dyrate(layer: int = 2, heads: int = 4, certain: bool = False) -> DyRate:
    """Eight rates, the smaller the more a row attends to image and answer; or always the first rate."""
    predictor = RatePredictor(RateConfig(heads=heads, layer=layer, rates=8)).eval()
    weight = torch.tensor([0.0, 1.0, 0.0, 20.0])  # of system, image, instruction, response
    rate = torch.arange(8.0)[:, None]
    predictor.linear.weight.data = (0.0 if certain else rate) * weight.repeat(heads).expand(8, -1)
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
    "fastv-drop": FastV(2, 0.4, "drop"),
    "exponential-row": Exponential(1, 0.6, "row"),
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
            "vocab_size",
            "max_position_embeddings",
        )
        shape = {name: getattr(config.text_config, name) for name in shared}
        config.text_config = Qwen2Config(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config._attn_implementation = attn
    model = LlavaNextForConditionalGeneration(config).eval()
    scale_up(model)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return Vlm(model, tiny_processor(), "tiny")


def prompt(vlm: Vlm, rows: list[int], keep: float = 1.0):
    scorer = make_scorer("norm") if keep < 1 else None
    return reduce_inputs(vlm.model, ask(vlm, rows), scorer, keep)


@contextmanager
def cache_bytes(vlm: Vlm) -> Iterator[list[list[int]]]:
    """Bytes of keys and values in each layer's cache after each step, while a generation runs."""
    seen: list[list[int]] = []

    def weigh(decoder, _args, out):
        cache = getattr(out, cache_argument(decoder))
        seen.append([layer.keys.nbytes + layer.values.nbytes for layer in cache.layers])

    handle = vlm.model.model.language_model.register_forward_hook(weigh)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def generated(vlm: Vlm, reduced, schedule, steps: int = STEPS):
    options = {
        "output_logits": True,
        "return_dict_in_generate": True,
        "do_sample": False,
        "max_new_tokens": steps,
    }
    with pruned(vlm.model, reduced.prompt, schedule) as pruning:
        out = vlm.model.generate(**reduced, **options)
    return out, pruning


def went(
    schedule, keep: float, columns: dict[str, list[bool]], remain: list[int], scores: list[float]
) -> set[int]:
    """Columns of one row that go when the fraction ``keep`` of its cells stays, by hand.

    Args:
        columns: what the prompt's columns hold.
        remain: columns that are left.
        scores: of all columns.
    """
    last = len(scores) - 1
    cells = [c for c in remain if columns["cells"][c]]
    n = sum(columns["cells"])
    count = 0 if keep == 0 or n == 0 else max(1, round(keep * n))
    best = sorted(cells, key=lambda c: (c != last, -scores[c], c))[:count]
    gone = {c for c in cells if c not in best and c != last}
    if keep < 1 and schedule.newline != "keep":
        row: list[int] = []  # cells of the map since the newline before
        for column in range(len(scores)):
            if columns["newlines"][column]:
                stays = schedule.newline == "row" and any(c in best for c in row)
                if column in remain and column != last and not stays:
                    gone.add(column)
                row = []
            elif columns["cells"][column] and not columns["thumbnail"][column]:
                row.append(column)
    return gone


class NearTie(Exception):
    """Two scores at the border are equal up to rounding, so that either may come first."""


@torch.no_grad()
def masked_reference(
    vlm: Vlm,
    reduced,
    schedule,
    steps: int = STEPS,
    ties_raise: bool = False,
    written: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding where nothing is removed or cached: dropped columns are hidden from the later layers.

    The tokens of a step, the prompt being step 0, do not see what went at that step or before. With
    ``written`` [rows, steps] these tokens are read instead of the likeliest ones.
    """
    lm = vlm.model.get_decoder()
    layers = lm.layers
    more = reduced.for_decoder  # embeddings, and with Qwen3-VL what it adds after its first layers
    embeds, mask, logits, tokens = more.pop("inputs_embeds"), reduced["attention_mask"], [], []
    positions = reduced.get("position_ids", (mask.cumsum(1) - 1).clamp(min=0))  # [(axes,) rows, length]
    rows, prompt = mask.shape
    visual, newlines = reduced.visual.tolist(), reduced.newlines.tolist()
    columns = [
        {
            "cells": [v and not n for v, n in zip(visual[row], newlines[row])],
            "newlines": newlines[row],
            "thumbnail": reduced.thumbnail[row].tolist(),
        }
        for row in range(rows)
    ]
    (start,) = schedule.layers() or (len(layers),)
    gone_at = torch.full((rows, prompt), steps)  # the step at which each column of the prompt went

    def hide(index, _layer, args, kwargs):
        length = args[0].shape[1]
        gone = torch.zeros(rows, length, length, dtype=torch.bool)
        if index >= start:
            at = (torch.arange(length) - prompt + 1).clamp(min=0)
            gone[:, :, :prompt] = gone_at[:, None] <= at[:, None]
        allowed = mask.bool()[:, None] & ~gone & torch.ones(length, length, dtype=torch.bool).tril()
        allowed |= torch.eye(length, dtype=torch.bool)
        mask_added = torch.zeros(allowed.shape).masked_fill_(~allowed, -1e30)[:, None]
        return args, kwargs | {"attention_mask": mask_added}

    def mass(attention):
        """Row by row: what stands before the first visual token, the visual ones, the rest, the answer."""
        shares = torch.zeros(rows, attention.shape[1], len(TYPES))
        for row in range(rows):
            places = [column for column in range(prompt) if visual[row][column]]
            first = places[0] if places else prompt
            after = [column for column in range(first, prompt) if not visual[row][column]]
            paid, answer = attention[row, :, :prompt], attention[row, :, prompt:]
            parts = (paid[:, :first], paid[:, places], paid[:, after], answer)
            shares[row] = torch.stack([part.sum(1) for part in parts], 1)
        return shares

    attn = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    hooks = [
        layer.register_forward_pre_hook(partial(hide, i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    for step in range(steps):
        if schedule.layers():
            attentions = lm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                output_attentions=True,
                use_cache=False,
                **more,
            ).attentions
            paid = attentions[start - 1][:, :, -1]
            keep = schedule.entering(start, step, partial(mass, paid))
            keeps = keep.tolist() if torch.is_tensor(keep) else [keep] * rows
            for row in range(rows):
                remain = [c for c in range(prompt) if mask[row, c] and gone_at[row, c] > step]
                scores = paid[row].mean(0)[:prompt].tolist()
                gone = went(schedule, keeps[row], columns[row], remain, scores)
                cells = [c for c in remain if columns[row]["cells"][c]]
                lost = [scores[c] for c in cells if c in gone]
                kept = [scores[c] for c in cells if c not in gone and c != prompt - 1]
                if ties_raise and lost and kept and min(kept) - max(lost) <= 1e-6 * min(kept):
                    raise NearTie
                for column in gone:
                    gone_at[row, column] = step
        hidden = lm(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **more
        ).last_hidden_state[:, -1]
        logits.append(vlm.model.lm_head(hidden))
        tokens.append(logits[-1].argmax(-1) if written is None else written[:, step])
        embeds = torch.cat([embeds, lm.embed_tokens(tokens[-1])[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        if "visual_pos_masks" in more:
            marks = more["visual_pos_masks"]
            more["visual_pos_masks"] = torch.cat([marks, marks.new_zeros(rows, 1)], 1)
    for hook in hooks:
        hook.remove()
    vlm.model.set_attn_implementation(attn)
    return torch.stack(tokens, 1), torch.stack(logits, 1)
