"""What a schedule is, and the ways to generate in which none can work."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokensel.utils.errors import TokenselError

UNSUPPORTED = {
    "num_beams": "beam search reorders the cache's rows",
    "assistant_model": "assisted decoding cuts the cache",
    "prompt_lookup_num_tokens": "prompt lookup cuts the cache",
    "cache_implementation": "a cache of fixed size has no room to shrink",
    "use_cache": "without a cache every token would be computed again",
}

Mass = Callable[[], Float[Tensor, "rows heads types"]]
"""Gives how the newest token's attention in the layer before is shared among the types of tokens; computed when called."""


@runtime_checkable
class Schedule(Protocol):
    """Which visual tokens stay, by layer and by generation step.

    Attributes:
        name: its row in the table of schedules.
        uses_keep: whether it takes the fraction to keep as an option.
    """

    name: str
    uses_keep: bool

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float | Float[Tensor, "rows"]:
        """Fraction of the prompt's visual tokens that enters ``layer``, counted from 0.

        Args:
            layer: one of :meth:`layers`.
            step: 0 while the prompt is read, then 1 more for each token of the answer. What is gone never comes back,
                so a fraction that rises again changes nothing.
            mass: what the newest token attends to.

        Returns:
            One fraction, or one for each row.
        """

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""


def check_ranked(layer: int, keep: float) -> None:
    """Refuse options under which tokens cannot be ranked and kept.

    Raises:
        TokenselError: ``keep`` outside [0, 1], or ``layer`` below 1.
    """
    if not 0.0 <= keep <= 1.0:
        raise TokenselError(f"keep is {keep}: give a fraction in [0, 1], such as 0.5")
    if layer < 1:
        raise TokenselError(f"layer is {layer}: give at least 1, ranking needs the attention of one layer")


def check_options(options: dict[str, Any]) -> None:
    """Refuse ways to generate in which dropping inside the model cannot work.

    Raises:
        TokenselError: one of them is asked for.
    """
    for name, why in UNSUPPORTED.items():
        harmless = {"num_beams": 1, "use_cache": True}.get(name)
        if options.get(name) not in (None, harmless):
            raise TokenselError(f"{name}={options[name]!r}: {why}; leave it out when a schedule drops tokens")
