"""Idefics3 and SmolVLM: square tiles with tags between them, the thumbnail last; positions count tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, TowerOutput
from tokensel.vlm.families.base import Family, Located, needed, run_lengths, tensor
from tokensel.vlm.families.processors import image_processor_only, stock_processor
from tokensel.vlm.layout import Layout, plain_layout

__all__ = ["Idefics3"]

THUMBNAIL = "<global-img>"  # the tag of an image's last tile, which is the whole image


class Idefics3(Family):
    """Tags and line breaks between tiles are text and stay; so does the tag of a tile that is dropped."""

    name = "Idefics3 or SmolVLM"
    text = "text_model"
    empty_rows = True

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        made = image_processor_only(stock_processor(config)).from_pretrained(name, **hub)
        if len(made.tokenizer(THUMBNAIL, add_special_tokens=False).input_ids) != 1:
            raise TokenselError(f"{name}: {THUMBNAIL} is no token, so that its images cannot be told apart")
        return made

    def tower(self, model: PreTrainedModel) -> Any:
        core: Any = model.base_model
        return core.vision_model

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        pixels, tiles, counts = tensor(inputs, "pixel_values"), [], []
        mark = ids == model.config.image_token_id
        for row, marks in zip(ids, mark):
            runs = len(run_lengths(marks[None]))
            counts.append(runs)
            # the tag in front of each run; the last run of a row is the thumbnail of its last image
            first = marks & ~torch.cat([marks.new_zeros(1), marks[:-1]])
            tags = row[first.nonzero()[:, 0] - 1].tolist()
            ends = [place + 1 for place, tag in enumerate(tags) if tag == tags[-1]]
            tiles += [end - start for start, end in zip([0, *ends], ends)]
        if not tiles:
            return Located(self._layout(model.config, tiles), None)
        if pixels is None:
            raise TokenselError("image placeholders in input_ids without pixel_values: pass both")
        masks = needed(inputs, "pixel_attention_mask")
        given = counts if len(pixels) == len(ids) else [count for count in counts if count]
        if len(given) != len(pixels) or max(given) != pixels.shape[1]:
            raise TokenselError(
                f"image placeholders in input_ids for {given} tiles, but pixel_values is "
                f"{list(pixels.shape)}: let the processor make both together"
            )
        # padding fills up rows with fewer tiles
        real = torch.cat([part[:count] for part, count in zip(pixels, given)])
        masks = torch.cat([part[:count] for part, count in zip(masks, given)])
        layout = self._layout(model.config, tiles)
        return Located(layout, real.to(device_of(self.tower(model))), extras={"pixel_attention_mask": masks})

    def _layout(self, config: Any, tiles: list[int]) -> Layout:
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return plain_layout(torch.full((sum(tiles), 2), side), tiles, last_is_thumbnail=True)

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        return self._layout(config, [1] * len(tiles["pixel_values"]))

    def cut(self, image_processor: Any, image: Image, whole: bool) -> list[dict[str, Tensor]]:
        out = image_processor(images=[[image]], do_image_splitting=not whole, return_tensors="pt")
        parts = zip(out["pixel_values"][0], out["pixel_attention_mask"][0])
        return [{"pixel_values": tile[None], "pixel_attention_mask": mask[None]} for tile, mask in parts]

    def width(self, config: Any) -> int:
        return config.vision_config.hidden_size * config.scale_factor**2

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        return encoded.core.connector.modality_projection(tokens)

    def run(self, encoded: Encoded) -> TowerOutput:
        core, scale, pixels = encoded.core, encoded.model.config.scale_factor, encoded.pixel_values
        assert pixels is not None  # asked only where there are images
        mask = encoded.extras["pixel_attention_mask"].to(pixels.device)
        out = core.get_image_features(pixels[None], mask[None], return_dict=True)
        if len(out.last_hidden_state) != len(pixels):
            raise TokenselError("a tile is all zeros, which the model takes for padding: change the image")
        shuffled = core.connector.pixel_shuffle(out.last_hidden_state, scale)
        return TowerOutput(shuffled, embeds=torch.cat(list(out.pooler_output)), patches=scale**2)
