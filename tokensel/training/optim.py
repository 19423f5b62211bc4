"""One step of a training: temperature, learning rate, averages over all processes, AdamW."""

import math
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokensel.training.config import TrainConfig
from tokensel.training.processes import Processes
from tokensel.utils.seeds import derived_seed, generator

T = TypeVar("T")


@runtime_checkable
class OptimConfig(Protocol):
    """What the optimisation of a training depends on: these fields of its configuration."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


@runtime_checkable
class TemperatureConfig(Protocol):
    """What the temperature of a step depends on."""

    @property
    def steps(self) -> int: ...
    @property
    def tau_start(self) -> float: ...
    @property
    def tau_end(self) -> float: ...


def seeded(make: Callable[[], T], seed: int) -> T:
    """What ``make`` returns if all its random draws come from ``seed``; the global generator is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "init"))
        return make()


def temperature(step: int, config: TemperatureConfig) -> float:
    """tau of the Gumbel-Softmax: falls geometrically from ``tau_start`` to ``tau_end``."""
    return config.tau_start * (config.tau_end / config.tau_start) ** (step / max(1, config.steps - 1))


def drawn_budget(step: int, seed: int, least: float, most: float | None) -> float:
    """The fraction of tokens to keep at a step: ``least``, or drawn between it and ``most``."""
    if most is None:
        return least
    share = torch.rand((), generator=generator(seed, "budget", step)).item()
    return least + (most - least) * share


def learning_rate(step: int, config: OptimConfig) -> float:
    """Rises linearly over the warm-up, then falls to zero along half a cosine."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int, config: OptimConfig
) -> None:
    """One step with clipped gradients at the learning rate of ``step``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()


def use_bf16(device: torch.device, config: TrainConfig) -> bool:
    """Whether to compute in bfloat16: as configured, or on GPUs that support it."""
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bf16"


def mean_over_processes(
    processes: Processes, valid: Bool[Tensor, "batch tokens"] | None
) -> Callable[[Tensor], Tensor]:
    """A mean over the images of all processes' slices that have any valid token.

    Its value is the same on every process; its gradient is that of this process's images, scaled so that
    the average over processes, which DistributedDataParallel takes, is the gradient of the whole batch.
    """

    def mean(values: Tensor) -> Tensor:
        readable = torch.ones_like(values) if valid is None else valid.any(dim=1).to(values)
        local_sum = (values * readable).sum()
        total, images = processes.sum(torch.stack([local_sum.detach(), readable.sum()]))
        local = local_sum * processes.count / images.clamp(min=1)
        # the value of the whole batch's mean, the gradient of the local part
        return local + (total / images.clamp(min=1) - local).detach()

    return mean
