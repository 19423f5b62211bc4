"""How a LLaVA lays out its visual tokens: tiles, thumbnail, unpadding, newlines.

An image becomes tiles: first the thumbnail (the whole image squashed into one tile), then a grid of
high-resolution tiles. The model joins the grid into one large map, cuts off the letterbox ("unpadding"),
ends every row with a newline token, and puts the thumbnail's cells in front. *Packed* below means that
sequence, all images of a batch one after the other: the order of the placeholders in ``input_ids``.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokensel.utils.errors import TokenselError

__all__ = [
    "NEWLINE",
    "Layout",
    "empty_layout",
    "mark_cells",
    "pack",
    "plain_layout",
    "read_layout",
    "real_tiles",
    "tile_counts",
]

NEWLINE = -1


@dataclass
class Layout:
    """Where each packed visual token of a batch comes from; all of it on the host.

    Attributes:
        source: index into the flattened ``[tiles * tokens]`` of the batch, or ``NEWLINE``.
        image: number of the image the token belongs to.
        thumbnail: True for cells of an image's thumbnail. The only tile of a one-tile image is the image
            itself and no thumbnail.
        tiles: number of tiles of each image.
        tokens: cells in one tile; in the largest, where tiles differ in size.
        grid: rows and columns of each tile, where tiles differ in size or are not square; ``None`` where all
            are squares of ``tokens`` cells.
    """

    source: Int[Tensor, "packed"]
    image: Int[Tensor, "packed"]
    thumbnail: Bool[Tensor, "packed"]
    tiles: list[int]
    tokens: int
    grid: Int[Tensor, "tiles 2"] | None = None

    @property
    def real(self) -> Bool[Tensor, "tiles tokens"] | None:
        """True at the cells that a tile has, False where it is smaller than the largest; ``None``: all."""
        return None if self.grid is None else torch.arange(self.tokens) < self.grid.prod(1)[:, None]

    @property
    def cell(self) -> Bool[Tensor, "packed"]:
        """True for visual cells, False for newlines."""
        return self.source != NEWLINE

    @property
    def image_of_tile(self) -> Int[Tensor, "tiles"]:
        """Number of the image each tile belongs to."""
        counts = torch.tensor(self.tiles, dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    @property
    def valid(self) -> Bool[Tensor, "tiles tokens"]:
        """True for the cells of each tile that survive unpadding."""
        return self.spread(self.cell)

    @property
    def slots(self) -> tuple[Int[Tensor, "cells"], Int[Tensor, "cells"], Int[Tensor, "images"]]:
        """The visual cells as a ragged table, one row an image: row and slot of each, and lengths."""
        rows = self.image[self.cell]
        lengths = torch.bincount(rows, minlength=len(self.tiles))
        slot = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
        return rows, slot, lengths

    @property
    def behind(self) -> Bool[Tensor, "packed"]:
        """True for a cell that stands right behind another cell of its row, in the prompt as in the image."""
        cell = self.cell
        column, part = torch.zeros(len(cell)), self.thumbnail.long()
        column[cell] = self.centres[:, 1]
        if self.grid is not None:  # tiles that are not joined have rows of their own
            part = self.source // self.tokens
        behind = torch.zeros_like(cell)
        behind[1:] = cell[1:] & cell[:-1] & (column[1:] > column[:-1])
        for same in (self.image, part):
            behind[1:] &= same[1:] == same[:-1]
        return behind

    @property
    def centres(self) -> Float[Tensor, "cells 2"]:
        """Middle of each visual cell in its image, as fractions of height and width, without letterbox.

        Where tiles are not joined into one map, that is the middle in the tile.
        """
        cell, image = self.cell, self.image
        if self.grid is not None:
            height, width = self.grid[self.source // self.tokens].unbind(1)
            place = self.source % self.tokens
            return torch.stack([(place // width + 0.5) / height, (place % width + 0.5) / width], 1).float()
        side = isqrt(self.tokens)
        place = self.source[cell] % self.tokens  # in its tile, which for a whole tile is all there is to say
        row, column = place // side, place % side
        high, wide = torch.full_like(row, side), torch.full_like(row, side)
        # the rows of a map end with newlines
        on_map = (cell & ~self.thumbnail & (torch.tensor(self.tiles)[image] > 1))[cell]
        ends = (~cell).long()
        line = (ends.cumsum(0) - ends)[cell][on_map]  # counted over the batch
        of = image[cell][on_map]
        first = torch.full((len(self.tiles),), len(cell)).scatter_reduce(0, of, line, "amin")
        last = torch.zeros(len(self.tiles), dtype=torch.long).scatter_reduce(0, of, line, "amax")
        width = torch.bincount(line, minlength=1)
        row[on_map], high[on_map] = line - first[of], (last - first + 1)[of]
        wide[on_map] = width[line]
        column[on_map] = torch.arange(len(line)) - (width.cumsum(0) - width)[line]
        return torch.stack([(row + 0.5) / high, (column + 0.5) / wide], 1).float()

    def by_tile(self, cells: Float[Tensor, "cells channels"]) -> Float[Tensor, "tiles tokens channels"]:
        """Features of the cells in packed order as a row for each tile, zeros beyond a smaller one."""
        flat = cells.new_zeros(sum(self.tiles) * self.tokens, cells.shape[1])
        flat.index_copy_(0, self.source[self.cell].to(cells.device), cells)
        return flat.unflatten(0, (sum(self.tiles), self.tokens))

    def spread(self, packed: Bool[Tensor, "packed"]) -> Bool[Tensor, "tiles tokens"]:
        """A mask over packed tokens as a mask over the cells of each tile; newlines have no place there."""
        mask = torch.zeros(sum(self.tiles) * self.tokens, dtype=torch.bool)
        mask[self.source[packed & self.cell]] = True
        return mask.view(sum(self.tiles), self.tokens)


def tile_counts(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
    """Tiles of each image of a processed batch, thumbnail included, by the model's own rule."""
    core: Any = model.base_model
    config, sizes = model.config, inputs["image_sizes"]
    # LLaVA-OneVision leaves the images of a row with several of them uncut; LLaVA-NeXT cuts every image
    groups = inputs.get("batch_num_images")
    whole = "batch_num_images" in inspect.signature(core.get_image_features).parameters
    uncut = (
        [n > 1 for n in map(int, groups) for _ in range(n)]
        if whole and groups is not None
        else [False] * len(sizes)
    )
    return [
        1
        if one
        else image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size, one in zip(sizes, uncut, strict=True)
    ]


