"""Merging: kept tokens take up the dropped ones that are most like them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["merge_nearest"]


def merge_nearest(
    tokens: Float[Tensor, "rows tokens channels"],
    targets: Bool[Tensor, "rows tokens"],
    dropped: Bool[Tensor, "rows tokens"],
) -> Float[Tensor, "rows tokens channels"]:
    """Each target becomes the mean of itself and of the dropped tokens whose nearest target it is.

    Nearest is by cosine; of equals the first one wins. In a row without a target nothing is merged. All other
    tokens stay as they are.

    Args:
        tokens: features; of any length.
        targets: tokens that take up others.
        dropped: tokens that are taken up; none of the targets.
    """
    count, merged = tokens.shape[1], []
    column = torch.arange(count, device=tokens.device)
    for row, target, drop in zip(tokens, targets, dropped):  # [tokens, tokens] for one row at a time
        unit = torch.nn.functional.normalize(row.float(), dim=-1)
        alike = (unit @ unit.T).masked_fill(~target[None, :], -torch.inf)
        # argmax leaves open which of several maxima it names; the first True of a comparison is the first
        nearest = (alike == alike.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
        # whoever is not taken up counts for itself alone, also where there is no target
        group = torch.where(drop & target.any(), nearest, column)
        total = torch.zeros_like(row, dtype=torch.float32).index_add_(0, group, row.float())
        size = torch.zeros(count, device=row.device).index_add_(0, group, torch.ones_like(group).float())
        mean = total / size.clamp(min=1)[:, None]
        merged.append(torch.where(target[:, None], mean.to(row), row))
    return torch.stack(merged) if merged else tokens
