"""The cost of each answer of a batch: the formulas, applied to what happened during generation."""

from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PretrainedConfig, PreTrainedModel

from tokensel.cost.count import (
    count_answer,
    count_layers,
    count_projector,
    count_trunk,
    count_vision,
    held_tokens,
    kv_bytes,
    layers_read,
)
from tokensel.cost.towers import count_tower
from tokensel.vlm.generate import GenerationOutput
from tokensel.vlm.reduce import Reduced

__all__ = ["Work", "answer_costs", "answer_work", "work_bytes", "work_cost"]


Work = dict[str, Any]
"""What one answer took, as plain JSON: enough to count its cost whenever the formulas change.

``text``, ``visual``: tokens of the prompt besides the image, and visual tokens (newlines not counted).
``tiles``, ``cells``: tiles that were encoded, and patches of each. ``grids``: rows and columns of each tile,
in tokens, only for a model without newlines. ``held``: visual tokens in the cache of each layer as pairs of a
number of generation steps and the counts during these steps. ``cached``: the same after each step, only where
a schedule evicts from layers that ran already. ``ranked``: step and layer of every additional row of
attention. ``reread``: how many layers read the prompt a second time, only where some did. ``before``: of a
prompt that all layers read before this one, its visual tokens with newlines and without, only where they did.
"""


def answer_work(model: PreTrainedModel, reduced: Reduced, output: GenerationOutput) -> list[Work]:
    """What each answer of a batch took, see :data:`Work`.

    A row is counted as if it were alone in the batch: without padding, and without the steps of longer rows.

    Args:
        model: the vision-language model that generated the answers.
        reduced: the prompts.
        output: the answers.
    """
    layers, pruning = model.config.get_text_config().num_hidden_layers, output.pruning
    text = (reduced["attention_mask"].bool() & ~reduced.visual).sum(1).tolist()
    packed = reduced.visual.sum(1).tolist()  # newlines included
    # left: visual tokens that each layer holds, [steps, layers, rows]
    left = None if pruning is None else np.stack([step.cpu().numpy() for step in pruning.left])
    kept = None if pruning is None or pruning.cached is pruning.left else pruning.cached
    cached = None if kept is None else np.stack([step.numpy() for step in kept])
    grids = None if reduced.grid is None else reduced.grid.split(reduced.n_tiles.tolist())  # by row
    answers = len(output.lengths) // len(text)  # to each prompt, with num_return_sequences
    work = []
    for row, steps in enumerate(output.lengths.tolist()):
        prompt = row // answers
        ranked = [] if pruning is None else pruning.ranked_in(row, steps)
        held = [[steps, [packed[prompt]] * layers]] if left is None else step_runs(left[:steps, :, row])
        work.append(
            {
                "text": text[prompt],
                "visual": int(reduced.n_visual[prompt]),
                "tiles": int(reduced.n_tiles[prompt]),
                "cells": int(reduced.cells),
                "held": held,
                "ranked": [[int(step), int(layer)] for step, layer in ranked],
            }
        )
        if grids is not None:
            work[-1]["grids"] = grids[prompt].tolist()
        if pruning is not None and (reread := int(pruning.reread[row])):
            work[-1]["reread"] = reread
        if reduced.n_read is not None:
            work[-1]["before"] = [int(reduced.n_read[prompt]), int(reduced.n_visual_full[prompt])]
        if cached is not None:
            work[-1]["cached"] = step_runs(cached[:steps, :, row])
    return work


def step_runs(held: Int[np.ndarray, "steps layers"]) -> list[list[Any]]:
    """Pairs of a number of steps and the counts that stay the same during them."""
    return [[len(list(group)), counts] for counts, group in groupby(held.tolist())]


def unrolled(runs: list[list[Any]]) -> Int[np.ndarray, "steps layers"]:
    """The inverse of :func:`step_runs`."""
    return np.concatenate([np.tile(counts, (steps, 1)) for steps, counts in runs])


def work_cost(
    config: PretrainedConfig, work: Work, itemsize: int, selector: PretrainedConfig | None = None
) -> tuple[int, float]:
    """FLOPs of one answer, from pixels to its end, and mean bytes of its keys and values over the steps.

    The work of scorers other than the selector is negligible and not counted.

    Args:
        config: configuration of the vision-language model.
        work: what the answer took.
        itemsize: bytes of a number in the cache.
        selector: configuration of the selector, if it was used.
    """
    text_config: Any = config.get_text_config()
    tiles, cells, grids = work["tiles"], work["cells"], work.get("grids")
    held = unrolled(work["held"])
    flops = count_answer(text_config, work["text"], held, [(step, layer) for step, layer in work["ranked"]])
    flops += count_layers(text_config, work.get("reread", 0), work["text"] + int(held[0, 0]))
    read, projected = work.get("before", (0, work["visual"]))
    if read:
        flops += count_layers(text_config, text_config.num_hidden_layers, work["text"] + read)
    if grids is not None:
        flops += count_tower(config, grids)
        return flops + sum(
            count_trunk(selector, rows * columns) for rows, columns in grids if selector is not None
        ), work_bytes(config, work, itemsize)
    flops += count_projector(config, projected)
    if tiles:
        flops += count_vision(config.vision_config, tiles, layers_read(config), cells)
        flops += count_trunk(selector, cells, tiles) if selector is not None else 0
    return flops, work_bytes(config, work, itemsize)


def work_bytes(config: PretrainedConfig, work: Work, itemsize: int) -> float:
    """Mean bytes of the keys and values of one answer over its steps.

    Args:
        config: configuration of the vision-language model.
        work: what the answer took.
        itemsize: bytes of a number in the cache.
    """
    text, cached = config.get_text_config(), unrolled(work.get("cached", work["held"]))
    per_layer = kv_bytes(text, 1, itemsize) / text.num_hidden_layers
    return float(held_tokens(work["text"], cached).sum(1).mean() * per_layer)


def answer_costs(
    model: PreTrainedModel,
    reduced: Reduced,
    output: GenerationOutput,
    selector: PretrainedConfig | None = None,
) -> list[tuple[int, float]]:
    """:func:`work_cost` of each answer of a batch.

    Args:
        model: the vision-language model that generated the answers.
        reduced: the prompts.
        output: the answers.
        selector: configuration of the selector, if it was used.
    """
    return [
        work_cost(model.config, work, model.dtype.itemsize, selector)
        for work in answer_work(model, reduced, output)
    ]
