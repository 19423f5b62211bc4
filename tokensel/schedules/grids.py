"""The grids of a prompt's images: which columns hold the cells of each, row by row of the image."""

from dataclasses import dataclass, field
from math import isqrt

import torch
from jaxtyping import Int
from torch import Tensor

from tokensel.schedules.prompt import Prompt
from tokensel.utils.errors import TokenselError

__all__ = ["grids"]

Grid = Int[Tensor, "height width"]


@dataclass
class _Run:
    """Cells that stand together: a thumbnail, or a row of a map.

    Attributes:
        thumbnail: whether they are a thumbnail.
        apart: whether text stands in front of them.
        cells: their columns.
        ended: whether a newline ends them.
    """

    thumbnail: bool
    apart: bool
    cells: list[int] = field(default_factory=list)
    ended: bool = False


def grids(name: str, prompt: Prompt) -> list[list[Grid]]:
    """For each row of a batch the grids of its images: every thumbnail, and the map without its letterbox.

    A thumbnail and an image of one tile are square. A map has the rows that its newlines end. In a prompt
    that marks no newlines, each tile is a grid where the prompt names its tiles; else cells that stand
    together are a square, or one line.

    Args:
        name: of the schedule that asks, for the error message.
        prompt: what its columns hold, on the host.

    Raises:
        TokenselError: cells are missing, as after a scorer, so that what is left is no grid.
    """
    if prompt.tiles is not None:
        return [_tiles(name, tiles) for tiles in prompt.tiles]
    marked = prompt.newlines is not None
    return [_grids(name, _runs(prompt, row), marked) for row in range(len(prompt.visual))]


def _tiles(name: str, tiles: Int[Tensor, "length 3"]) -> list[Grid]:
    found: list[Grid] = []
    for tile in tiles[:, 0].unique().tolist():
        columns = (tiles[:, 0] == tile).nonzero()[:, 0]
        high, wide = tiles[columns[0], 1:].tolist()
        if tile > 0 and len(columns) != high * wide:
            raise _broken(name)
        if tile > 0:
            found.append(columns.view(high, wide))
    return found


def _broken(name: str) -> TokenselError:
    return TokenselError(
        f"{name}: cells of an image are missing in the prompt, so that it has no grid to read: leave out "
        "what drops tokens before the language model"
    )


def _runs(prompt: Prompt, row: int) -> list[_Run]:
    none = torch.zeros_like(prompt.visual)
    newlines = (none if prompt.newlines is None else prompt.newlines)[row].tolist()
    thumbnails = (none if prompt.thumbnail is None else prompt.thumbnail)[row].tolist()
    runs: list[_Run] = []
    before = -2
    for column in prompt.visual[row].nonzero()[:, 0].tolist():
        apart, thumbnail = column != before + 1, thumbnails[column]
        if apart or runs[-1].ended or runs[-1].thumbnail != thumbnail:
            runs.append(_Run(thumbnail, apart))
        if newlines[column]:
            runs[-1].ended = True
        else:
            runs[-1].cells.append(column)
        before = column
    return runs


def _grids(name: str, runs: list[_Run], marked: bool) -> list[Grid]:
    broken = _broken(name)
    found: list[Grid] = []
    tile, rows = 0, []  # cells of the thumbnail in front of the map, and rows of the map so far

    def square(cells: list[int]) -> Grid:
        side = isqrt(len(cells))
        if side * side == len(cells) > 0:
            return torch.tensor(cells).view(side, side)
        if marked:
            raise broken
        return torch.tensor([cells])

    def close() -> None:
        # rows behind a thumbnail are a map; rows of another length behind it are images of one tile, and so
        # is every row without a thumbnail
        width = len(rows[0]) if tile and rows else 0
        high = next((i for i, cells in enumerate(rows) if len(cells) != width), len(rows)) if width else 0
        if high:
            found.append(torch.tensor(rows[:high]))
        for cells in rows[high:]:
            if tile and len(cells) != tile:
                raise broken
            found.append(square(cells))
        rows.clear()

    for run in runs:
        if run.thumbnail or run.apart:
            close()
            tile = 0
        if run.thumbnail:
            found.append(square(run.cells))
            tile = len(run.cells)
        elif marked and not run.ended:
            raise broken
        else:
            rows.append(run.cells)
    close()
    return found