def real_tiles(pixel_values: Tensor, counts: Sequence[int]) -> Float[Tensor, "tiles 3 height width"]:
    """All tiles of a batch in one tensor, without those that only fill up images with fewer tiles.

    Args:
        pixel_values: ``[images, most_tiles, 3, height, width]``, or ``[tiles, 3, height, width]`` already.
    """
    if pixel_values.dim() == 4:
        return pixel_values
    return torch.cat([pixels[:count] for pixels, count in zip(pixel_values, counts, strict=True)])


def pack(
    core: Any,
    features: Sequence[Float[Tensor, "_ tokens channels"]],
    image_sizes: Tensor,
    newline: Float[Tensor, "channels"],
    ratio: str | None = None,
) -> list[Float[Tensor, "_ channels"]]:
    """Pack the tiles of each image with the model's own ``pack_image_features`` (options differ by model).

    Args:
        core: the model without its language head.
        features: tiles of each image.
        image_sizes: ``[images, 2]``, height and width in pixels.
        newline: what ends a row.
        ratio: ``vision_aspect_ratio`` to pack with, where the model knows one; by default that of its
            configuration.
    """
    options = {
        "vision_feature_select_strategy": getattr(core.config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": ratio or getattr(core.config, "vision_aspect_ratio", None),
    }
    known = inspect.signature(core.pack_image_features).parameters
    options = {name: value for name, value in options.items() if name in known}
    return list(core.pack_image_features(list(features), image_sizes, image_newline=newline, **options)[0])


def mark_cells(
    core: Any, counts: Sequence[int], tokens: int, image_sizes: Tensor, ratio: str | None = None
) -> list[Bool[Tensor, "_"]]:
    """For each image, which of its packed tokens are visual cells and which newlines, interpolated or not."""
    ones = torch.ones(sum(counts), tokens, 1, device=image_sizes.device)
    packed = pack(core, ones.split(list(counts)), image_sizes, ones.new_zeros(1), ratio)
    return [image[:, 0] > 0.5 for image in packed]


def read_layout(core: Any, counts: Sequence[int], tokens: int, image_sizes: Tensor) -> Layout:
    """Find where packed tokens come from, by packing the cells' numbers in place of their features.

    The model's own code moves the numbers as it would move the features, so that the result is exact,
    unpadding included, and no rule of the model is written down twice.

    Args:
        core: the model without its language head (``model.base_model``).
        counts: tiles of each image.
        tokens: cells in one tile.
        image_sizes: ``[images, 2]``, height and width in pixels, on the host.

    Raises:
        TokenselError: the model resamples features while packing, so that tokens have no single source.
    """
    # float64 holds every index exactly, and packing code may insist on floating point
    numbers = torch.arange(sum(counts) * tokens, dtype=torch.float64).view(-1, tokens, 1)
    newline = torch.full((1,), float(NEWLINE), dtype=torch.float64)
    packed = [image[:, 0] for image in pack(core, numbers.split(list(counts)), image_sizes, newline)]
    if any(not torch.equal(image, image.round()) for image in packed):
        raise TokenselError(
            "the model interpolates visual tokens while packing them: load it with load_vlm, which turns "
            "that off, or set vision_aspect_ratio='anyres_max_1000' in the configurations of model and "
            "processor"
        )
    source = torch.cat(packed).long()
    image = torch.repeat_interleave(torch.arange(len(packed)), torch.tensor([len(p) for p in packed]))
    per_image = torch.tensor(list(counts))
    first = (per_image.cumsum(0) - per_image)[image]  # the first tile of the token's image
    thumbnail = (source != NEWLINE) & (source // tokens == first) & (per_image[image] > 1)
    return Layout(source, image, thumbnail, list(counts), tokens)


def plain_layout(
    grid: Int[Tensor, "tiles 2"], tiles: Sequence[int], last_is_thumbnail: bool = False
) -> Layout:
    """The layout of images whose tiles follow one another as they are, row by row, without newlines.

    Args:
        grid: rows and columns of each tile, in visual tokens.
        tiles: tiles of each image.
        last_is_thumbnail: whether the last tile of an image with several of them is its thumbnail.
    """
    counts = grid.prod(1)
    most = int(counts.max()) if len(counts) else 0
    tile = torch.repeat_interleave(torch.arange(len(counts)), counts)
    source = tile * most + torch.arange(len(tile)) - (counts.cumsum(0) - counts)[tile]
    per_image = torch.tensor(list(tiles), dtype=torch.long)
    image_of_tile = torch.repeat_interleave(torch.arange(len(per_image)), per_image)
    last = torch.zeros(len(counts), dtype=torch.bool)
    if last_is_thumbnail:
        last[per_image.cumsum(0)[per_image > 1] - 1] = True
    return Layout(source, image_of_tile[tile], last[tile], list(tiles), most, grid)


def empty_layout(tokens: int) -> Layout:
    """The layout of a batch without any image."""
    none = torch.zeros(0, dtype=torch.long)
    return Layout(none, none, none.bool(), [], tokens)
