"""Which fraction a schedule has to keep to cost as much as answers that exist already."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from transformers import PretrainedConfig

from tokensel.budget import fraction_count
from tokensel.cost.answers import Work, step_runs, unrolled, work_bytes, work_cost
from tokensel.schedules import Schedule
from tokensel.utils.errors import TokenselError

__all__ = ["keep_at_cost", "work_under"]

_PARTS = 1000  # a fraction is given in thousandths


def work_under(work: Work, schedule: Schedule) -> Work:
    """What an answer of the same length to the same prompt takes under another schedule.

    Args:
        work: what an answer took whose first layer read the whole image.
        schedule: one whose fractions are fixed in advance and that keeps newlines.

    Raises:
        TokenselError: the schedule does something else with newlines, or its fractions depend on the prompt.
    """
    if schedule.newline != "keep":
        raise TokenselError(f"newline is {schedule.newline!r}: only 'keep' leaves as many in every answer")
    steps, depth = unrolled(work["held"]).shape
    newlines = work["held"][0][1][0] - work["visual"]
    shares = np.ones((steps, depth))
    for layer in schedule.layers():
        entering = np.array([float(schedule.entering(layer, step)) for step in range(steps)])
        shares[:, layer:] = np.minimum(shares[:, layer:], entering[:, None])
    shares = np.minimum.accumulate(shares, axis=0)  # what was dropped does not come back
    counts = fraction_count(torch.full((steps * depth,), work["visual"]), torch.from_numpy(shares.ravel()))
    kept = np.where(shares > 0, counts.numpy().reshape(shares.shape), 0)
    # attention ranks tokens wherever some of those that are left are dropped
    before = np.vstack([np.full((1, depth), work["visual"]), kept[:-1]])
    ranked = [
        [step, layer - 1]
        for step in range(steps)
        for layer in schedule.layers()
        if 0 < kept[step, layer] < before[step, layer]
    ]
    return {**work, "held": step_runs(kept + newlines), "ranked": ranked}


def keep_at_cost(
    config: PretrainedConfig,
    answers: Sequence[Sequence[Work]],
    schedule: Callable[[float], Schedule],
    cost: Literal["flops", "kv_bytes"],
    least: float = 0.001,
) -> float:
    """The fraction under which a schedule costs what these answers cost, were its answers as long.

    Args:
        config: configuration of the vision-language model.
        answers: what they took, by benchmark; benchmarks count the same.
        schedule: the schedule that keeps a given fraction; its cost rises with it.
        cost: what is to be equal: the FLOPs of an answer, or the bytes of keys and values, its mean over the
            steps.
        least: the smallest fraction. It is returned where no fraction is cheap enough.

    Returns:
        A number of thousandths, the closest from above.
    """

    def mean_cost(work: Callable[[Work], Work]) -> float:
        def one(answer: Work) -> float:
            return (
                float(work_cost(config, answer, 1)[0]) if cost == "flops" else work_bytes(config, answer, 1)
            )

        return float(np.mean([np.mean([one(work(answer)) for answer in part]) for part in answers]))

    target = mean_cost(lambda answer: answer)
    low, high = max(1, round(least * _PARTS)), _PARTS
    while low < high:
        middle = (low + high) // 2
        tried = schedule(middle / _PARTS)
        if mean_cost(lambda answer, tried=tried: work_under(answer, tried)) >= target:
            high = middle
        else:
            low = middle + 1
    return high / _PARTS
