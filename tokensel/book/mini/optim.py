"""Optimisers of the small model's training, and gradients shared by several workers."""

from collections.abc import Sequence

import torch
from torch import distributed, nn


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers; a single worker keeps its own."""
    if not distributed.is_initialized():
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def muon_and_adamw(
    modules: list[nn.Module], rate: float, rest_rate: float, decay: float, extra: Sequence[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the transformer layers of ``modules``, AdamW on everything else in them."""
    matrices, rest = [], list(extra)
    for name, parameter in ((n, p) for module in modules for n, p in module.named_parameters()):
        (matrices if parameter.ndim == 2 and "layers." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, rest_rate, betas=(0.9, 0.98), weight_decay=decay),
    ]
