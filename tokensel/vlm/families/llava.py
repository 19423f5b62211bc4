"""LLaVA-1.5: an image is one square tile of a CLIP tower; no newline, no separator."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.data.features import feature_width
from tokensel.data.tower import run_tower
from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, TowerOutput
from tokensel.vlm.families.base import Family, Located, check_cls, tensor
from tokensel.vlm.layout import Layout, plain_layout

__all__ = ["Llava"]


class Llava(Family):
    """The tower and the feature layer are those of LLaVA-NeXT, so selectors trained there may serve here."""

    name = "LLaVA-1.5"
    reads_layer = True

    def check(self, model: PreTrainedModel) -> None:
        config = model.config
        if not config.vision_config.model_type.startswith(("clip", "siglip")):
            raise TokenselError(
                f"the vision tower is a {config.vision_config.model_type}: give a LLaVA-1.5 with a CLIP or "
                "SigLIP tower"
            )
        check_cls(model)

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        pixels = tensor(inputs, "pixel_values")
        if pixels is None or not len(pixels):
            return Located(self.tiles_layout(model.config, {"pixel_values": torch.zeros(0)}), None)
        layout = self.tiles_layout(model.config, {"pixel_values": pixels})
        return Located(layout, pixels.to(device_of(self.tower(model))))

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        vision, images = config.vision_config, len(tiles["pixel_values"])
        side = vision.image_size // vision.patch_size
        return plain_layout(torch.full((images, 2), side), [1] * images)

    def width(self, config: Any) -> int:
        return feature_width(config.vision_config, config.vision_feature_layer)

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        return encoded.core.multi_modal_projector(tokens)

    def run(self, encoded: Encoded) -> TowerOutput:
        core, config, pixels = encoded.core, encoded.model.config, encoded.pixel_values
        assert pixels is not None  # asked only where there are images
        drop_cls = config.vision_feature_select_strategy == "default"
        tokens, attention = run_tower(core.vision_tower, pixels, config.vision_feature_layer, drop_cls)
        projected = core.multi_modal_projector(tokens.to(device_of(core.multi_modal_projector)))
        return TowerOutput(tokens, attention, projected.flatten(0, 1))
