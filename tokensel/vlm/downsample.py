"""Down-sampling and pooling: the baselines that get fewer tokens from fewer pixels, or from averages."""

from math import isqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from tokensel.data.tower import run_tower
from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError, check_keep
from tokensel.vlm.choose import Choices
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.reduce import Reduced, assemble

__all__ = ["coarse_grid", "downsample", "pool"]


def coarse_grid(keep: float, side: int) -> tuple[int, int]:
    """Rows and columns of the coarser grid whose number of cells is nearest to ``keep * side**2``.

    Square, or with one column more than rows, where that is nearer (text runs along rows).
    """
    shapes = [(rows, cols) for rows in range(1, side + 1) for cols in (rows, rows + 1) if cols <= side]
    return min(
        shapes, key=lambda shape: (abs(shape[0] * shape[1] - keep * side * side), shape[0] != shape[1])
    )


def _spots(coarse: int, fine: int) -> Int[Tensor, "coarse"]:
    """The fine cells in which the centres of ``coarse`` cells of the same extent lie (all different)."""
    return ((torch.arange(coarse) * 2 + 1) * fine) // max(2 * coarse, 1)


def _pack_coarse(
    encoded: Encoded, image: int, grid: tuple[int, int], side: int
) -> tuple[Int[Tensor, "coarse"], Int[Tensor, "coarse"]]:
    """How one image's coarse cells are packed, and which of the full packed tokens each stands in for.

    Returns:
        Index of the coarse cell within the image's tiles (-1 = newline), and place in its full packing.
    """
    rows, cols = grid
    config, tiles = encoded.model.config, encoded.layout.tiles[image]
    base = torch.arange(rows * cols)
    base_place = (_spots(rows, side)[:, None] * side + _spots(cols, side)[None, :]).flatten()
    own = encoded.layout.image == image
    ends = int((~encoded.layout.cell[own]).sum())  # rows of the full map, each ended by a newline
    newline = torch.tensor([-1])
    if tiles == 1:
        return torch.cat([base, newline]), torch.cat([base_place, newline + 1 + side * side])
    assert encoded.image_sizes is not None  # there are images, so there are sizes
    size = encoded.image_sizes[image].tolist()
    high, wide = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    cells = torch.arange(rows * cols, tiles * rows * cols).view(high, wide, rows, cols)
    cells = cells.transpose(1, 2).reshape(1, high * rows, wide * cols)
    # The model's rule for cutting off the letterbox, given the image's shape in cells that may not be square.
    cells = unpad_image(cells, (size[0] * rows, size[1] * cols))[0]
    across = (int(own.sum()) - side * side) // max(ends, 1) - 1  # columns of the full map
    # rounding may leave the coarse map one row or column of letterbox more than the full one
    cells = cells[:ends, : max(across, 0)]
    down = _spots(cells.shape[0], ends)[:, None] * (across + 1)
    place = side * side + torch.cat([down + _spots(cells.shape[1], across), down + across], dim=1)
    cells = torch.cat([cells, newline.expand(len(cells), 1)], dim=1)
    return torch.cat([base, cells.flatten()]), torch.cat([base_place, place.flatten()])


def _shrink(pixels: Float[Tensor, "tiles 3 height width"], height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True)


@torch.no_grad()
def downsample(encoded: Encoded, keep: float, **choices: Any) -> Reduced:
    """Encode every tile again at a lower resolution, for about the fraction ``keep`` of the visual tokens.

    The tower reads the smaller tiles with interpolated position embeddings; thumbnail, letterbox and newlines
    are treated as at full size. With original positions a coarse token takes the place of the full-size token
    at its centre. The budget falls on whole grids: ``n_visual`` of the result is the number of tokens that
    came out.

    Args:
        encoded: the batch.
        keep: fraction of the tokens of a tile to approach, in (0, 1].
        choices: newline ("drop" leaves them out) and positions; budget and thumbnail have no effect here.

    Raises:
        TokenselError: ``keep`` outside (0, 1], an unknown choice, one that is about dropped tokens, or
            a model without tiles.
    """
    options, grid = _options(choices), _grid(encoded, keep)
    config = encoded.model.config
    patch, side = config.vision_config.patch_size, isqrt(encoded.layout.tokens)
    if grid == (side, side) or encoded.pixel_values is None:
        return _coarse(encoded, encoded.features.tokens, grid, options, grid[0] * grid[1])
    pixels = _shrink(encoded.pixel_values, grid[0] * patch, grid[1] * patch)
    drop_cls = config.vision_feature_select_strategy == "default"
    tokens, _ = run_tower(
        encoded.core.vision_tower, pixels, config.vision_feature_layer, drop_cls, interpolate=True
    )
    return _coarse(encoded, tokens, grid, options, grid[0] * grid[1])


