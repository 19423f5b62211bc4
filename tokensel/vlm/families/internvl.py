"""InternVL 2.5, 3 and 3.5: square tiles, the thumbnail last, four patches a token; positions count tokens."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, TowerOutput
from tokensel.vlm.families.base import Family, Located, run_lengths, tensor
from tokensel.vlm.families.processors import image_processor_only, stock_processor
from tokensel.vlm.layout import Layout, plain_layout

__all__ = ["InternVl"]


class InternVl(Family):
    """The processor passes on no number of tiles: it is read off the placeholders, a run for each image."""

    name = "InternVL"

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        return image_processor_only(stock_processor(config)).from_pretrained(name, **hub)

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        core: Any = model.base_model
        pixels, cells = tensor(inputs, "pixel_values"), model.config.image_seq_length
        tiles = [run // cells for run in run_lengths(ids == model.config.image_token_id)]
        given = 0 if pixels is None else len(pixels)
        if sum(tiles) != given:
            raise TokenselError(
                f"image placeholders in input_ids for {sum(tiles)} tiles, but the images give {given}: let "
                "the processor make both together"
            )
        layout = plain_layout(torch.full((given, 2), isqrt(cells)), tiles, last_is_thumbnail=True)
        return Located(
            layout, None if pixels is None or not given else pixels.to(device_of(core.vision_tower))
        )

    def cut(self, image_processor: Any, image: Image, whole: bool) -> list[dict[str, Tensor]]:
        out = image_processor(images=[image], crop_to_patches=not whole, return_tensors="pt")
        return [{"pixel_values": tile[None]} for tile in out["pixel_values"]]

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        count = len(tiles["pixel_values"])
        return plain_layout(torch.full((count, 2), isqrt(config.image_seq_length)), [1] * count)

    def width(self, config: Any) -> int:
        return config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        return encoded.core.multi_modal_projector(tokens)

    def run(self, encoded: Encoded) -> TowerOutput:
        core, config = encoded.core, encoded.model.config
        out = core.get_image_features(encoded.pixel_values, return_dict=True)
        layer = config.vision_feature_layer
        hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        if config.vision_feature_select_strategy == "default":
            hidden = hidden[:, 1:]  # without the CLS token
        side = isqrt(hidden.shape[1])
        # [tiles, rows, columns, channels] of patches -> [tiles, tokens, channels of the patches of a token]
        shuffled = core.pixel_shuffle(hidden.unflatten(1, (side, side)), scale_factor=config.downsample_ratio)
        patches = round(1 / config.downsample_ratio) ** 2
        return TowerOutput(shuffled.flatten(1, 2), embeds=out.pooler_output.flatten(0, 1), patches=patches)
