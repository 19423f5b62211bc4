"""One step of a training: temperature, learning rate, averages over all processes, AdamW."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokensel.training.config import TrainConfig
from tokensel.utils.errors import TokenselError, needs
from tokensel.utils.seeds import derived_seed

with needs("train"):
    from accelerate import Accelerator

Made = TypeVar("Made")


@runtime_checkable
class Descent(Protocol):
    """What the course of a training depends on: the fields of that name in its configuration."""

    steps: int
    lr: float
    warmup: float
    weight_decay: float
    tau_start: float
    tau_end: float


def seeded(make: Callable[[], Made], seed: int) -> Made:
    """What ``make`` returns when all it draws comes from ``seed``; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "init"))
        return make()


def temperature(step: int, config: Descent) -> float:
    """tau of the Gumbel-Softmax: falls geometrically from ``tau_start`` to ``tau_end``."""
    return config.tau_start * (config.tau_end / config.tau_start) ** (step / max(1, config.steps - 1))


def learning_rate(step: int, config: Descent) -> float:
    """Rises linearly over the warm-up, then falls to zero along half a cosine."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def adamw(model: nn.Module, config: Descent) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def descend(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    step: int,
    config: TrainConfig,
) -> None:
    """One clipped AdamW step at the learning rate of ``step``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.zero_grad()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()


def autocast(accelerator: Accelerator, config: TrainConfig) -> AbstractContextManager:
    """bfloat16 where the configuration and the hardware want it."""
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=use_bf16(accelerator, config))


def use_bf16(accelerator: Accelerator, config: TrainConfig) -> bool:
    if config.precision == "auto":
        return accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bf16"


def slice_of(batch_size: int, process: int, processes: int) -> slice:
    """The part of each batch that one process computes.

    Raises:
        TokenselError: the batch does not divide among the processes.
    """
    if batch_size % processes:
        raise TokenselError(f"batch_size is {batch_size}: give a multiple of the {processes} processes")
    size = batch_size // processes
    return slice(process * size, (process + 1) * size)


def mean_over_processes(
    accelerator: Accelerator, valid: Bool[Tensor, "batch tokens"] | None
) -> Callable[[Tensor], Tensor]:
    """A mean over the images of all processes' slices that have any valid token.

    Its value is the same on every process; its gradient is that of this process's images, scaled so that
    the average over processes, which accelerate takes, is the gradient of the whole batch.
    """

    def mean(values: Tensor) -> Tensor:
        real = torch.ones_like(values) if valid is None else valid.any(dim=1).to(values)
        here = (values * real).sum()
        total, images = accelerator.reduce(torch.stack([here.detach(), real.sum()]), reduction="sum")
        local = here * accelerator.num_processes / images.clamp(min=1)
        return local + (total / images.clamp(min=1) - local).detach()

    return mean
