"""Options of the schedules that shorten the prompt at several layers, and where these layers are."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, no_type_check

from tokensel.schedules.schedule import check_fraction, check_layer, check_newline
from tokensel.utils.errors import TokenselError

__all__ = ["PUBLISHED_DEPTH", "Staged", "scaled_cuts"]

PUBLISHED_DEPTH = 32  # layers of the Vicuna-7B that the default cuts of these schedules are published for


def scaled_cuts(cuts: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Cuts that are published for 32 layers, moved to the same relative depth of a model of ``depth`` layers.

    The first is at least 1, and every further one at least a layer after the one before.
    """
    moved: list[int] = []
    for cut in cuts:
        moved.append(max(round(cut * depth / PUBLISHED_DEPTH), moved[-1] + 1 if moved else 1))
    return tuple(moved)


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class Staged:
    """Options of a schedule that drops visual tokens in the prefill, in stages.

    Attributes:
        keep: what the schedule makes of it is its own; 1 keeps everything.
        cuts: layers at whose entrance tokens are dropped, counted from 0, rising.
        newline: "keep", "drop" or "row", see :class:`~tokensel.schedules.Schedule`.

    Raises:
        TokenselError: ``keep`` is not a fraction in [0, 1], ``cuts`` are no rising layers from 1 on, or
            ``newline`` is unknown.
    """

    keep: float = 0.5
    cuts: tuple[int, ...] = (8, 16, 24)
    newline: str = "keep"
    uses_keep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # a frozen dataclass takes assignments only this way
        object.__setattr__(self, "keep", check_fraction(self.keep))
        object.__setattr__(self, "cuts", check_cuts(self.cuts))
        check_newline(self.newline)

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return () if self.keep == 1.0 else self.cuts

    def stage(self, layer: int) -> int:
        """How many cuts lie before or at the entrance of ``layer``."""
        return sum(cut <= layer for cut in self.cuts)


def check_cuts(cuts: Any) -> tuple[int, ...]:
    """Return ``cuts`` as a tuple of whole numbers; a list is accepted.

    Raises:
        TokenselError: there are none, one is no layer from 1 on, or they do not rise.
    """
    if not isinstance(cuts, tuple | list) or not cuts:
        raise TokenselError(f"cuts is {cuts!r}: give the layers to drop tokens at, such as (8, 16, 24)")
    layers = tuple(check_layer(cut, "ranking needs the attention of one layer") for cut in cuts)
    if any(one >= two for one, two in pairwise(layers)):
        raise TokenselError(f"cuts is {cuts!r}: give rising layers, such as (8, 16, 24)")
    return layers
