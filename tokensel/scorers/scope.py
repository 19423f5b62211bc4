"""SCOPE (Deng et al. 2025, arXiv 2510.24214): salient tokens that cover what is not covered yet."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.data.features import Features
from tokensel.utils.errors import TokenselError

__all__ = ["ScopeScorer", "coverage_order"]


def coverage_order(
    tokens: Float[Tensor, "rows tokens channels"],
    saliency: Float[Tensor, "rows tokens"],
    valid: Bool[Tensor, "rows tokens"] | None = None,
) -> Int[Tensor, "rows tokens"]:
    """Greedy order by what a token adds to the coverage of its row, times its saliency; invalid come last.

    A set covers a token by its largest cosine with one of the set, at least 0; the coverage of the row is the
    sum over its tokens. A prefix of the order is the greedy choice at that size. Of equals the earlier token
    wins, and where no token adds anything, the more salient one.

    Cost: one ``[rows, tokens, tokens]`` matrix, read once for each token: cubic in the tokens of an image,
    and not free compared with the prefill that it saves.

    Args:
        tokens: features; of any length.
        saliency: not negative.
        valid: True where a token is real.
    """
    rows, count, _ = tokens.shape
    real = torch.ones(rows, count, dtype=torch.bool, device=tokens.device) if valid is None else valid
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1) * real[..., None]  # padding covers nothing
    alike = (unit @ unit.transpose(1, 2)).clamp(min=0)  # [rows, by, of]
    covered = torch.zeros(rows, count, device=tokens.device)
    order = torch.empty(rows, count, dtype=torch.long, device=tokens.device)
    waiting = torch.zeros_like(covered).masked_fill(~real, -2.0)
    index = torch.arange(rows, device=tokens.device)
    # below every gain of a salient token, so that it decides among those that add nothing
    least = saliency / saliency.amax(1, keepdim=True).clamp(min=1e-30) - 1 if count else saliency
    for step in range(count):
        gain = (alike - covered[:, None]).clamp(min=0).sum(2)
        gain = gain.where(gain > 1e-6 * count, 0.0)  # rounding is no gain
        worth = torch.where((gain > 0) & (saliency > 0), gain * saliency, least)
        worth = torch.where(waiting < 0, waiting, worth)
        best = (worth == worth.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
        order[:, step] = best
        covered = torch.maximum(covered, alike[index, best])
        waiting[index, best] = -3.0
    return order


class ScopeScorer:
    """Scores by :func:`coverage_order` over all visual tokens of an image (thumbnail and tiles together).

    Saliency is the CLS token's attention, as in the paper. What we chose: the abstract leaves open how
    saliency enters the gain; here it is a factor, to a power. Similarity is between the encoder's features,
    before the projector, and a negative cosine covers nothing.
    """

    name = "scope"
    needs_cls_attention = True
    scope = "image"
    adaptive = False

    def __init__(self, saliency: float = 1.0):
        """
        Args:
            saliency: the power of the saliency, at least 0; 0 for coverage alone.

        Raises:
            TokenselError: ``saliency`` is no number of at least 0.
        """
        if isinstance(saliency, bool) or not isinstance(saliency, int | float) or not 0 <= saliency < 100:
            raise TokenselError(f"saliency is {saliency!r}: give a number from 0 to 100, such as 1.0")
        self.saliency = float(saliency)

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """1 for the token taken first, falling by equal steps. A row is one image; padding comes last.

        Raises:
            TokenselError: the features carry no CLS attention.
        """
        attention = features.cls_attention
        if attention is None:
            raise TokenselError(
                "scorer 'scope' has no CLS attention to read: ask the encoder for it, or choose another "
                "scorer where the encoder has no CLS token"
            )
        attention = attention.float()
        if features.valid is not None:
            attention = attention.masked_fill(~features.valid, 0.0)
        most = attention.amax(1, keepdim=True).clamp(min=1e-30) if attention.shape[1] else 1.0
        order = coverage_order(features.tokens, (attention / most) ** self.saliency, features.valid)
        count = order.shape[1]
        falling = torch.arange(count, 0, -1, device=order.device).float() / max(count, 1)
        return torch.empty(order.shape, device=order.device).scatter_(1, order, falling.expand(order.shape))
