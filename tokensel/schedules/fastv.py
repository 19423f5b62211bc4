"""FastV (Chen et al. 2024, arXiv 2403.06764): from one layer on, only what the last token attends to most."""

from dataclasses import dataclass
from typing import ClassVar

from tokensel.schedules.schedule import Mass, check_ranked


@dataclass(frozen=True)
class FastV:
    """The first ``layer`` layers see all visual tokens, the others the best fraction ``keep`` of them.

    Ranked by the attention that the prompt's last token pays in layer ``layer``, averaged over its heads. The paper
    names what is dropped ("R = 50 %"); here ``keep`` is what stays, as everywhere in this library.

    Raises:
        TokenselError: ``keep`` outside [0, 1], or ``layer`` below 1.
    """

    layer: int = 2
    keep: float = 0.5
    name: ClassVar[str] = "fastv"
    uses_keep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranked(self.layer, self.keep)

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """Fraction of the prompt's visual tokens that enters ``layer``, the same at every step."""
        return 1.0 if layer < self.layer else self.keep

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return () if self.keep == 1.0 else (self.layer,)
