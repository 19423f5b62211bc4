"""FastV (Chen et al. 2024, arXiv 2403.06764): from one layer on, only what the last token attends to most."""

from dataclasses import dataclass
from typing import ClassVar, no_type_check

from tokensel.schedules.schedule import Mass, Ranked

__all__ = ["FastV"]


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class FastV(Ranked):
    """The first ``layer`` layers see all visual tokens, the others the best fraction ``keep`` of the cells.

    Tokens are ranked by the attention that the prompt's last token pays in layer ``layer``, averaged over its
    heads. The paper names what is dropped ("R = 50 %"); here ``keep`` is what stays, as everywhere in this
    library.
    """

    name: ClassVar[str] = "fastv"

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """Fraction of the prompt's visual cells that enters ``layer``, the same at every step."""
        return 1.0 if layer < self.layer else self.keep
