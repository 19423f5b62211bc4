"""Pixtral: the tower of Mistral 3 in the class of LLaVA-1.5, one patch a token, line breaks as text."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.families.mistral3 import Mistral3

__all__ = ["Pixtral"]


class Pixtral(Mistral3):
    """Its configuration is a ``llava`` whose tower is a ``pixtral``."""

    name = "Pixtral"

    def check(self, model: PreTrainedModel) -> None:
        strategy = model.config.vision_feature_select_strategy
        if strategy != "full":
            raise TokenselError(
                f"a Pixtral with vision_feature_select_strategy '{strategy}' loses its first patch, as its "
                "tower has no CLS token: give 'full' in its configuration"
            )

    def merge(self, config: Any) -> int:
        return 1

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        return encoded.core.multi_modal_projector(tokens)
