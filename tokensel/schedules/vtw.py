"""VTW (Lin et al. 2024, arXiv 2405.05803): visual tokens withdraw altogether after some layer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from tokensel.schedules.prune import decoder_of, pruned
from tokensel.schedules.schedule import Mass
from tokensel.utils.errors import TokenselError


@dataclass(frozen=True)
class Vtw:
    """The first ``layer`` layers see all visual tokens, the others none: by then the text has taken up what it needs.

    Raises:
        TokenselError: ``layer`` below 1.
    """

    layer: int = 16
    name: ClassVar[str] = "vtw"
    uses_keep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise TokenselError(f"layer is {self.layer}: give at least 1, or the model sees no image at all")

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """Fraction of the prompt's visual tokens that enters ``layer``, the same at every step."""
        return 1.0 if layer < self.layer else 0.0

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return (self.layer,)


@torch.no_grad()
def withdrawal_divergence(model: PreTrainedModel, samples: Iterable) -> dict[int, float]:
    """How far the first token's distribution moves if visual tokens withdraw before a layer, for each layer from 1 on.

    The Kullback-Leibler divergence from the full model's distribution, averaged over the questions, in nats: what the
    repository of VTW (lzhxmu/VTW) looks at, over twenty samples, to choose its layer.

    Args:
        model: a LLaVA, or its language model with a head.
        samples: :class:`~tokensel.vlm.Reduced` prompts, in batches, from which nothing is dropped.

    Raises:
        TokenselError: no samples, or a prompt without visual tokens.
    """
    total, rows = dict.fromkeys(range(1, len(decoder_of(model).layers)), 0.0), 0
    for reduced in samples:
        full = model(**reduced, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        rows += len(full)
        for layer in total:
            with pruned(model, reduced.visual, reduced["attention_mask"], Vtw(layer)):
                given = (
                    model(**reduced, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
                )
            total[layer] += float(kl_div(full, given, reduction="sum", log_target=True))
    if not rows:
        raise TokenselError("no samples to choose VTW's layer on: give some prompts with pictures")
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
