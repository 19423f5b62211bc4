"""The cost of an answer: FLOPs and bytes, counted by formula."""

from tokensel.cost.answers import answer_costs, answer_work, work_cost
from tokensel.cost.count import (
    Cost,
    count_answer,
    count_decoder,
    count_projector,
    count_training,
    count_trunk,
    count_vision,
    first_token,
    held_tokens,
    kv_bytes,
    layers_read,
    step_bytes,
)

__all__ = [
    "Cost",
    "answer_costs",
    "answer_work",
    "count_answer",
    "count_decoder",
    "count_projector",
    "count_training",
    "count_trunk",
    "count_vision",
    "first_token",
    "held_tokens",
    "kv_bytes",
    "layers_read",
    "step_bytes",
    "work_cost",
]
