"""Qwen2-VL and Qwen2.5-VL: images and videos of any size, four patches a token, positions of three axes."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, TowerOutput, content_keys
from tokensel.vlm.families.base import Family, Located, host_tensor, needed, tensor
from tokensel.vlm.families.processors import image_processor_only, stock_processor
from tokensel.vlm.layout import Layout, plain_layout

__all__ = ["QwenVl"]

# what the tower reads, and the sizes of its images or clips in patches, [items, 3]: time, height and width
KINDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


class QwenVl(Family):
    """An image is one grid of tokens, each made of a square of ``merge_size**2`` patches.

    A clip is an image with a grid for each step of time (two frames): a budget by image is one for the clip,
    a budget by tile one for each step. Images are held in front of clips, and numbered as in the prompt.
    """

    name = "Qwen2-VL or Qwen2.5-VL"
    ragged = True
    videos = True

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        return image_processor_only(stock_processor(config)).from_pretrained(name, **hub)

    def placeholders(self, config: Any) -> Int[Tensor, "kinds"]:
        return torch.tensor([config.image_token_id, config.video_token_id])

    def mark(self, token: str) -> str:
        return f"<|vision_start|>{token}<|vision_end|>"

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        pixels, extras = [], {}
        for values, grids in KINDS.items():
            given = tensor(inputs, values)
            some = given is not None and len(given) > 0
            extras[grids] = needed(inputs, grids) if some else torch.zeros(0, 3, dtype=torch.long)
            pixels += [given.to(device_of(self.tower(model)))] if given is not None and some else []
        if (seconds := host_tensor(inputs, "second_per_grid_ts")) is not None:
            extras["second_per_grid_ts"] = seconds
        extras["order"] = self._order(model.config, ids, *(extras[grids] for grids in KINDS.values()))
        layout = self.tiles_layout(model.config, extras)
        return Located(layout, torch.cat(pixels) if pixels else None, extras=extras)

    def _order(
        self,
        config: Any,
        ids: Int[Tensor, "rows length"],
        images: Int[Tensor, "images 3"],
        videos: Int[Tensor, "videos 3"],
    ) -> Int[Tensor, "items"]:
        """Number of each image or clip in the order of the prompt, where all images come before all clips.

        Raises:
            TokenselError: the placeholders of images and clips do not match their sizes.
        """
        if not len(videos):
            return torch.arange(len(images))
        clip = ids[torch.isin(ids, self.placeholders(config))] == config.video_token_id
        sizes = [grid.prod(1) // config.vision_config.spatial_merge_size**2 for grid in (images, videos)]
        left = [list(enumerate(sizes[0].tolist())), list(enumerate(sizes[1].tolist(), len(images)))]
        order, start = [], 0
        while start < len(clip) and left[int(clip[start])]:
            kind = clip[start]
            number, size = left[int(kind)].pop(0)
            if len(part := clip[start : start + size]) < size or bool((part != kind).any()):
                break
            order.append(number)
            start += size
        if len(order) < len(images) + len(videos) or start < len(clip):
            raise TokenselError(
                f"{int((~clip).sum())} image and {int(clip.sum())} video placeholders in input_ids do not "
                f"match image_grid_thw and video_grid_thw, which ask for {sizes[0].tolist()} and "
                f"{sizes[1].tolist()}: let the processor make both together"
            )
        return torch.tensor(order)

    def tower(self, model: PreTrainedModel) -> Any:
        core: Any = model.base_model
        return core.visual

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        # [items, 3]: time, height and width in patches; an image has one time step, a clip a tile for each
        times, sides = self._in_order(tiles).split([1, 2], 1)
        grid = (sides // config.vision_config.spatial_merge_size).repeat_interleave(times[:, 0], 0)
        return plain_layout(grid, times[:, 0].tolist())

    def _in_order(self, tiles: Mapping[str, Tensor]) -> Int[Tensor, "items 3"]:
        """Time, height and width of each image or clip in patches, in the order of the prompt."""
        grids = torch.cat([tiles[name] for name in KINDS.values() if name in tiles])
        return grids[tiles["order"]] if "order" in tiles else grids

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
        """Images and clips pass the tower apart, as in the model, so that not even rounding differs."""
        vision, grids = encoded.model.config.vision_config, self._grids(encoded)
        assert encoded.pixel_values is not None  # asked only where there are images
        groups, embeds, deeper = [], [], []
        # pixels are [patches of all images, then of all clips, channels of a patch]
        sizes = [int(grid.prod(1).sum()) for grid in grids]
        for pixels, grid in zip(encoded.pixel_values.split(sizes), grids):
            if len(grid):
                out = encoded.core.get_image_features(pixels, grid.to(pixels.device), return_dict=True)
                groups.append(self._grouped(vision, out, grid))
                embeds += out.pooler_output
                deeper.append(self.deeper(out))
        order = self._by_prompt(encoded, vision.spatial_merge_size**2).to(embeds[0].device)
        return TowerOutput(
            encoded.layout.by_tile(torch.cat(groups)[order]),
            embeds=torch.cat(embeds)[order],
            patches=vision.spatial_merge_size**2,
            deeper=[torch.cat(layer)[order] for layer in zip(*deeper)],
        )

    def deeper(self, out: Any) -> list[Float[Tensor, "tokens width"]]:
        """What is added to the tokens inside the language model, by layer, from the tower's output."""
        return []

    def _grids(self, encoded: Encoded) -> list[Int[Tensor, "items 3"]]:
        """Those of the images, and of the clips."""
        none = torch.zeros(0, 3, dtype=torch.long)
        return [encoded.extras.get(grids, none) for grids in KINDS.values()]

    def _by_prompt(self, encoded: Encoded, merged: int) -> Int[Tensor, "tokens"]:
        """Number of each token in the order of the prompt, where those of images come before those of clips.

        Args:
            encoded: the batch.
            merged: patches that become one token; 1 to number patches.
        """
        sizes = torch.cat(self._grids(encoded)).prod(1) // merged
        parts = torch.arange(int(sizes.sum())).split(sizes.tolist())
        return torch.cat([parts[item] for item in encoded.extras.get("order", range(len(parts)))])

    def _grouped(
        self, vision: Any, out: Any, grid: Int[Tensor, "items 3"]
    ) -> Float[Tensor, "tokens channels"]:
        """The patches of each token side by side, in the order of the image."""
        # patches of a token are neighbours in the tower's output: [tokens, merge**2 * channels]
        groups = out.last_hidden_state.unflatten(0, (-1, vision.spatial_merge_size**2)).flatten(1)
        if hasattr(vision, "window_size"):
            # Qwen2.5-VL's tower leaves its tokens in the order of its attention windows
            order, _ = get_vision_window_index(
                grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
            )
            groups = groups[order.argsort().to(groups.device)]
        return groups

    def keys(self, encoded: Encoded) -> Int[Tensor, "tiles"]:
        assert encoded.pixel_values is not None  # asked only where there are images
        times, sides = self._in_order(encoded.extras).split([1, 2], 1)
        pixels = encoded.pixel_values[self._by_prompt(encoded, 1).to(encoded.pixel_values.device)]
        counts = sides.prod(1).repeat_interleave(times[:, 0]).tolist()  # patches of each tile
        return torch.cat([content_keys(tile[None, None]) for tile in pixels.split(counts)])

    def positions(self, encoded: Encoded) -> Int[Tensor, "axes rows length"]:
        """Plain text positions, then time, height and width, as the model makes them for the full prompt."""
        config, mask, ids = encoded.model.config, encoded.attention_mask, encoded.input_ids
        given = {name: encoded.extras[name] for name in KINDS.values() if len(encoded.extras[name])}
        text = (mask.long().cumsum(1) - 1).clamp(min=0)
        if not given:
            return text.expand(4, -1, -1)
        if "second_per_grid_ts" in encoded.extras:  # of clips in Qwen2.5-VL
            given["second_per_grid_ts"] = encoded.extras["second_per_grid_ts"]
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        given |= {"mm_token_type_ids": types * mask, "attention_mask": mask}
        axes, _ = encoded.core.get_rope_index(ids, **given)
        return torch.cat([text[None], axes])
