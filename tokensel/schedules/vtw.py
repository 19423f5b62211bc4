"""VTW (Lin et al. 2024, arXiv 2405.05803): all visual tokens are withdrawn after some layer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from tokensel.schedules.decoder import decoder_of
from tokensel.schedules.prune import pruned
from tokensel.schedules.schedule import Mass, check_layer
from tokensel.utils.errors import TokenselError

__all__ = ["Vtw", "choose_layer", "withdrawal_divergence"]


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class Vtw:
    """The first ``layer`` layers see all visual tokens, the others none.

    By then, the paper argues, the text tokens have taken up what they need.

    Raises:
        TokenselError: ``layer`` is not a whole number of at least 1.
    """

    layer: int = 16
    name: ClassVar[str] = "vtw"
    uses_keep: ClassVar[bool] = False
    withdraws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # a frozen dataclass takes assignments only this way
        object.__setattr__(self, "layer", check_layer(self.layer, "or the model sees no image at all"))

    @property
    def newline(self) -> str:
        """Newlines are dropped: the method withdraws everything that is visual."""
        return "drop"

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """Fraction of the prompt's visual cells that enters ``layer``, the same at every step."""
        return 1.0 if layer < self.layer else 0.0

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return (self.layer,)


@torch.no_grad()
def withdrawal_divergence(model: PreTrainedModel, samples: Iterable[Any]) -> dict[int, float]:
    """How far the first token's distribution moves if visual tokens are withdrawn, for each layer from 1 on.

    This is the Kullback-Leibler divergence from the full model's distribution, averaged over the questions,
    in nats. The repository of VTW (lzhxmu/VTW) chooses its layer by it, over twenty samples.

    Args:
        model: a vision-language model, or its language model with a head.
        samples: :class:`~tokensel.vlm.Reduced` prompts, in batches, from which nothing is dropped.

    Raises:
        TokenselError: no samples.
    """

    def first_token(reduced: Any) -> Float[Tensor, "rows vocabulary"]:
        logits = model(**reduced, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].float().log_softmax(-1)

    total, rows = dict.fromkeys(range(1, len(decoder_of(model).layers)), 0.0), 0
    for reduced in samples:
        full = first_token(reduced)
        rows += len(full)
        for layer in total:
            with pruned(model, reduced.prompt, Vtw(layer)):
                withdrawn = first_token(reduced)
            # log_target: both are log probabilities; the sum runs over rows and vocabulary
            total[layer] += float(kl_div(full, withdrawn, reduction="sum", log_target=True))
    if not rows:
        raise TokenselError("no samples to choose VTW's layer on: give some prompts with images")
    return {layer: value / rows for layer, value in total.items()}


def choose_layer(divergence: dict[int, float], threshold: float = 0.003) -> int:
    """The first layer whose divergence is below ``threshold``: VTW's own choice of K.

    Raises:
        TokenselError: no layer is below it.
    """
    below = [layer for layer in sorted(divergence) if divergence[layer] < threshold]
    if not below:
        lowest = min(divergence.values())
        raise TokenselError(
            f"threshold is {threshold}: no layer is below it, the lowest is {lowest:.2g}; give more"
        )
    return below[0]
