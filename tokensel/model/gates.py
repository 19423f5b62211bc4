"""Gates: how logits become the mask of a training step, and how a gradient reaches the logits.

The paper's gate is the Gumbel-Softmax (Sec. 4.1.1), which decides about every token by itself; only the hinge
of Eq. (3) limits how many are kept. The others divide a budget among the tokens of the batch, so that exactly
``keep`` of them stay, and L_pr is constant. Their "soft top-k" is a sigmoid above one common threshold. The
budget may therefore change from step to step, which the hinge does not allow: nothing tells the selector at
which p it is judged.

A new gate is one function and one row of :data:`BUDGETED`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.model.gumbel import DROP, KEEP, gumbel_mask
from tokensel.utils.errors import TokenselError

__all__ = ["BUDGETED", "GATES", "alone", "gate_mask", "hard_top_k", "mix_noise", "soft_top_k", "threshold"]

Total = Callable[[Tensor], Tensor]

# halvings of the interval that holds a threshold: 60 leave nothing of it in single precision
_HALVINGS = 60


def alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


def threshold(
    scores: Float[Tensor, "batch tokens"],
    keep: float,
    tau: float = 0.0,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = alone,
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
    most = keep * total(real.sum().float())
    if not tau:
        most = most * (1 + 1e-6)  # whole tokens: 13/22 of 22 are 13, which single precision may miss
    # all processes start from the same interval: none of their scores lies outside it
    reach = total(scores.masked_fill(~real, 0).abs().max()) + 20 * tau + 1
    low, high = -reach, reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = ((scores - middle) / tau).sigmoid() if tau else (scores > middle).float()
        too_many = total((kept * real).sum()) > most
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
    total: Total = alone,
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


def hard_top_k(
    scores: Float[Tensor, "batch tokens"],
    keep: float,
    tau: float,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = alone,
) -> Float[Tensor, "batch tokens"]:
    """0 or 1: the best ``keep`` of the batch; the gradient is that of :func:`soft_top_k`."""
    soft = soft_top_k(scores, keep, tau, valid, total)
    hard = (scores > threshold(scores, keep, 0.0, valid, total)).to(soft)
    if valid is not None:
        hard = hard * valid
    return hard + (soft - soft.detach())  # the value of hard, the gradient of soft


def mix_noise(
    centred: Float[Tensor, "batch tokens channels"],
    std: Float[Tensor, "channels"],
    mask: Float[Tensor, "batch tokens"],
    noise: Float[Tensor, "batch tokens channels"],
) -> Float[Tensor, "batch tokens channels"]:
    """DiffPrune's information throttler: ``sqrt(m) x + sqrt(1 - m) noise``, x in units of ``std``.

    The variance stays the same while the information falls.

    Args:
        centred: tokens less their mean.
        std: standard deviation of each channel.
        mask: between 0 and 1.
        noise: samples of N(0, 1).
    """
    m = mask[..., None].clamp(1e-6, 1 - 1e-6)  # the root has no finite slope at 0
    return m.sqrt() * centred / std.clamp(min=1e-12) + (1 - m).sqrt() * noise


# "throttle" has the mask of "scale": what differs is what a token becomes, see MaskedEmbedding
BUDGETED: dict[str, Callable[..., Tensor]] = {
    "topk": hard_top_k,
    "scale": soft_top_k,
    "throttle": soft_top_k,
}
GATES = ("gumbel", *BUDGETED)


def gate_mask(
    gate: str,
    logits: Float[Tensor, "batch tokens 2"],
    tau: float,
    noise: Float[Tensor, "batch tokens 2"] | None = None,
    keep: float | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    total: Total = alone,
) -> Float[Tensor, "batch tokens"]:
    """The mask of a batch under the gate called ``gate``; 0 on padding.

    Args:
        gate: one of :data:`GATES`.
        logits: drop and keep logit of each token.
        tau: temperature, above 0.
        noise: Gumbel(0, 1) samples; ``None`` for none.
        keep: the fraction of the batch's tokens that a gate other than "gumbel" keeps, in (0, 1).
        valid: True where a token is real; ``None`` when all are.
        total: the sum of a value over all processes; by default there is one.

    Raises:
        TokenselError: an unknown gate, or one that divides a budget without a budget.
    """
    if gate not in GATES:
        raise TokenselError(f"gate is '{gate}': choose one of {', '.join(GATES)}")
    if gate == "gumbel":
        mask = gumbel_mask(logits, tau, noise)
        return mask if valid is None else mask * valid
    if keep is None or not 0 < keep < 1:
        raise TokenselError(f"keep is {keep!r}: this gate divides a budget; give a fraction between 0 and 1")
    noisy = logits if noise is None else logits + noise
    return BUDGETED[gate](noisy[..., KEEP] - noisy[..., DROP], keep, tau, valid, total)
