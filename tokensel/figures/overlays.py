"""Kept tokens over a picture: cells of dropped tokens are veiled, as in the paper's Fig. 1."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tokensel.errors import TokenselError

VEIL = (96, 104, 122)  # a cool grey: neither paper, nor ink, nor a colour of the mini world's words
STRENGTH = 0.86  # how much of a dropped cell the veil hides


def page_mask(
    kept: Bool[Tensor, "tiles tokens"], rows: int, columns: int, grid: tuple[int, int]
) -> Bool[Tensor, "height width"]:
    """Join the masks of tiles that were cut from one picture, left to right and top to bottom, to its own mask.

    Args:
        kept: True = kept, one row a tile.
        rows: tiles from top to bottom.
        columns: tiles from left to right.
        grid: rows and columns of tokens within a tile.

    Raises:
        TokenselError: the numbers do not multiply to the shape of ``kept``.
    """
    height, width = grid
    if kept.shape != (rows * columns, height * width):
        raise TokenselError(
            f"masks of shape {tuple(kept.shape)} are not {rows} x {columns} tiles of {height} x {width} tokens"
        )
    return kept.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)


def veiled(image: Image.Image, kept: Bool[Tensor, "height width"] | None) -> UInt8[np.ndarray, "y x 3"]:
    """The picture with the cells of dropped tokens veiled.

    Args:
        image: any size; each token covers an equal cell of it, to the nearest pixel.
        kept: True = kept; ``None`` leaves the picture as it is.
    """
    pixels = np.asarray(image.convert("RGB")).copy()
    if kept is None:
        return pixels
    cells = kept.cpu().numpy()
    y = np.arange(pixels.shape[0]) * cells.shape[0] // pixels.shape[0]
    x = np.arange(pixels.shape[1]) * cells.shape[1] // pixels.shape[1]
    dropped = ~cells[y[:, None], x[None, :]]
    mixed = (1 - STRENGTH) * pixels[dropped] + STRENGTH * np.array(VEIL)
    pixels[dropped] = mixed.round().astype(np.uint8)
    return pixels


def show(ax: Axes, image: Image.Image, kept: Bool[Tensor, "height width"] | None = None, title: str = "") -> None:
    """Draw the picture with its veil into ``ax``, without ticks."""
    ax.imshow(veiled(image, kept), interpolation="nearest" if max(image.size) < 200 else "antialiased")
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def gallery(
    rows: Sequence[tuple[str, Image.Image, Sequence[Bool[Tensor, "height width"]]]],
    titles: Sequence[str],
    width: float = 7.5,
) -> Figure:
    """One line a picture: as it is, then under each mask. The layout of Fig. 1, for any number of pictures.

    Args:
        rows: name, picture and masks of each line; every line has as many masks as there are ``titles``.
        titles: what the masks are, such as ``["random", "selector"]``.
        width: of the figure in inches.
    """
    columns = 1 + len(titles)
    side = width / columns
    heights = [side * image.height / image.width for _, image, _ in rows]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(width, sum(heights) + 0.3), squeeze=False, height_ratios=heights
    )
    for number, (line, (name, image, masks)) in enumerate(zip(axes, rows)):
        for ax, mask, title in zip(line, (None, *masks), ("all tokens", *titles), strict=True):
            show(ax, image, mask, "" if number else title)
        line[0].set_ylabel(name)
    return figure


def anyres(
    thumbnail: Image.Image,
    page: Image.Image,
    thumbnail_kept: Bool[Tensor, "rows columns"],
    page_kept: Bool[Tensor, "height width"],
    tiles: tuple[int, int],
    width: float = 7.5,
) -> Figure:
    """What a LLaVA-NeXT reads of one image: its thumbnail and its high-resolution tiles, dropped tokens veiled.

    Args:
        thumbnail: the whole image as the encoder's first tile shows it.
        page: the image on its canvas of tiles, letterbox bars included.
        thumbnail_kept: True = kept, one value a token of the thumbnail.
        page_kept: True = kept, one value a token of all tiles joined, see :func:`page_mask`.
        tiles: rows and columns of tiles; their borders are drawn.
        width: of the figure in inches.
    """
    ratio = page.width / page.height
    height = width / (1.25 * ratio + 0.5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(width, height), width_ratios=[0.5, 1.25 * ratio])
    show(left, thumbnail, thumbnail_kept, "thumbnail")
    show(right, page, page_kept, f"{tiles[0]} x {tiles[1]} tiles")
    for k in range(1, tiles[0]):
        right.axhline(k * page.height / tiles[0] - 0.5, color="white", linewidth=0.8)
    for k in range(1, tiles[1]):
        right.axvline(k * page.width / tiles[1] - 0.5, color="white", linewidth=0.8)
    return figure


def heat(ax: Axes, image: Image.Image, scores: Tensor, title: str = "") -> None:
    """Scores as a transparent map over a grey picture, each cell one token [height, width]; bright = high."""
    grey = np.asarray(image.convert("L"))
    extent = (0, image.width, image.height, 0)
    ax.imshow(grey, cmap="gray", extent=extent, vmin=0, vmax=255)
    rank = scores.flatten().argsort().argsort().view(scores.shape).to(torch.float32) / max(1, scores.numel() - 1)
    ax.imshow(rank.cpu().numpy(), cmap="cividis", alpha=0.65, extent=extent, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)


def cut_tiles(image: Image.Image, rows: int, columns: int, side: int) -> list[Image.Image]:
    """Resize a picture to ``rows`` x ``columns`` squares of ``side`` pixels and cut these out, row by row."""
    page = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    return [page.crop((x, y, x + side, y + side)) for x, y in corners]
