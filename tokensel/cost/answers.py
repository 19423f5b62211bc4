"""The cost of each answer of a batch: the formulas, applied to what happened during generation."""

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from tokensel.cost.count import (
    count_answer,
    count_projector,
    count_trunk,
    count_vision,
    held_tokens,
    kv_bytes,
    layers_read,
)
from tokensel.vlm.generate import GenerationOutput
from tokensel.vlm.reduce import Reduced


def answer_costs(
    model: PreTrainedModel,
    reduced: Reduced,
    output: GenerationOutput,
    selector: PretrainedConfig | None = None,
) -> list[tuple[int, float]]:
    """FLOPs of each answer, from pixels to its end, and mean bytes of its keys and values over the steps.

    A row is counted as if it were alone in the batch: without padding, and without the steps of longer rows.
    The work of scorers other than the selector is negligible and not counted.

    Args:
        model: the LLaVA that generated the answers.
        reduced: the prompts.
        output: the answers.
        selector: configuration of the selector, if it was used.
    """
    config, text_config = model.config, model.config.text_config
    layers, itemsize = text_config.num_hidden_layers, model.dtype.itemsize
    text = (reduced["attention_mask"].bool() & ~reduced.visual).sum(1).tolist()
    visual = reduced.visual.sum(1).tolist()
    answers = len(output.lengths) // len(text)  # to each prompt, with num_return_sequences
    pruning = output.pruning
    # left: visual tokens that each layer holds, [steps, layers, rows]
    left = None if pruning is None else np.stack([step.cpu().numpy() for step in pruning.left])
    costs = []
    for row, steps in enumerate(output.lengths.tolist()):
        prompt = row // answers
        held = np.full((steps, layers), visual[prompt]) if left is None else left[:steps, :, row]
        ranked = [] if pruning is None else pruning.ranked_in(row, steps)
        tiles = int(reduced.n_tiles[prompt])
        flops = count_answer(text_config, text[prompt], held, ranked) + count_projector(
            config, int(reduced.n_visual[prompt])
        )
        if tiles:
            flops += count_vision(config.vision_config, tiles, layers_read(config), reduced.cells)
            flops += count_trunk(selector, reduced.cells, tiles) if selector is not None else 0
        per_layer = kv_bytes(text_config, 1, itemsize) / layers
        costs.append((flops, float(held_tokens(text[prompt], held).sum(1).mean() * per_layer)))
    return costs
