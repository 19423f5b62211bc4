"""FEATHER (Endo et al. 2024, arXiv 2412.13180): FastV without its bias to the bottom of the image.

Rotary positions let a query prefer near keys, so that FastV keeps what stands last in the prompt: the lower
rows of an image. Ranked by attention without rotation, and with some tokens of a uniform grid, what stays
covers the image.
"""

from dataclasses import dataclass
from typing import ClassVar, no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.schedules.grids import grids
from tokensel.schedules.prompt import Prompt
from tokensel.schedules.schedule import Mass
from tokensel.schedules.staged import Staged
from tokensel.schedules.view import View
from tokensel.utils.errors import check_count

__all__ = ["Feather", "grid_cells"]


def grid_cells(name: str, prompt: Prompt, stride: int) -> Bool[Tensor, "rows length"]:
    """The cells in every ``stride``-th row and column of each grid, from its first corner on.

    Raises:
        TokenselError: cells of an image are missing, see :func:`~tokensel.schedules.grids.grids`.
    """
    marks = torch.zeros_like(prompt.visual)
    for row, of_row in enumerate(grids(name, prompt)):
        for columns in of_row:
            marks[row, columns[::stride, ::stride].flatten()] = True
    return marks


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class Feather(Staged):
    """Two cuts by the last token's attention without rotation; a uniform grid survives the first.

    The paper cuts before layers 8 and 16 of 32 and adds a grid of stride 3 to the first cut. It leaves open
    how the two budgets relate. Here the first cut keeps the fraction ``keep`` of the visual cells, the grid
    among them and first; the second keeps ``keep ** 2``, by attention alone. Keys without rotation are
    computed again at these two layers. The caches of earlier layers keep their tokens.

    Attributes:
        stride: of the grid, in rows and columns.

    Raises:
        TokenselError: as :class:`~tokensel.schedules.staged.Staged`, or ``stride`` is below 1.
    """

    cuts: tuple[int, ...] = (8, 16)
    stride: int = 3
    name: ClassVar[str] = "feather"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stride", check_count("stride", self.stride, 3))

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """The fraction ``keep ** stage``, of all visual cells; decode steps drop nothing more."""
        return self.keep ** self.stage(layer) if step == 0 else 1.0

    def rank(self, view: View) -> Float[Tensor, "rows left"]:
        """Attention without rotation; cells of the grid come before all others at the first cut.

        Raises:
            TokenselError: cells of an image are missing at the first cut.
        """
        scores = view.last(rotate=False).cpu()
        if view.layer == self.cuts[0]:
            grid = grid_cells(self.name, view.columns, self.stride)
            scores = scores + grid.float()  # attention is at most 1
        return scores
