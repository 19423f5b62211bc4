"""CLSE (arXiv 2606.24165): visual tokens whose fine detail changes most from one layer to the next.

A high-pass filter over the grid of an image leaves, at each token, what differs from its surroundings. How
much of that the first layer adds or takes away is the token's evolution; it gates the attention it draws.
"""

from dataclasses import dataclass
from typing import ClassVar, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.schedules.grids import grids
from tokensel.schedules.schedule import Mass
from tokensel.schedules.staged import Staged
from tokensel.schedules.view import View
from tokensel.utils.errors import TokenselError

__all__ = ["Clse", "evolution", "gate", "high_pass"]

EPSILON, MOST = 1e-6, 1.0
SHARES = (1.72, 1.09, 0.32)  # of the nominal number of tokens, by stage; those of the public code


def high_pass(
    cells: Float[Tensor, "height width channels"], radius: float = 0.1
) -> Float[Tensor, "height width"]:
    """What is left of each cell without the slow waves of its grid: magnitude, averaged over channels.

    Frequencies are damped by ``1 - exp(-D^2 / (2 (radius c)^2))``, where D is the distance to frequency 0 and
    c half of the shorter side, rounded down and at least 1.

    Args:
        cells: hidden states of the cells of one grid.
        radius: of the low frequencies that are damped, the paper's r.
    """
    height, width, _ = cells.shape
    # the filter takes the mean away; without it from the start, equal cells give 0 and no rounding of it
    cells = cells.float() - cells.float().mean((0, 1))
    wave = torch.fft.fftshift(torch.fft.fft2(cells, dim=(0, 1)), dim=(0, 1))
    v = torch.arange(height, device=cells.device) - height // 2
    u = torch.arange(width, device=cells.device) - width // 2
    far = (v[:, None] ** 2 + u[None, :] ** 2).float()
    spread = radius * max(1, min(height // 2, width // 2))
    damped = wave * (1 - torch.exp(-far / (2 * spread**2)))[:, :, None]
    return torch.fft.ifft2(torch.fft.ifftshift(damped, dim=(0, 1)), dim=(0, 1)).abs().mean(-1)


def evolution(
    before: Float[Tensor, "height width channels"],
    after: Float[Tensor, "height width channels"],
    radius: float = 0.1,
) -> Float[Tensor, "height width"]:
    """How much the high-pass magnitude of each cell changes from one layer to the next, in [0, 1]."""
    one, two = high_pass(before, radius), high_pass(after, radius)
    return ((two - one).abs() / (one + one.mean() + EPSILON)).clamp(0.0, MOST)


def gate(change: Float[Tensor, "height width"], tau: float = 0.1) -> Float[Tensor, "height width"]:
    """The sigmoid of the standardised evolution over ``tau``: near 1 for what changes more than the mean."""
    std = change.std(correction=0)
    return torch.sigmoid((change - change.mean()) / (std + EPSILON) / tau)


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class Clse(Staged):
    """Three cuts: the first by evolution times attention, the others by attention; caches are cut as well.

    The attention is that of the prompt's last token in the layer before the cut, averaged over heads. The
    evolution compares what enters that layer with what leaves it.

    ``keep`` is the method's own label, the nominal fraction of the visual cells: the stages keep 1.72, 1.09
    and 0.32 of it, at most all. In a model of 32 layers that would average to the label if the stages began
    at layers 0, 10, 20; as published they begin at 1, 11, 21 and hold more ("192" tokens are 208 a layer).

    What we chose, as the public code knows one square grid alone: each thumbnail and each map without its
    letterbox has its own filter, mean and standard deviation; all compete for the budget; newlines are left
    out of the filter and follow ``newline``.

    The evolution is relative to the detail that was there before. On the drawn pages of the book's small
    model it falls with the contrast of a cell, so that print goes first: there ``lowest`` is ahead of a
    random choice, and the method is behind it.

    Attributes:
        radius: of the high-pass filter.
        tau: temperature of the gate.
        lowest: keep what changes least, a control that should fail ("inertia" in the paper).

    Raises:
        TokenselError: as :class:`~tokensel.schedules.staged.Staged`; not three cuts; ``radius`` or ``tau``
            not above 0.
    """

    cuts: tuple[int, ...] = (1, 11, 21)
    radius: float = 0.1
    tau: float = 0.1
    lowest: bool = False
    name: ClassVar[str] = "clse"
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cuts) != len(SHARES):
            raise TokenselError(f"cuts is {self.cuts!r}: give three layers, such as (1, 11, 21)")
        for option in ("radius", "tau"):
            value = getattr(self, option)
            if not isinstance(value, int | float) or not value > 0:
                raise TokenselError(f"{option} is {value!r}: give a number above 0, such as 0.1")

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """The stage's share of ``keep``, at most 1; decode steps drop nothing more."""
        stage = self.stage(layer)
        if step > 0 or stage == 0 or self.keep == 1.0:
            return 1.0
        return min(1.0, SHARES[stage - 1] * self.keep)

    def rank(self, view: View) -> Float[Tensor, "rows left"]:
        """Gate times attention at the first cut, attention at the others.

        Raises:
            TokenselError: cells of an image are missing at the first cut.
        """
        scores = view.last()
        if view.layer != self.cuts[0]:
            return scores
        gates = torch.zeros_like(scores)
        for row, of_row in enumerate(grids(self.name, view.columns)):
            for columns in of_row:
                place = columns.to(view.hidden.device)
                change = evolution(view.before[row, place], view.hidden[row, place], self.radius)
                gates[row, place] = gate(-change if self.lowest else change, self.tau).to(gates.device)
        return gates * scores
