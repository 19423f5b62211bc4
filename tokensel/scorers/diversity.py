"""Max-min diversity: each next token is the one least like those kept so far (DivPrune, arXiv 2503.02175)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.data.features import Features

__all__ = ["DiversityScorer", "max_min_order"]


def max_min_order(
    tokens: Float[Tensor, "rows tokens channels"], valid: Bool[Tensor, "rows tokens"] | None = None
) -> Int[Tensor, "rows tokens"]:
    """Greedy max-min order under cosine distance, for all rows at once; invalid tokens come last.

    The first token is the one whose nearest neighbour is farthest away; each next one is farthest from its
    nearest taken token. A prefix of the order is the greedy choice at that size, so one order serves every
    budget. Exact ties (identical features, a pair of nearest neighbours) go to the earlier token.

    Cost: one ``[rows, tokens, tokens]`` matrix and ``tokens`` steps of ``O(rows * tokens)``: quadratic in
    the tokens of an image, sequential by nature, and not free compared with the prefill that it saves.
    """
    rows, count, _ = tokens.shape
    if count == 0:
        return torch.empty(rows, 0, dtype=torch.long, device=tokens.device)
    real = torch.ones(rows, count, dtype=torch.bool, device=tokens.device) if valid is None else valid
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    alike = unit @ unit.transpose(1, 2)  # [rows, tokens, tokens]
    # Two tokens that are nearest to each other tie exactly, but their two entries may be rounded differently.
    distance = 1 - (alike + alike.transpose(1, 2)) / 2
    others = real[:, None, :] & ~torch.eye(count, dtype=torch.bool, device=tokens.device)
    # Distance to the nearest other token; from the second step on, to the nearest taken one.
    margin = distance.masked_fill(~others, float("inf")).amin(-1)
    # Cosine distances are in [0, 2]; below them wait the invalid tokens (-2) and then the taken ones (-3).
    # A lone valid token has no neighbour and infinite margin, and so comes first as well.
    waiting = torch.zeros_like(margin).masked_fill(~real, -2.0)
    margin = torch.where(real, margin, waiting)
    index = torch.arange(rows, device=tokens.device)
    order = torch.empty(rows, count, dtype=torch.long, device=tokens.device)
    taken = torch.zeros_like(real)
    for step in range(count):
        # argmax leaves open which of several maxima it names; the first True of a comparison is the first
        best = (margin == margin.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
        order[:, step] = best
        row = distance[index, best]  # [rows, tokens]
        margin = row if step == 0 else torch.minimum(margin, row)
        taken[index, best] = True
        margin = torch.where(real, margin, waiting).masked_fill(taken, -3.0)
    return order


class DiversityScorer:
    """Scores by :func:`max_min_order` over all visual tokens of an image (thumbnail and tiles together).

    DivPrune measures distance between projected features; here the encoder's features serve, so that
    dropped tokens need not be projected at all.
    """

    name = "diversity"
    needs_cls_attention = False
    scope = "image"
    adaptive = False

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """1 for the token taken first, falling by equal steps. A row is one image; padding comes last."""
        order = max_min_order(features.tokens, features.valid)
        count = order.shape[1]
        falling = torch.arange(count, 0, -1, device=order.device).float() / max(count, 1)
        return torch.empty(order.shape, device=order.device).scatter_(1, order, falling.expand(order.shape))
