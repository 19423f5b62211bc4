"""Gemma 3 and PaliGemma: one square image, image tokens that see each other both ways, shortened ids."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, TowerOutput
from tokensel.vlm.families.base import Family, Located, host_tensor, tensor
from tokensel.vlm.layout import Layout, plain_layout

__all__ = ["Gemma3", "PaliGemma"]


class Gemma3(Family):
    """A token is the mean of a square of patches. The model refuses embeddings, so it is given ids.

    Which image tokens attend to each other both ways is known by ``token_type_ids``, shortened with the ids.
    """

    name = "Gemma 3"
    way = "shortened input_ids and mm_encoder_outputs for their images go to model.generate"
    carried = ("token_type_ids",)
    empty_rows = True

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        pixels = tensor(inputs, "pixel_values")
        images = 0 if pixels is None else len(pixels)
        types = host_tensor(inputs, "token_type_ids")
        if types is None:
            types = (ids == model.config.image_token_id).long()
        return Located(
            self._layout(model.config, images),
            None if pixels is None or not images else pixels.to(device_of(self.tower(model))),
            extras={"token_type_ids": types},
        )

    def side(self, config: Any) -> int:
        """Rows, or columns, of an image's tokens."""
        return isqrt(config.mm_tokens_per_image)

    def _layout(self, config: Any, images: int) -> Layout:
        return plain_layout(torch.full((images, 2), self.side(config)), [1] * images)

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        return self._layout(config, len(tiles["pixel_values"]))

    def cut(self, image_processor: Any, image: Image, whole: bool) -> list[dict[str, Tensor]]:
        # pan-and-scan cuts crops out of an image, which the model reads as further images
        options = {"do_pan_and_scan": False} if whole else {}
        pixels = image_processor(images=[image], return_tensors="pt", **options)["pixel_values"]
        return [{"pixel_values": crop[None]} for crop in pixels]

    def width(self, config: Any) -> int:
        return config.vision_config.hidden_size

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        projector = encoded.core.multi_modal_projector
        return projector.mm_soft_emb_norm(tokens) @ projector.mm_input_projection_weight

    def tokens(self, core: Any, hidden: Float[Tensor, "images patches channels"]) -> Tensor:
        """What the projector makes one token of, ``[images, tokens, channels]``."""
        side = isqrt(hidden.shape[1])
        # the projector's own pooling wants [images, channels, rows, columns]
        grid = hidden.transpose(1, 2).unflatten(2, (side, side))
        return core.multi_modal_projector.avg_pool(grid).flatten(2).transpose(1, 2)

    def run(self, encoded: Encoded) -> TowerOutput:
        out = encoded.core.get_image_features(encoded.pixel_values, return_dict=True)
        return TowerOutput(
            self.tokens(encoded.core, out.last_hidden_state), embeds=out.pooler_output.flatten(0, 1)
        )

    def place(
        self,
        encoded: Encoded,
        ids: Int[Tensor, "rows length"],
        slots: Bool[Tensor, "rows length"],
        visual: Float[Tensor, "kept width"],
        kept: Bool[Tensor, "packed"],
    ) -> dict[str, Any]:
        """Placeholders stay in the prompt; the model puts the kept tokens there."""
        window = getattr(encoded.model.config.get_text_config(), "sliding_window", None)
        length = encoded.attention_mask.shape[1]
        if window is not None and length > window and not bool(kept.all()):
            warnings.warn(
                f"the prompt's {length} tokens are more than the sliding window of {window}, which counts "
                "tokens that are left: with some dropped, its layers see further back",
                stacklevel=2,
            )
        inputs = {"input_ids": ids.to(device_of(encoded.model.get_input_embeddings()))}
        sizes = [size for size in slots.sum(1).tolist() if size]
        return inputs | (
            {"mm_encoder_outputs": {"image": RowOutputs(pooler_output=Rows(visual.split(sizes)))}}
            if sizes
            else {}
        )


class PaliGemma(Gemma3):
    """A token is a patch. All of the prompt is read both ways, and every row begins with an image."""

    name = "PaliGemma"
    empty_rows = False
    needs_image = True

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        made = super().processor(name, config, **hub)
        if not (made.chat_template or made.tokenizer.chat_template):
            # its checkpoints come without one: the images, then the text
            made.chat_template = (
                "{% for message in messages %}"
                "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
                "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
                "{% endfor %}"
            )
        return made

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        if not bool((ids == model.config.image_token_id).any(1).all()):
            raise TokenselError("a row without an image, which PaliGemma does not read: give each row one")
        types = {"token_type_ids": torch.zeros_like(ids)} if inputs.get("token_type_ids") is None else {}
        return super().locate(model, {**inputs, **types}, ids)

    def side(self, config: Any) -> int:
        return config.vision_config.image_size // config.vision_config.patch_size

    def cut(self, image_processor: Any, image: Image, whole: bool) -> list[dict[str, Tensor]]:
        return Family.cut(self, image_processor, image, whole)

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        return encoded.core.multi_modal_projector(tokens)

    def tokens(self, core: Any, hidden: Float[Tensor, "images patches channels"]) -> Tensor:
        return hidden


class Rows(list):
    """Tensors, row by row, that are joined when the model moves them to its device."""

    def to(self, *to: Any) -> Float[Tensor, "kept width"]:
        return torch.cat(self).to(*to)


@dataclass
class RowOutputs(BaseModelOutputWithPooling):
    """Kept visual tokens row by row, for ``mm_encoder_outputs``.

    ``generate`` repeats the tokens of a row with it, for which it wants a list; the model wants one tensor.
    """

    pooler_output: Any = None  # Rows, where the class says a tensor

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Rows(value) if isinstance(value, list) else value)
