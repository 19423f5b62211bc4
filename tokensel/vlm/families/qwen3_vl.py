"""Qwen3-VL: as Qwen2.5-VL, and features of further layers of the tower enter inside the language model."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tokensel.vlm.encoded import Encoded
from tokensel.vlm.families.base import Family, text_embeds
from tokensel.vlm.families.qwen_vl import QwenVl

__all__ = ["Qwen3Vl"]


class Qwen3Vl(QwenVl):
    """The deeper features ("deepstack") of a dropped token are dropped with it.

    Embeddings alone would lose them, so that the kept tokens enter as outputs of the encoder.
    """

    name = "Qwen3-VL"
    way = "embeddings of the shortened prompt and mm_encoder_outputs for its images go to model.generate"

    def deeper(self, out: Any) -> list[Float[Tensor, "tokens width"]]:
        return [torch.cat(list(layer)) for layer in out.deepstack_features]

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        return Family.embed(self, encoded, tokens)  # raises: what enters further on is not merged along

    def place(
        self,
        encoded: Encoded,
        ids: Int[Tensor, "rows length"],
        slots: Bool[Tensor, "rows length"],
        visual: Float[Tensor, "kept width"],
        kept: Bool[Tensor, "packed"],
    ) -> dict[str, Any]:
        """Placeholders stay in the prompt; the model puts the kept tokens there, and adds the deeper ones."""
        # a token of a clip enters as one of an image: its position tells the model its time
        embeds = text_embeds(encoded, ids.masked_fill(slots, encoded.model.config.image_token_id))
        # generate repeats the features of a row with it, so they are split at the rows
        sizes = [size for size in slots.sum(1).tolist() if size]
        if not sizes:
            return {"inputs_embeds": embeds}
        deeper = [layer[kept.to(layer.device)] for layer in encoded.tower_output.deeper]
        features: Any = BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(visual.split(sizes)),  # type: ignore[arg-type]  # declared as one tensor
            deepstack_features=[list(layer.split(sizes)) for layer in deeper],  # type: ignore[arg-type]  # too
        )
        return {"inputs_embeds": embeds, "mm_encoder_outputs": {"image": features}}
