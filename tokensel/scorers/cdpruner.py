"""CDPruner (Zhang et al. 2025, arXiv 2506.10967): tokens that are diverse and fit the question, by a DPP."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.data.features import Features
from tokensel.utils.errors import TokenselError

__all__ = ["CdprunerScorer", "greedy_order"]

EPSILON = 1e-6


def greedy_order(
    tokens: Float[Tensor, "rows tokens channels"],
    relevance: Float[Tensor, "rows tokens"],
    valid: Bool[Tensor, "rows tokens"] | None = None,
) -> Int[Tensor, "rows tokens"]:
    """Greedy order of the conditional determinantal point process; invalid tokens come last.

    Each next token adds most to the determinant of the kernel ``r_i r_j cos(i, j)`` of those taken. A prefix
    is the greedy choice at that size. Where no token adds anything, because those taken span all, the most
    relevant one follows.

    The kernel is never built: a step takes one row of it (Chen, Zhang, Zhou 2018, arXiv 1709.05135). As no
    more tokens than channels are independent, the work is at most ``tokens * channels**2`` a row.
    """
    rows, count, channels = tokens.shape
    real = torch.ones(rows, count, dtype=torch.bool, device=tokens.device) if valid is None else valid
    # the kernel is the Gram matrix of these vectors
    vectors = torch.nn.functional.normalize(tokens.float(), dim=-1) * relevance[..., None]
    gain = vectors.square().sum(-1)  # what a token adds to the determinant, given those taken
    least = EPSILON * gain.amax(1, keepdim=True) if count else gain
    steps = min(count, channels)
    factors = torch.zeros(rows, steps, count, device=tokens.device)  # rows of the Cholesky factor
    order = torch.empty(rows, count, dtype=torch.long, device=tokens.device)
    taken = torch.zeros_like(real)
    for step in range(steps):
        # a gain above rounding comes before all relevance, which is in [0, 1]
        worth = torch.where(gain > least, gain / least.clamp(min=1e-30) + 1, relevance)
        worth = worth.masked_fill(~real, -1.0).masked_fill(taken, -2.0)
        best = (worth == worth.amax(1, keepdim=True)).to(torch.uint8).argmax(1)[:, None]
        order[:, step : step + 1] = best
        index = best[:, :, None]
        row = vectors.gather(1, index.expand(-1, -1, channels)) @ vectors.transpose(1, 2)  # [rows, 1, tokens]
        before = factors[:, :step]
        known = before.gather(2, index.expand(-1, step, -1))  # [rows, taken, 1]
        own = gain.gather(1, best)
        factor = (row[:, 0] - (known * before).sum(1)) / own.clamp(min=1e-30).sqrt()
        factor = torch.where(own > least, factor, 0.0)
        factors[:, step] = factor
        gain = gain - factor.square()
        taken = taken.scatter(1, best, True)
    # of the others the most relevant first; those taken come last here and are cut off
    later = relevance.masked_fill(~real, -1.0).scatter(1, order[:, :steps], -2.0)
    order[:, steps:] = later.argsort(dim=1, descending=True, stable=True)[:, : count - steps]
    return order


class CdprunerScorer:
    """Scores by :func:`greedy_order` over all visual tokens of an image, given its question.

    What we chose: the paper measures relevance with CLIP's text encoder, which a LLaVA does not carry. Here
    it is the cosine of the projected token with the question's word embeddings, averaged over words (see
    ``Encoded.relevance``), and scaled to [0, 1] over the image. All visual tokens are projected for that.
    """

    name = "cdpruner"
    needs_cls_attention = False
    needs_question = True
    scope = "image"
    adaptive = False

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """1 for the token taken first, falling by equal steps. A row is one image; padding comes last.

        Raises:
            TokenselError: the features carry no relevance.
        """
        if features.relevance is None:
            raise TokenselError(
                "scorer 'cdpruner' needs Features.relevance: score an encoded batch, which has a question"
            )
        relevance, valid = features.relevance.float(), features.valid
        high = relevance if valid is None else relevance.masked_fill(~valid, -torch.inf)
        low = relevance if valid is None else relevance.masked_fill(~valid, torch.inf)
        least, most = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        scaled = ((relevance - least + EPSILON) / (most - least + EPSILON)).clamp(0.0, 1.0)
        order = greedy_order(features.tokens, scaled, valid)
        count = order.shape[1]
        falling = torch.arange(count, 0, -1, device=order.device).float() / max(count, 1)
        return torch.empty(order.shape, device=order.device).scatter_(1, order, falling.expand(order.shape))
