"""What the label of a schedule means: the visual tokens its layers read on average, and what reading costs.

Two schedules that "keep 0.3" may read very different numbers of tokens: one keeps the fraction in all layers
but the first two, another lets it fall from stage to stage. The mean over the layers is what they have in
common, and what a scorer that keeps 0.3 before the first layer has as well. All numbers here are those of
the prefill; what a schedule drops during the answer saves no reading of the prompt.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PretrainedConfig

from tokensel.budget import fraction_count
from tokensel.cost.answers import Work
from tokensel.cost.count import count_answer
from tokensel.schedules import Schedule, cuts_at_depth, make_schedule, schedule_options
from tokensel.utils.errors import TokenselError, check_keep, check_layers

__all__ = ["keep_at_share", "layer_shares", "mean_share", "mean_tokens", "prefill_flops"]

_CLOSE = 1e-6  # of shares that count as equal
_HALVINGS = 40  # of the interval in which a label is searched; more than a float of single precision resolves


def layer_shares(schedule: Schedule, depth: int) -> Float[np.ndarray, "layers"]:
    """The fraction of the prompt's visual cells that each of ``depth`` layers reads in the prefill.

    Raises:
        TokenselError: the schedule drops tokens at a layer that there is not, or the fraction depends on the
            prompt (sparsevlm, dyrate), so that it is known only from what an answer took.
    """
    check_layers(schedule.name, schedule.layers(), depth)
    shares = np.ones(depth)
    for layer in sorted(schedule.layers()):
        # what was dropped once does not come back at a later cut
        shares[layer:] = min(shares[layer - 1], float(schedule.entering(layer)))
    return shares


def mean_share(schedule: Schedule, depth: int) -> float:
    """The layer average of :func:`layer_shares`: 1 where every layer reads the whole image.

    Raises:
        TokenselError: as :func:`layer_shares`.
    """
    return float(layer_shares(schedule, depth).mean())


def prefill_flops(
    config: PretrainedConfig, schedule: Schedule, text: int, cells: int, newlines: int = 0
) -> int:
    """FLOPs of a language model that reads one prompt under a schedule, and of one row of logits.

    Rows of attention that rank tokens are not counted: they are less than a thousandth of the whole.

    Args:
        config: a ``LlamaConfig``, ``MistralConfig`` or ``Qwen2Config``.
        schedule: the schedule.
        text: tokens of the prompt besides the image.
        cells: visual tokens, newlines not counted.
        newlines: newlines of the image. They are counted as kept, or as dropped at the schedule's first cut
            if its ``newline`` is "drop".

    Raises:
        TokenselError: as :func:`layer_shares` and :func:`~tokensel.cost.count.count_decoder`; ``newline`` is
            "row", so that their number depends on the prompt.
    """
    shares = layer_shares(schedule, config.num_hidden_layers)
    if schedule.newline == "row" and newlines:
        raise TokenselError("newline is 'row': which newlines stay depends on the prompt; take keep or drop")
    whole = shares == 1.0
    some = fraction_count(torch.full((len(shares),), cells), torch.from_numpy(shares)).numpy()
    kept = np.where(shares > 0, some, 0)
    ends = np.where(whole | (schedule.newline == "keep"), newlines, 0)
    return count_answer(config, text, (kept + ends)[None])


def keep_at_share(name: str, share: float, depth: int, **options: Any) -> float:
    """The label ``keep`` under which the schedule called ``name`` reads ``share`` of the cells on average.

    Args:
        name: a key of :data:`~tokensel.schedules.SCHEDULES`.
        share: layer average to reach, see :func:`mean_share`, in (0, 1].
        depth: layers of the language model. Cuts that are published for 32 layers move with it.
        options: other options of the schedule, such as ``layer``.

    Raises:
        TokenselError: ``share`` outside (0, 1], a schedule that takes no ``keep`` or whose fractions depend
            on the prompt, or one that reads more than ``share`` whatever it keeps, or less unless it keeps
            everything.
    """
    check_keep(share)
    if "keep" not in schedule_options(name):
        raise TokenselError(f"schedule '{name}' takes no keep: its layers alone say what it reads")
    options = {**cuts_at_depth(name, depth), **options}

    def reached(keep: float) -> float:
        return mean_share(make_schedule(name, keep=keep, **options), depth)

    if (least := reached(0.0)) > share or reached(1.0) < share:
        raise TokenselError(
            f"share is {share:g}: {name} reads at least {least:.3g} of the cells on average in {depth} "
            "layers, as its first layers read them all; give more, or let it drop tokens earlier"
        )
    low, high = 0.0, 1.0  # what is read rises with keep
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= share else (middle, high)
    if (most := reached(low)) < share - _CLOSE and reached(high) > share + _CLOSE:
        raise TokenselError(
            f"share is {share:g}: {name} reads at most {most:.3g} of the cells on average in {depth} layers "
            "unless it keeps all; give less, or 1"
        )
    return high


def mean_tokens(work: Work) -> float:
    """Visual tokens that the layers read in the prefill of one answer, on average; newlines count.

    Args:
        work: what the answer took, see :data:`~tokensel.cost.answers.Work`.
    """
    return float(np.mean(work["held"][0][1]))
