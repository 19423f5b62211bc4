"""What a schedule is, and the options that several schedules share."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Protocol, no_type_check, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokensel.utils.errors import TokenselError

__all__ = ["Mass", "Ranked", "Schedule", "check_fraction", "check_layer", "check_newline"]

NEWLINES = ("keep", "drop", "row")

Mass = Callable[[], Float[Tensor, "rows heads types"]]
"""Returns how the newest token's attention in the layer before is shared among the types of tokens.

It is computed when it is called, so a schedule that does not need it costs nothing.
"""


@runtime_checkable
class Schedule(Protocol):
    """Which visual tokens stay, by layer and by generation step.

    Attributes:
        name: its row in the table of schedules.
        uses_keep: whether it takes the fraction to keep as an option.
        newline: what becomes of an image's newlines where some of its cells are dropped: "keep" all, "drop"
            all, or "row": keep the newline of a row in which a cell stays.

    A schedule may also have what these are for:

    - ``rank(view)``: scores of the columns that are left, ``[rows, left]``, higher = keep first, in place of
      the newest token's attention. It is called in the prefill, with a
      :class:`~tokensel.schedules.view.View`, where some cells of a row stay and others go. Such a schedule
      drops nothing in decode steps.
    - ``count(view)``: how many cells of each row stay, ``[rows]``, in place of :meth:`entering`, likewise.
    - ``recycle(view, stay)``: ``stay``, which columns are kept, with those that come back of what is dropped,
      and the hidden states ``[rows, left, width]`` with what these become.
    - ``evicts = True``: what it drops is evicted from the caches of the layers that ran already, too.
    - ``restores = True``: it evicts nothing. In decode steps it chooses among all cells at every step, and
      those that it does not choose are not attended to at this step.
    - ``withdraws = True``: no visual token enters its ``layer``. An evaluation gives it the option
      ``vtw_layer``, by default half of the layers, where the others get ``layer``.
    - ``check_model(config)``: raises ``TokenselError`` for a model that it does not fit.
    """

    name: ClassVar[str]
    uses_keep: ClassVar[bool]

    @property
    def newline(self) -> str: ...

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float | Float[Tensor, "rows"]:
        """Fraction of the prompt's visual cells that enters ``layer``, newlines not counted.

        Args:
            layer: one of :meth:`layers`, counted from 0.
            step: 0 in the prefill, then one more for each decode step. An evicted token never comes back, so
                a fraction that rises again changes nothing.
            mass: what the newest token attends to.

        Returns:
            One fraction for all rows, or one for each row.
        """
        ...

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        ...


def check_layer(layer: Any, why: str) -> int:
    """Return ``layer`` as an ``int``; integers of numpy are accepted.

    Args:
        layer: the layer at whose entrance tokens are dropped.
        why: why it cannot be 0, for the error message.

    Raises:
        TokenselError: ``layer`` is not a whole number, or below 1.
    """
    try:
        # operator.index accepts integers of any library and refuses 2.0, which may come from a wrong
        # computation
        number = None if isinstance(layer, bool) else operator.index(layer)
    except TypeError:
        number = None
    if number is None:
        raise TokenselError(f"layer is {layer!r}: give a whole number, such as 2")
    if number < 1:
        raise TokenselError(f"layer is {layer}: give at least 1, {why}")
    return number


def check_fraction(keep: Any) -> float:
    """Return ``keep`` as a ``float``; numbers of numpy are accepted.

    Raises:
        TokenselError: ``keep`` is not a number, or outside [0, 1].
    """
    if not isinstance(keep, Real) or isinstance(keep, bool):
        raise TokenselError(f"keep is {keep!r}: give a fraction in [0, 1], such as 0.5")
    fraction = float(keep)
    if not 0.0 <= fraction <= 1.0:  # NaN fails every comparison and ends here too
        raise TokenselError(f"keep is {keep}: give a fraction in [0, 1], such as 0.5")
    return fraction


def check_newline(newline: Any) -> None:
    """Check what is to become of newlines.

    Raises:
        TokenselError: it is none of "keep", "drop" and "row".
    """
    if newline not in NEWLINES:
        raise TokenselError(f"newline is {newline!r}: choose one of {', '.join(NEWLINES)}")


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class Ranked:
    """Options of the schedules that rank visual tokens at one layer and keep a fraction of them.

    Attributes:
        layer: the first layer that is given fewer tokens, counted from 0.
        keep: the fraction of the visual cells, in [0, 1]; newlines are not counted.
        newline: "keep", "drop" or "row", see :class:`Schedule`.

    Raises:
        TokenselError: ``layer`` is not a whole number of at least 1, ``keep`` not a fraction in [0, 1], or
            ``newline`` unknown.
    """

    layer: int = 2
    keep: float = 0.5
    newline: str = "keep"
    uses_keep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # a frozen dataclass takes assignments only this way
        object.__setattr__(self, "layer", check_layer(self.layer, "ranking needs the attention of one layer"))
        object.__setattr__(self, "keep", check_fraction(self.keep))
        check_newline(self.newline)

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return () if self.keep == 1.0 else (self.layer,)
