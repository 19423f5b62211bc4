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
from tokensel.cost.layers import keep_at_share, layer_shares, mean_share, mean_tokens, prefill_flops
from tokensel.cost.towers import count_tower

__all__ = [
    "Cost",
    "answer_costs",
    "answer_work",
    "count_answer",
    "count_decoder",
    "count_projector",
    "count_tower",
    "count_training",
    "count_trunk",
    "count_vision",
    "first_token",
    "held_tokens",
    "keep_at_share",
    "kv_bytes",
    "layer_shares",
    "layers_read",
    "mean_share",
    "mean_tokens",
    "prefill_flops",
    "step_bytes",
    "work_cost",
]
