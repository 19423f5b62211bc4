"""FastV (Chen et al. 2024, arXiv 2403.06764): from one layer on, only what the last token attends to most."""

from dataclasses import dataclass

from tokensel.errors import TokenselError


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
    name: str = "fastv"

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise TokenselError(f"keep is {self.keep}: give a fraction in [0, 1], such as 0.5")
        if self.layer < 1:
            raise TokenselError(f"layer is {self.layer}: give at least 1, ranking needs the attention of one layer")

    def entering(self, layer: int) -> float:
        """Fraction of the prompt's visual tokens that enters ``layer``, counted from 0."""
        return 1.0 if layer < self.layer else self.keep

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return () if self.keep == 1.0 else (self.layer,)
