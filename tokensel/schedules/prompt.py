"""What each column of a prompt holds, as far as a schedule has to know it."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokensel.utils.errors import TokenselError

__all__ = ["Prompt"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """The columns of a batch of prompts, padded on the left.

    Attributes:
        attention_mask: 1 at real tokens, 0 at padding.
        visual: True at visual tokens: cells, and the newlines that end the rows of a map of cells.
        newlines: True at those newlines; ``None`` where there are none.
        thumbnail: True at the cells of a thumbnail, which belong to no row of the map; ``None`` where there
            are none.
        tiles: for a model without newlines the tile of each cell: its number in the batch from 1 on, and the
            tile's rows and columns; 0 elsewhere. ``None`` where newlines mark the rows, or nothing does.

    Raises:
        TokenselError: the prompt is padded on the right, or empty.
    """

    attention_mask: Int[Tensor, "rows length"]
    visual: Bool[Tensor, "rows length"]
    newlines: Bool[Tensor, "rows length"] | None = None
    thumbnail: Bool[Tensor, "rows length"] | None = None
    tiles: Int[Tensor, "rows length 3"] | None = None

    def on_host(self) -> "Prompt":
        """The same on the host, where a schedule chooses: reading a tensor there makes nobody wait.

        Raises:
            TokenselError: the prompt is padded on the right, or empty.
        """
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        host = replace(self, **{name: None if t is None else t.cpu() for name, t in tensors.items()})
        # the next token is predicted from the last column, so that column has to be a token
        if host.visual.shape[1] == 0 or not bool(host.attention_mask[:, -1].all()):
            raise TokenselError("a prompt ends in padding, or is empty: pad the prompts on the left")
        return host

    def repeat(self, times: int) -> "Prompt":
        """Each row ``times`` times, as ``generate`` repeats a prompt for ``num_return_sequences``."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{n: None if t is None else t.repeat_interleave(times, 0) for n, t in tensors.items()},
        )

    def gather(self, order: Int[Tensor, "rows left"], real: Bool[Tensor, "rows left"]) -> "Prompt":
        """The columns ``order`` of each row; padding where ``real`` is False."""

        def left(marks: Tensor | None) -> Tensor | None:
            return None if marks is None else marks.gather(1, order) & real

        tiles = self.tiles
        if tiles is not None:
            tiles = tiles.gather(1, order[..., None].expand(-1, -1, 3)) * real[..., None]
        visual = self.visual.gather(1, order) & real
        return Prompt(real.long(), visual, left(self.newlines), left(self.thumbnail), tiles)

    @property
    def real(self) -> Bool[Tensor, "rows length"]:
        """True at real tokens."""
        return self.attention_mask.bool()

    @property
    def cells(self) -> Bool[Tensor, "rows length"]:
        """True at visual tokens that are no newlines: what a fraction to keep counts."""
        return self.visual if self.newlines is None else self.visual & ~self.newlines

    @property
    def map_cells(self) -> Bool[Tensor, "rows length"]:
        """True at the cells of the map, without those of the thumbnail."""
        return self.cells if self.thumbnail is None else self.cells & ~self.thumbnail

    @property
    def map_row(self) -> Int[Tensor, "rows length"]:
        """Number of the row of the map that a column belongs to, if it is a cell of the map or a newline."""
        if self.newlines is None:
            return torch.zeros_like(self.attention_mask, dtype=torch.long)
        # a newline ends its row, so a column's row is the number of newlines before it
        return self.newlines.cumsum(1) - self.newlines.long()
