"""A sweep split over processes and machines, none of which needs to talk to another."""

import os
import re
from dataclasses import dataclass

from tokensel.utils.errors import TokenselError


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` equal parts, counted from 0.

    A part is every ``count``-th batch. Batches are cut alike whatever the number of parts, so that the same questions are
    padded together and the answers do not depend on it.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, text: str) -> "Shard":
        """The part named ``i/n`` (counted from 1), itself split over the processes of ``accelerate launch`` or ``torchrun``.

        Raises:
            TokenselError: not of this form, or ``i`` not among 1 to ``n``.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise TokenselError(f"shard is {text!r}: give which part of how many, such as 1/4 to 4/4")
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return cls((int(found[1]) - 1) * world + rank, int(found[2]) * world)

    @property
    def name(self) -> str:
        """What files of this part are called; nothing for a sweep that is not split."""
        return f".{self.index + 1}-of-{self.count}" if self.count > 1 else ""

    def holds(self, batch: int) -> bool:
        """Whether batch number ``batch`` belongs to this part."""
        return batch % self.count == self.index


def local_device(device: str) -> str | None:
    """``auto`` as the GPU of this process, if several share the machine, or as ``None`` for whichever there is."""
    if device != "auto":
        return device
    import torch  # here, so that options are checked before the heavy import

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and torch.cuda.is_available() else None


def is_first_here() -> bool:
    """Whether this is the first or only process on its machine: the one that speaks."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
