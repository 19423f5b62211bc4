"""FastOCR (arXiv 2605.17447): nothing is evicted; each step of an answer attends to a share of the image.

Where text is read out, the place that is needed moves while the answer is written. What one step does not
need stays in the cache for the next.
"""

from dataclasses import dataclass
from typing import ClassVar, no_type_check

from tokensel.schedules.schedule import Mass, Ranked

__all__ = ["FastOcr"]


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class FastOcr(Ranked):
    """In decode steps, the layers from ``layer`` on attend to the fraction ``keep`` of the visual cells.

    The prompt is read in full, and its tokens stay in all caches: a step saves attention, not memory.

    What we chose, as the method is known to us by its idea alone: each step ranks all cells anew by the
    attention of its own token in the layer before ``layer``, averaged over heads, and one choice holds for
    all layers from there on.
    """

    name: ClassVar[str] = "fastocr"
    restores: ClassVar[bool] = True

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """All visual cells in the prefill; afterwards ``keep`` of them are attended to."""
        return 1.0 if layer < self.layer or step == 0 else self.keep
