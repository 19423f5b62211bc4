"""Gates: how logits become the mask of a training step, and how a gradient reaches the logits.

The paper's gate is the Gumbel-Softmax (Sec. 4.1.1), which decides about every token by itself; only the hinge
of Eq. (3) limits how many are kept. The others divide a budget among the tokens of the batch, so that exactly
``keep`` of them stay, and L_pr is constant. Their "soft top-k" is a sigmoid above one common threshold. The
budget may therefore change from step to step, which the hinge does not allow: nothing tells the selector at
which p it is judged.

A new gate is one function and one row of :data:`GATES`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.model.gumbel import DROP, KEEP, gumbel_mask
from tokensel.utils.errors import TokenselError

__all__ = ["GATES", "Gate", "make_gate", "soft_top_k", "threshold"]

Total = Callable[[Tensor], Tensor]
Gate = Callable[..., Tensor]

# halvings of the interval that holds a threshold: 60 leave nothing of it in single precision
_HALVINGS = 60


def _alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


def threshold(
    scores: Float[Tensor, "batch tokens"],
    keep: float,
    tau: float = 0.0,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = _alone,
) -> Float[Tensor, ""]:
    """The t at which ``sigmoid((scores - t) / tau)``, or ``scores > t`` where tau is 0, keeps ``keep``.

    Args:
        scores: of all tokens of the batch, or of this process's slice of it.
        keep: fraction of the valid tokens, in (0, 1).
        tau: temperature, 0 or above.
        valid: True where a token is real; ``None`` when all are.
        total: the sum of a value over all processes; by default there is one.

    Returns:
        A scalar without a gradient, found by bisection. A hard choice is rounded down to whole tokens.
    """
    scores = scores.detach().float()
    real = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    count = total(real.sum().float())
    # all processes start from the same interval: none of their scores lies outside it
    reach = total(scores.masked_fill(~real, 0).abs().max()) + 20 * tau + 1
    low, high = -reach, reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = ((scores - middle) / tau).sigmoid() if tau else (scores > middle).float()
        too_many = total((kept * real).sum()) > keep * count
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return high


class _Threshold(torch.autograd.Function):
    """A threshold that was found without a gradient, with its derivative by each score."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, t: Tensor, share: Tensor, total: Total) -> Tensor:
        ctx.save_for_backward(share)
        ctx.total = total
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # the losses of all processes depend on the one threshold, and through it on the scores of each
        (share,) = ctx.saved_tensors
        return ctx.total(gradients[0]) * share, None, None, None


def soft_top_k(
    scores: Float[Tensor, "batch tokens"],
    keep: float,
    tau: float,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = _alone,
) -> Float[Tensor, "batch tokens"]:
    """Weights in (0, 1) whose sum is ``keep`` of the valid tokens: a relaxed choice of the best of a batch.

    The threshold moves with the scores, so the gradient is that of a competition: what one token gains, the
    others lose. For tau towards 0 it is the hard choice.

    Source: soft top-k with an exact sum, as in DiffPrune; a threshold for the whole batch is ours, so that an
    image that needs more tokens gets more.

    Args:
        scores, keep, valid, total: see :func:`threshold`.
        tau: temperature, above 0.

    Returns:
        The weights; 0 on padding.
    """
    real = torch.ones_like(scores) if valid is None else valid.to(scores)
    t = threshold(scores, keep, tau, valid, total)
    alpha = ((scores.detach() - t) / tau).sigmoid()
    slope = alpha * (1 - alpha) * real
    # implicit differentiation of sum(alpha) = const: dt/dscore_i = slope_i / sum(slope)
    share = slope / total(slope.sum()).clamp(min=torch.finfo(slope.dtype).tiny)
    return ((scores - _Threshold.apply(scores, t, share, total)) / tau).sigmoid() * real


def gumbel_gate(
    logits: Float[Tensor, "batch tokens 2"],
    tau: float,
    noise: Float[Tensor, "batch tokens 2"] | None = None,
    keep: float | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = _alone,
) -> Float[Tensor, "batch tokens"]:
    """The paper's: each token by itself, 0 or 1; see :func:`~tokensel.model.gumbel.gumbel_mask`.

    ``keep`` and ``total`` are not used: the hinge of Eq. (3) limits the count.
    """
    mask = gumbel_mask(logits, tau, noise)
    return mask if valid is None else mask * valid


def top_k_gate(
    logits: Float[Tensor, "batch tokens 2"],
    tau: float,
    noise: Float[Tensor, "batch tokens 2"] | None = None,
    keep: float | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = _alone,
) -> Float[Tensor, "batch tokens"]:
    """0 or 1: the best ``keep`` of the batch under Gumbel noise; the gradient is that of the soft top-k."""
    scores = _scores(logits, noise)
    soft = soft_top_k(scores, _given(keep), tau, valid, total)
    hard = (scores > threshold(scores, _given(keep), 0.0, valid, total)).to(soft)
    if valid is not None:
        hard = hard * valid
    return hard + (soft - soft.detach())  # the value of hard, the gradient of soft


def soft_gate(
    logits: Float[Tensor, "batch tokens 2"],
    tau: float,
    noise: Float[Tensor, "batch tokens 2"] | None = None,
    keep: float | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = _alone,
) -> Float[Tensor, "batch tokens"]:
    """The soft top-k itself: between 0 and 1, so that a token may be passed on in part."""
    return soft_top_k(_scores(logits, noise), _given(keep), tau, valid, total)


def _scores(logits: Tensor, noise: Tensor | None) -> Tensor:
    """Keep logit minus drop logit, with the same difference of the noise."""
    noisy = logits if noise is None else logits + noise
    return noisy[..., KEEP] - noisy[..., DROP]


def _given(keep: float | None) -> float:
    if keep is None or not 0 < keep < 1:
        raise TokenselError(f"keep is {keep!r}: this gate divides a budget; give a fraction between 0 and 1")
    return keep


# "throttle" has the mask of "scale": what differs is what a token becomes, see MaskedEmbedding
GATES: dict[str, Gate] = {
    "gumbel": gumbel_gate,
    "topk": top_k_gate,
    "scale": soft_gate,
    "throttle": soft_gate,
}


def make_gate(name: str) -> Gate:
    """The gate called ``name``.

    Raises:
        TokenselError: an unknown name.
    """
    if name not in GATES:
        raise TokenselError(f"gate is '{name}': choose one of {', '.join(GATES)}")
    return GATES[name]
