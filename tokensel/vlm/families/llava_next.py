"""LLaVA-NeXT: a thumbnail and a grid of tiles, joined into one map whose rows end in a newline."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.data.features import feature_width
from tokensel.data.tower import run_tower
from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, TowerOutput
from tokensel.vlm.families.base import Family, Located, check_cls, needed, tensor
from tokensel.vlm.layout import NEWLINE, empty_layout, read_layout, real_tiles, tile_counts

__all__ = ["LlavaNext"]


class LlavaNext(Family):
    """A CLIP or SigLIP tower over square tiles; see :mod:`tokensel.vlm.layout` for how they are packed."""

    name = "LLaVA-NeXT"
    tiled = True
    reads_layer = True

    def check(self, model: PreTrainedModel) -> None:
        check_cls(model)

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        core: Any = model.base_model
        config, pixels = model.config, tensor(inputs, "pixel_values")
        tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        if pixels is None or len(pixels) == 0:
            return Located(empty_layout(tokens), None)
        sizes = needed(inputs, "image_sizes")
        if sizes.dim() != 2 or sizes.shape[1] != 2:
            raise TokenselError(
                f"image_sizes has the shape {tuple(sizes.shape)}: give height and width of each image"
            )
        counts = tile_counts(model, {**inputs, "image_sizes": sizes})
        pixels = real_tiles(pixels, counts).to(device_of(core.vision_tower))
        return Located(read_layout(core, counts, tokens, sizes), pixels, sizes)

    def width(self, config: Any) -> int:
        return feature_width(config.vision_config, config.vision_feature_layer)

    def run(self, encoded: Encoded) -> TowerOutput:
        config = encoded.model.config
        drop_cls = config.vision_feature_select_strategy == "default"
        tower, pixels = encoded.core.vision_tower, encoded.pixel_values
        assert pixels is not None  # asked only where there are images
        return TowerOutput(*run_tower(tower, pixels, config.vision_feature_layer, drop_cls))

    def project(
        self,
        encoded: Encoded,
        kept: Bool[Tensor, "packed"],
        features: Float[Tensor, "tiles tokens channels"] | None = None,
    ) -> Float[Tensor, "kept width"]:
        """The kept cells, projected, and the model's newline embedding where a newline is kept."""
        core, layout = encoded.core, encoded.layout
        source = layout.source[kept]
        cell = source != NEWLINE
        if len(source) == 0:
            return core.image_newline.new_zeros(0, core.image_newline.shape[0])
        tokens = encoded.features.tokens if features is None else features
        tokens = tokens.to(device_of(core.multi_modal_projector))
        chosen = source[cell].to(tokens.device)
        if bool((kept | ~layout.cell).all()):
            # Everything stays: project whole tiles, as the model does, so that not even rounding differs.
            projected = core.multi_modal_projector(tokens).flatten(0, 1)[chosen]
        else:
            projected = core.multi_modal_projector(tokens.flatten(0, 1)[chosen])
        # newlines everywhere, then cells over them
        visual = core.image_newline.to(projected).repeat(len(source), 1)
        return visual.index_copy_(0, cell.nonzero()[:, 0].to(projected.device), projected)
