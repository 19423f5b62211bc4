"""What Qwen3-VL adds to visual tokens after its first layers, for the tokens that are left."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Deepstack"]


class Deepstack:
    """Features of deeper layers of the tower ("deepstack"), added to visual columns after the first layers.

    The model adds them to a prompt of its full length. Where tokens are dropped, this class takes them out
    of the model's arguments and adds to each layer's output those of the columns that are left there.
    """

    def __init__(self) -> None:
        self.features: list[Float[Tensor, "visual width"]] = []  # one a layer, of all visual columns
        self.visual: Bool[Tensor, "rows length"] = torch.zeros(0, 0, dtype=torch.bool)
        self.number: Int[Tensor, "rows length"] = torch.zeros(0, 0, dtype=torch.long)

    def take(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the language model without these features, which are kept here for one pass."""
        self.features = kwargs.get("deepstack_visual_embeds") or []
        if not self.features:
            return kwargs
        self.visual = kwargs["visual_pos_masks"].cpu()
        # row after row, the visual columns are in the order of the features
        self.number = (self.visual.flatten().cumsum(0) - 1).view_as(self.visual)
        return kwargs | {"deepstack_visual_embeds": None, "visual_pos_masks": None}

    def add(
        self,
        layer: int,
        hidden: Float[Tensor, "rows left width"],
        order: Int[Tensor, "rows left"],
        real: Bool[Tensor, "rows left"],
    ) -> Float[Tensor, "rows left width"]:
        """The output of ``layer`` with what belongs to its visual columns added.

        Args:
            layer: its number.
            hidden: its output.
            order: columns of the prompt that are left in it, on the host.
            real: True where such a column is a token, False where it is padding.
        """
        if layer >= len(self.features):
            return hidden
        marks = self.visual.gather(1, order) & real
        rows, columns = (index.to(hidden.device) for index in marks.nonzero(as_tuple=True))
        features = self.features[layer].to(hidden)[self.number.gather(1, order)[marks].to(hidden.device)]
        return hidden.index_put((rows, columns), hidden[rows, columns] + features)
