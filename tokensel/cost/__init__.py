"""What an answer costs: FLOPs and bytes counted by formula, time and memory measured."""

from tokensel.cost.count import (
    Cost,
    count_decoder,
    count_layers,
    count_projector,
    count_training,
    count_trunk,
    count_vision,
    first_token,
    kv_bytes,
    layers_read,
    step_bytes,
)

__all__ = [
    "Cost",
    "count_decoder",
    "count_layers",
    "count_projector",
    "count_training",
    "count_trunk",
    "count_vision",
    "first_token",
    "kv_bytes",
    "layers_read",
    "step_bytes",
]
