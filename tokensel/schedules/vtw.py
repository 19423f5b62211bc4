"""VTW (Lin et al. 2024, arXiv 2405.05803): visual tokens withdraw altogether after some layer."""

from dataclasses import dataclass

from tokensel.errors import TokenselError


@dataclass(frozen=True)
class Vtw:
    """The first ``layer`` layers see all visual tokens, the others none: by then the text has taken up what it needs.

    Raises:
        TokenselError: ``layer`` below 1.
    """

    layer: int = 16
    name: str = "vtw"

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise TokenselError(f"layer is {self.layer}: give at least 1, or the model sees no image at all")

    def entering(self, layer: int) -> float:
        """Fraction of the prompt's visual tokens that enters ``layer``, counted from 0."""
        return 1.0 if layer < self.layer else 0.0

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return (self.layer,)
