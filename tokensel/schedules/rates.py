"""Baselines for DyRate: visual tokens are evicted while the answer grows, at a rate that is fixed in advance.

Both keep every token in the prefill, so that they differ from a full answer in the decode steps alone. They
rank the tokens as FastV does, by the attention of the newest token.
"""

from dataclasses import dataclass
from typing import ClassVar, no_type_check

from tokensel.schedules.schedule import Mass, Ranked

__all__ = ["Exponential", "Fixed"]


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class Fixed(Ranked):
    """In decode steps, the layers from ``layer`` on keep the fraction ``keep`` of the visual cells."""

    name: ClassVar[str] = "fixed"

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """All visual cells in the prefill, ``keep`` of them afterwards."""
        return 1.0 if layer < self.layer or step == 0 else self.keep


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class Exponential(Ranked):
    """Every decode step keeps the fraction ``keep`` of the visual cells that the step before it kept."""

    keep: float = 0.9
    name: ClassVar[str] = "exponential"

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """The fraction ``keep ** step``."""
        return 1.0 if layer < self.layer else self.keep**step
