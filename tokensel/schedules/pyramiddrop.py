"""PyramidDrop (Xing et al. 2024, arXiv 2410.17247): the same share of what is left is dropped in stages."""

from dataclasses import dataclass
from typing import ClassVar, no_type_check

from tokensel.schedules.schedule import Mass
from tokensel.schedules.staged import Staged

__all__ = ["PyramidDrop"]


@no_type_check  # the base class checks the options, with one line for the user
@dataclass(frozen=True)
class PyramidDrop(Staged):
    """Every stage keeps the fraction ``keep`` of the visual cells that the stage before it kept.

    Four stages of equal depth and ``keep=0.5`` are the paper's: all, a half, a quarter, an eighth of the
    tokens. They are ranked by the attention of the prompt's last token. The paper computes it between two
    stages for this purpose; here it is that of the layer before the cut, as in FastV. The caches of earlier
    layers keep their tokens.
    """

    name: ClassVar[str] = "pyramiddrop"

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """The fraction ``keep ** stage``, of all visual cells; decode steps drop nothing more."""
        return self.keep ** self.stage(layer) if step == 0 else 1.0
