"""Controls for DyRate: visual tokens leave while the answer grows, by a rate that looks at nothing.

Both read the prompt in full, so that they differ from a full answer in the generation alone, and rank the tokens as FastV
does, by the attention of the newest token.
"""

from dataclasses import dataclass
from typing import ClassVar

from tokensel.schedules.schedule import Mass, check_ranked


@dataclass(frozen=True)
class Fixed:
    """From the second step on, the layers from ``layer`` on keep the fraction ``keep`` of the visual tokens.

    Raises:
        TokenselError: ``keep`` outside [0, 1], or ``layer`` below 1.
    """

    layer: int = 2
    keep: float = 0.5
    name: ClassVar[str] = "fixed"
    uses_keep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranked(self.layer, self.keep)

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """All visual tokens while the prompt is read, ``keep`` of them afterwards."""
        return 1.0 if layer < self.layer or step == 0 else self.keep

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return () if self.keep == 1.0 else (self.layer,)


@dataclass(frozen=True)
class Exponential(Fixed):
    """Every further step keeps the fraction ``keep`` of the visual tokens that the step before it kept."""

    keep: float = 0.9
    name: ClassVar[str] = "exponential"

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """The fraction ``keep ** step``."""
        return 1.0 if layer < self.layer else self.keep**step
