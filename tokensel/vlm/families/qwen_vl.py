"""Qwen2-VL and Qwen2.5-VL: images of any size, four patches a token, positions of three axes (M-RoPE)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from tokensel.utils.devices import device_of
from tokensel.vlm.encoded import Encoded, TowerOutput, content_keys
from tokensel.vlm.families.base import Family, Located, needed, tensor
from tokensel.vlm.families.processors import image_processor_only, stock_processor
from tokensel.vlm.layout import Layout, plain_layout

__all__ = ["QwenVl"]


class QwenVl(Family):
    """An image is one grid of tokens, each made of a square of ``merge_size**2`` patches."""

    name = "Qwen2-VL or Qwen2.5-VL"
    ragged = True

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        return image_processor_only(stock_processor(config)).from_pretrained(name, **hub)

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        core: Any = model.base_model
        pixels = tensor(inputs, "pixel_values")
        patches: Tensor = torch.zeros(0, 3, dtype=torch.long)
        if pixels is not None and len(pixels):
            patches, pixels = needed(inputs, "image_grid_thw"), pixels.to(device_of(core.visual))
        extras = {"image_grid_thw": patches}
        return Located(
            self.tiles_layout(model.config, extras), pixels if len(patches) else None, extras=extras
        )

    def tower(self, model: PreTrainedModel) -> Any:
        core: Any = model.base_model
        return core.visual

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        # [images, 3]: time, height and width in patches; an image has one time step
        grid = tiles["image_grid_thw"][:, 1:] // config.vision_config.spatial_merge_size
        return plain_layout(grid, [1] * len(grid))

    def cut(self, image_processor: Any, image: Image, whole: bool) -> list[dict[str, Tensor]]:
        out = image_processor(images=[image], return_tensors="pt")
        return [{name: out[name] for name in ("pixel_values", "image_grid_thw")}]

    def patch_width(self, config: Any) -> int:
        # Qwen2-VL calls the channels of a patch embed_dim, and those of a token hidden_size
        return getattr(config.vision_config, "embed_dim", config.vision_config.hidden_size)

    def width(self, config: Any) -> int:
        return self.patch_width(config) * config.vision_config.spatial_merge_size**2

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        patches = tokens.unflatten(-1, (-1, self.patch_width(encoded.model.config))).flatten(0, 1)
        return encoded.core.visual.merger(patches)

    def run(self, encoded: Encoded) -> TowerOutput:
        return self.grouped(encoded, self.encode(encoded))

    def encode(self, encoded: Encoded) -> Any:
        """What the model's own method for image features returns."""
        grid = encoded.extras["image_grid_thw"].to(device_of(encoded.core.visual))
        return encoded.core.get_image_features(encoded.pixel_values, grid, return_dict=True)

    def grouped(self, encoded: Encoded, out: Any) -> TowerOutput:
        """The patches of each token side by side, in the order of the image."""
        vision, patches = encoded.model.config.vision_config, encoded.extras["image_grid_thw"]
        # patches of a token are neighbours in the tower's output: [tokens, merge**2 * channels]
        groups = out.last_hidden_state.unflatten(0, (-1, vision.spatial_merge_size**2)).flatten(1)
        if hasattr(vision, "window_size"):
            # Qwen2.5-VL's tower leaves its tokens in the order of its attention windows
            order, _ = get_vision_window_index(
                patches, vision.spatial_merge_size, vision.window_size, vision.patch_size
            )
            groups = groups[order.argsort().to(groups.device)]
        return TowerOutput(
            encoded.layout.by_tile(groups),
            embeds=torch.cat(list(out.pooler_output)),
            patches=vision.spatial_merge_size**2,
        )

    def keys(self, encoded: Encoded) -> Int[Tensor, "tiles"]:
        assert encoded.pixel_values is not None  # asked only where there are images
        # pixels are [patches of all images, channels of a patch]
        counts = encoded.extras["image_grid_thw"].prod(1).tolist()
        return torch.cat([content_keys(image[None, None]) for image in encoded.pixel_values.split(counts)])

    def positions(self, encoded: Encoded) -> Int[Tensor, "axes rows length"]:
        """Plain text positions, then time, height and width, as the model makes them for the full prompt."""
        mask, patches = encoded.attention_mask, encoded.extras["image_grid_thw"]
        text = (mask.long().cumsum(1) - 1).clamp(min=0)
        if not len(patches):
            return text.expand(4, -1, -1)
        types = (encoded.input_ids == encoded.model.config.image_token_id) & mask
        axes, _ = encoded.core.get_rope_index(
            encoded.input_ids, mm_token_type_ids=types.int(), image_grid_thw=patches, attention_mask=mask
        )
        return torch.cat([text[None], axes])
