"""An evaluation split over processes and machines that need not communicate."""

import os
import re
from dataclasses import dataclass

from tokensel.utils.errors import TokenselError

__all__ = ["WHOLE", "Shard", "is_first_here", "local_device"]


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` equal parts, counted from 0.

    A shard is every ``count``-th batch. Batches are cut in the same way for any number of shards, so that the
    same questions are padded together and the answers do not depend on it.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, text: str) -> "Shard":
        """The shard ``i/n`` (counted from 1), split further over the processes of accelerate or torchrun.

        Raises:
            TokenselError: not of this form, or ``i`` not among 1 to ``n``.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise TokenselError(f"shard is {text!r}: give which part of how many, such as 1/4 to 4/4")
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return cls((int(match[1]) - 1) * world + rank, int(match[2]) * world)

    @property
    def name(self) -> str:
        """The part of a file name that stands for this shard; empty where the evaluation is not split."""
        return f".{self.index + 1}-of-{self.count}" if self.count > 1 else ""

    def holds(self, batch: int) -> bool:
        """Whether batch number ``batch`` belongs to this shard."""
        return batch % self.count == self.index


WHOLE = Shard()
"""The only shard of an evaluation that is not split."""


def local_device(device: str) -> str | None:
    """The device to load the model on; ``None`` leaves the choice to :func:`~tokensel.vlm.load.load_vlm`.

    ``auto`` means the GPU with this process's local rank where several processes share a machine.
    """
    if device != "auto":
        return device
    import torch  # here, so that options are checked before the heavy import

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and torch.cuda.is_available() else None


def is_first_here() -> bool:
    """Whether this is the first or only process on its machine: the one that shows progress."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
