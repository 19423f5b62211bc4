"""Kept tokens over an image: cells of dropped tokens are veiled, as in the paper's Fig. 1.

Every function here takes tensors from any device and moves them to the host first: figures are drawn there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokensel.figures import style
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encode import Encoded

VEIL = (96, 104, 122)  # a cool grey that no page of the small world uses
STRENGTH = 0.86  # how much of a dropped cell the veil hides

# the values that an overlay shows, rows x columns of cells, for the CSV beside a figure: 1 or 0 for kept or
# dropped, or the values of a heat map; not a number where there is no token
CELLS: WeakKeyDictionary[AxesImage, np.ndarray] = WeakKeyDictionary()


def join_masks(
    kept: Shaped[Tensor, "tiles tokens"], rows: int, columns: int, grid: tuple[int, int]
) -> Shaped[Tensor, "height width"]:
    """Join the masks of the tiles of one image, left to right and top to bottom, into a mask over the image.

    Args:
        kept: True = kept, one row for each tile; or any other value for each token.
        rows: tiles from top to bottom.
        columns: tiles from left to right.
        grid: rows and columns of tokens within a tile.

    Raises:
        TokenselError: the numbers do not multiply to the shape of ``kept``.
    """
    height, width = grid
    if kept.shape != (rows * columns, height * width):
        raise TokenselError(
            f"masks of shape {tuple(kept.shape)} are not those of {rows} x {columns} tiles "
            f"of {height} x {width} tokens"
        )
    return kept.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)


def veiled(
    image: Image.Image,
    kept: Bool[Tensor, "height width"] | None,
    real: Bool[Tensor, "height width"] | None = None,
) -> UInt8[np.ndarray, "y x 3"]:
    """The image with the cells of dropped tokens veiled.

    Args:
        image: of any size; each token covers an equal cell of it, to the nearest pixel.
        kept: True = kept; ``None`` leaves the image as it is.
        real: False for cells that never become tokens, such as letterbox bars; they are left blank.
    """
    pixels = np.asarray(image.convert("RGB")).copy()
    if kept is None:
        return pixels
    y = np.arange(pixels.shape[0]) * kept.shape[0] // pixels.shape[0]
    x = np.arange(pixels.shape[1]) * kept.shape[1] // pixels.shape[1]
    dropped = ~kept.cpu().numpy()[y[:, None], x[None, :]]
    mixed = (1 - STRENGTH) * pixels[dropped] + STRENGTH * np.array(VEIL)
    pixels[dropped] = mixed.round().astype(np.uint8)
    if real is not None:
        pixels[~real.cpu().numpy()[y[:, None], x[None, :]]] = 255
    return pixels


def show(
    ax: Axes,
    image: Image.Image,
    kept: Bool[Tensor, "height width"] | None = None,
    title: str = "",
    real: Bool[Tensor, "height width"] | None = None,
) -> None:
    """Draw the image with its veil into ``ax``, without ticks; the arguments are those of :func:`veiled`."""
    drawn = ax.imshow(
        veiled(image, kept, real), interpolation="nearest" if max(image.size) < 200 else "antialiased"
    )
    if kept is not None:
        values = kept.cpu().numpy().astype(np.float64)
        CELLS[drawn] = values if real is None else np.where(real.cpu().numpy(), values, np.nan)
    _remove_axes(ax, title)


def _remove_axes(ax: Axes, title: str) -> None:
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def gallery(
    rows: Sequence[tuple[str, Image.Image, Sequence[Bool[Tensor, "height width"]]]],
    titles: Sequence[str],
    width: float = style.WIDTH,
) -> Figure:
    """One row for each image: as it is, then under each mask. The layout of Fig. 1, for any number of images.

    Args:
        rows: name, image and masks of each row; every row has as many masks as there are ``titles``.
        titles: what the masks are, such as ``["random", "selector"]``.
        width: of the figure in inches, at most that of the page's column.
    """
    width = style.fit(width)
    columns = 1 + len(titles)
    side = width / columns
    heights = [side * image.height / image.width for _, image, _ in rows]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(width, sum(heights) + 0.3), squeeze=False, height_ratios=heights
    )
    for number, (row, (name, image, masks)) in enumerate(zip(axes, rows)):
        for ax, mask, title in zip(row, (None, *masks), ("all tokens", *titles), strict=True):
            show(ax, image, mask, "" if number else title)
        row[0].set_ylabel(name)
    return figure


def anyres(
    encoded: Encoded,
    kept: Bool[Tensor, "tiles tokens"] | None = None,
    image: int = 0,
    statistics: tuple[Sequence[float], Sequence[float]] = ((0.0,) * 3, (1.0,) * 3),
    width: float = 6.0,
    title: str = "",
) -> Figure:
    """The thumbnail and the high-resolution tiles of one image of a batch, dropped tokens veiled.

    Cells of letterbox bars, which the model cuts off, are left blank.

    Args:
        encoded: a batch after the vision tower, from :func:`tokensel.vlm.encode`.
        kept: True = kept, as :class:`tokensel.vlm.Reduced` has it; ``None`` for all.
        image: its number in the batch.
        statistics: mean and standard deviation of the pixels by channel, as the image processor has them.
        width: of the figure in inches, at most that of the page's column.
        title: over the high-resolution tiles.
    """
    width = style.fit(width)
    tiled = tiled_image(encoded, image, statistics)
    valid = encoded.layout.valid
    kept = valid if kept is None else kept.cpu() & valid
    ratio = tiled.columns / tiled.rows
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(width, width / (ratio + 0.62) + 0.25), width_ratios=[0.6, ratio], squeeze=True
    )
    (small, large), (_, inside) = tiled.maps(kept), tiled.maps(valid)
    show(left, tiled.thumbnail, small, "thumbnail")
    show(right, tiled.full, large, title, inside)
    side = tiled.thumbnail.width
    for k in range(1, tiled.rows):
        right.axhline(k * side - 0.5, color="white", linewidth=1.0)
    for k in range(1, tiled.columns):
        right.axvline(k * side - 0.5, color="white", linewidth=1.0)
    return figure


@dataclass(frozen=True)
class TiledImage:
    """One image as the model receives it: thumbnail and high-resolution tiles, and where its tokens lie.

    Attributes:
        thumbnail: the whole image squashed into one tile.
        full: the high-resolution tiles, joined; letterbox bars included.
        rows, columns: of tiles in ``full``.
        cells: tokens along each side of a tile.
        tiles: the image's tiles among those of the batch, the thumbnail first.
    """

    thumbnail: Image.Image
    full: Image.Image
    rows: int
    columns: int
    cells: int
    tiles: slice

    def maps(
        self, values: Shaped[Tensor, "tiles tokens"]
    ) -> tuple[Shaped[Tensor, "cells cells"], Shaped[Tensor, "height width"]]:
        """Values of all tokens of the batch as two maps: over the thumbnail and over the full image."""
        own, grid = values[self.tiles], (self.cells, self.cells)
        return own[0].view(grid), join_masks(own[1:], self.rows, self.columns, grid)


def tiled_image(
    encoded: Encoded, image: int, statistics: tuple[Sequence[float], Sequence[float]]
) -> TiledImage:
    """One image of a batch; the arguments are those of :func:`anyres`.

    Raises:
        TokenselError: the batch has no images.
    """
    if encoded.pixel_values is None or encoded.image_sizes is None:
        raise TokenselError("the batch has no images: there is nothing to draw")
    config = encoded.model.config
    side = config.vision_config.image_size
    size = encoded.image_sizes[image].tolist()
    rows, columns = map(int, get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side))
    first = sum(encoded.layout.tiles[:image])
    own = slice(first, first + encoded.layout.tiles[image])
    tiles = tile_images(encoded.pixel_values[own], *statistics)
    full = join_tiles(tiles[1:], rows, columns)
    return TiledImage(tiles[0], full, rows, columns, side // config.vision_config.patch_size, own)


def left_cells(
    encoded: Encoded, visual: Bool[Tensor, "1 length"], columns: Int[Tensor, "left"]
) -> Bool[Tensor, "tiles tokens"]:
    """Which cells of the tiles remain when a schedule has kept only some columns of an unreduced prompt.

    Args:
        encoded: one question.
        visual: True at the prompt's visual tokens, newlines among them.
        columns: those that remain, as in :class:`tokensel.schedules.prune.Drop`.
    """
    places = visual[0].cpu().nonzero()[:, 0]  # the column of each packed token
    return encoded.layout.spread(torch.isin(places, columns.cpu()))


def tile_images(
    pixels: Float[Tensor, "tiles 3 height width"], mean: Sequence[float], std: Sequence[float]
) -> list[Image.Image]:
    """Tiles as images: the normalisation of the image processor undone."""
    scale, shift = torch.tensor(std).view(1, 3, 1, 1), torch.tensor(mean).view(1, 3, 1, 1)
    values = (pixels.cpu().float() * scale + shift).mul(255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()) for tile in values]


def cut_tiles(image: Image.Image, rows: int, columns: int, side: int) -> list[Image.Image]:
    """Resize an image to ``rows`` x ``columns`` squares of ``side`` pixels and cut these out, row by row."""
    page = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    return [page.crop((x, y, x + side, y + side)) for x, y in corners]


def join_tiles(tiles: Sequence[Image.Image], rows: int, columns: int) -> Image.Image:
    """Join tiles to one image, row by row: the inverse of :func:`cut_tiles`."""
    side = tiles[0].width
    page = Image.new("RGB", (columns * side, rows * side))
    for number, tile in enumerate(tiles):
        page.paste(tile, (number % columns * side, number // columns * side))
    return page


def heat(
    ax: Axes,
    image: Image.Image,
    values: Float[Tensor, "height width"],
    title: str = "",
    top: float | None = None,
) -> None:
    """Values over a grey image, each cell one token: the higher the value, the more orange.

    Args:
        ax: where to draw.
        image: of any size.
        values: one for each token.
        title: over the image.
        top: the value shown in full orange; without it ranks are shown, so that only the order counts.
    """
    values = values.cpu()
    extent = (0.0, float(image.width), float(image.height), 0.0)
    ax.imshow(np.asarray(image.convert("L")), cmap="gray", extent=extent, vmin=0, vmax=255)
    if top is None:
        rank = values.flatten().argsort().argsort().view(values.shape).float() / max(1, values.numel() - 1)
        strength = rank**1.5
    else:
        strength = (values / top).clamp(0, 1)
    opacity = 0.85 * strength.numpy()
    colour = np.broadcast_to(to_rgb(style.ORANGE), (*opacity.shape, 3))
    drawn = ax.imshow(np.dstack([colour, opacity]), extent=extent, interpolation="nearest")
    CELLS[drawn] = values.numpy().astype(np.float64)
    _remove_axes(ax, title)