@torch.no_grad()
def pool(encoded: Encoded, keep: float, **choices: Any) -> Reduced:
    """Average the features of every tile over a coarser grid, for about the fraction ``keep`` of the tokens.

    With ``keep=0.25`` and an even number of rows this is 2x2 pooling. Grids and places are those of
    :func:`downsample`; the encoder sees the image at full size.

    Args:
        encoded: the batch.
        keep: fraction of the tokens of a tile to approach, in (0, 1].
        choices: as for :func:`downsample`.

    Raises:
        TokenselError: ``keep`` outside (0, 1], an unknown choice, or one that is about dropped tokens.
    """
    options, grid, side = _options(choices), _grid(encoded, keep), isqrt(encoded.layout.tokens)
    tokens = encoded.features.tokens
    if grid != (side, side):
        maps = tokens.transpose(1, 2).unflatten(2, (side, side))  # [tiles, channels, rows, columns]
        pooled = torch.nn.functional.adaptive_avg_pool2d(maps.float(), grid)
        tokens = pooled.flatten(2).transpose(1, 2).to(tokens)
    return _coarse(encoded, tokens, grid, options, side * side)


def _options(choices: dict[str, Any]) -> Choices:
    options = Choices.of(choices)
    if options.attention != "plain" or options.dropped != "removed":
        raise TokenselError(
            f"attention is '{options.attention}' and dropped is '{options.dropped}': no token is dropped "
            "where the image is made smaller; leave both out"
        )
    return options


def _grid(encoded: Encoded, keep: float) -> tuple[int, int]:
    if not encoded.family.tiled:
        raise TokenselError(
            f"down-sampling and pooling know LLaVA's tiles, and {encoded.family.name} has none: give its "
            "processor a smaller size limit instead"
        )
    return coarse_grid(check_keep(keep), isqrt(encoded.layout.tokens))


def _coarse(
    encoded: Encoded,
    tokens: Float[Tensor, "tiles coarse channels"],
    grid: tuple[int, int],
    options: Choices,
    cells_read: int,
) -> Reduced:
    """The prompt with the tokens of coarser tiles in place of the full ones.

    Args:
        encoded: the batch.
        tokens: features of the coarser tiles.
        grid: their rows and columns.
        options: newline and positions.
        cells_read: tokens that the tower made of each tile.
    """
    core, layout = encoded.core, encoded.layout
    side = isqrt(layout.tokens)
    kept = torch.zeros_like(layout.cell)
    sources, tile, packed = [], 0, 0
    for image, tiles in enumerate(layout.tiles):
        source, place = _pack_coarse(encoded, image, grid, side)
        if options.newline == "drop":
            source, place = source[source >= 0], place[source >= 0]
        kept[packed + place] = True
        sources.append(torch.where(source < 0, source, source + tile * grid[0] * grid[1]))
        tile, packed = tile + tiles, packed + int((layout.image == image).sum())
    visual = core.image_newline.new_zeros(0, core.image_newline.shape[0])
    cells = layout.cell & kept
    if sources:
        source = torch.cat(sources)
        projected = core.multi_modal_projector(tokens.to(device_of(core.multi_modal_projector))).flatten(0, 1)
        source = source.to(projected.device)
        visual = torch.where(
            (source < 0)[:, None], core.image_newline.to(projected), projected[source.clamp(min=0)]
        )
    return Reduced(
        *assemble(encoded, kept, visual, options.positions),
        n_visual=encoded.per_row(cells),
        n_visual_full=encoded.n_visual,
        n_newline=encoded.per_row(kept & ~layout.cell),
        n_tiles=encoded.n_tiles,
        cells=cells_read,
    )
