"""The Gumbel-Softmax head of Sec. 4.1.1: a discrete choice per token with a gradient (Jang et al. 2017)."""

import torch
from jaxtyping import Float
from torch import Tensor

DROP, KEEP = 0, 1  # the two logits of a token


def gumbel_mask(
    logits: Float[Tensor, "batch tokens 2"],
    tau: float = 1.0,
    noise: Float[Tensor, "batch tokens 2"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """Straight-through two-way Gumbel-Softmax (Jang et al. 2017): 0 or 1 forward, relaxed backward.

    Two logits a token, because a softmax over a single one is always 1.

    Args:
        logits: drop and keep logit of each token.
        tau: temperature, above 0; the lower, the steeper the relaxed choice.
        noise: Gumbel(0, 1) samples; without them the larger logit decides.
    """
    noisy = logits if noise is None else logits + noise
    soft = (noisy / tau).softmax(dim=-1)[..., KEEP]
    hard = (noisy[..., KEEP] > noisy[..., DROP]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the value of hard, the gradient of soft


def gumbel_noise(*shape: int, generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
    """Samples of Gumbel(0, 1), drawn on the CPU so that they are the same for every device."""
    uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
    # -log(-log(u)) of a uniform u; 0 is replaced, as its logarithm is infinite
    tiny = torch.finfo(torch.float64).tiny
    return -(-(uniform.clamp(min=tiny).log())).clamp(min=tiny).log().float()
