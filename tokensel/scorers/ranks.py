"""Ranks on the device: nothing here is read on the host."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["falling_ranks", "ranks_in_groups"]


def falling_ranks(
    values: Float[Tensor, "rows tokens"], valid: Bool[Tensor, "rows tokens"] | None = None
) -> Int[Tensor, "rows tokens"]:
    """The rank of each value in its row, 0 for the highest; of equals the first wins, invalid come last."""
    low = values if valid is None else values.masked_fill(~valid, -torch.inf)
    return low.argsort(dim=1, descending=True, stable=True).argsort(1)


def ranks_in_groups(
    values: Float[Tensor, "rows tokens"], group: Int[Tensor, "rows tokens"]
) -> Int[Tensor, "rows tokens"]:
    """The same within the groups of each row, which are numbered from 0 to at most the number of tokens."""
    order = values.argsort(dim=1, descending=True, stable=True)
    # a second, stable sort by group keeps the order of the values inside each
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    place = order.argsort(1)  # of each token in the rows sorted by group and value
    rows, tokens = group.shape
    sizes = torch.zeros(rows, tokens + 1, dtype=torch.long, device=group.device)
    sizes.scatter_add_(1, group, torch.ones_like(group))
    return place - (sizes.cumsum(1) - sizes).gather(1, group)
