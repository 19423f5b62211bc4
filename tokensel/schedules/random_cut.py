"""A late random cut: from one layer on, visual tokens that are chosen at random.

A control. Where the layers have already taken up what an image holds, a random choice is as good as any
("information horizon", arXiv 2512.07580), so that a method has to beat this one at the same layer.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.schedules.schedule import Mass, Ranked
from tokensel.schedules.view import View
from tokensel.utils.errors import TokenselError
from tokensel.utils.hashing import uniform

__all__ = ["RandomCut"]


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class RandomCut(Ranked):
    """The first ``layer`` layers see all visual tokens, the others a random fraction ``keep`` of the cells.

    What is drawn depends on the seed and on the number of the cell in its prompt, so that a row is cut alike
    in every batch, and two images of the same size alike.

    Attributes:
        seed: any whole number; another seed gives another choice.

    Raises:
        TokenselError: as :class:`~tokensel.schedules.schedule.Ranked`, or the seed is no whole number.
    """

    layer: int = 16
    seed: int = 0
    name: ClassVar[str] = "random-cut"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            operator.index(self.seed)
        except TypeError:
            raise TokenselError(f"seed is {self.seed!r}: give a whole number, such as 0") from None

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """Fraction of the prompt's visual cells that enters ``layer``, the same at every step."""
        return 1.0 if layer < self.layer else self.keep

    def rank(self, view: View) -> Float[Tensor, "rows left"]:
        """Uniform numbers in [0, 1), a number for each cell."""
        number = (view.prompt.cells.cumsum(1) - 1).gather(1, view.order)  # of a cell in its prompt
        return uniform(torch.full_like(number, self.seed), number)
