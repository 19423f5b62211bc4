"""The processes of one training: the device that each of them uses, and what they exchange.

PyTorch's own distributed functions, and not accelerate's ``Accelerator``: that one fixes the device for the
whole Python process when it is first made, so that one training would decide where the next one runs.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, accelerator, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tokensel.utils.errors import TokenselError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; alone by default.

    Attributes:
        device: where this process computes.
        rank: its number, from 0; process 0 writes the files.
        count: how many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def local_rows(self, batch_size: int) -> slice:
        """The part of each batch that this process computes.

        Raises:
            TokenselError: the batch does not divide among the processes.
        """
        if batch_size % self.count:
            raise TokenselError(f"batch_size is {batch_size}: give a multiple of the {self.count} processes")
        size = batch_size // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model``, on ``device``, so that its gradients are averaged over the processes."""
        if self.count == 1:
            return model
        index = None if self.device.type == "cpu" else [self.device]
        return DistributedDataParallel(model, device_ids=index)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, on each of them."""
        if self.count > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on each of them; it also waits until all have come this far."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def autocast(self, bf16: bool) -> AbstractContextManager:
        """bfloat16 for the operations that tolerate it, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def launched_processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    Nothing of it lasts beyond the ``with`` block; a process group that the caller has made is used and kept.

    Args:
        device: ``"auto"`` for this process's GPU where there is one, ``"cpu"``.

    Raises:
        TokenselError: more processes than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = _device(device, local_rank if count > 1 else None)
    if count == 1:
        yield Processes(where)
        return
    owned = not distributed.is_initialized()
    if owned:
        distributed.init_process_group()
    try:
        yield Processes(where, distributed.get_rank(), distributed.get_world_size())
    finally:
        if owned:
            distributed.destroy_process_group()


def _device(option: str, local_rank: int | None) -> torch.device:
    gpu = accelerator.current_accelerator(check_available=True)
    if option == "cpu" or gpu is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    index = accelerator.current_device_index() if local_rank is None else local_rank
    if index >= accelerator.device_count():
        raise TokenselError(
            f"process {index} has no {gpu.type} device of its own: start at most "
            f"{accelerator.device_count()} processes"
        )
    return torch.device(gpu.type, index)
