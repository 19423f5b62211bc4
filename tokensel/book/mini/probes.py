"""What the small language model is asked on its way to an answer, on heads that are thrown away.

An answer of two or three tokens says little about where on a page things stand; a page has some 300 visual tokens, and
each can be asked. The language model learnt rows, columns and letters from this within 500 steps, and with them to find a
value by its key. To know a place at a visual token is not yet to know it where the answer begins: there the model had
taken over how far down a thing lies and never how far right, until it was asked there too.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tokensel.book.mini.canvas import CELLS, CHAIN_END, ILLEGIBLE, PATCH, TILE
from tokensel.book.mini.model import build_tokenizer
from tokensel.book.mini.recipe import tiles_of
from tokensel.book.mini.step_batches import StepBatch
from tokensel.book.mini.words import ALPHABET

ROWS = 2 * CELLS  # of patches on the largest page; the thumbnail's are counted behind them
MOST = 5  # things of one kind, counted
# what is asked -> the layer of the language model behind which it is asked, the number of answers, the loss's weight
ASKED = {
    "row": (2, ROWS + CELLS, 0.15),
    "column": (2, ROWS + CELLS, 0.15),
    "before": (3, len(ALPHABET) + 1, 0.15),
    "earlier": (3, len(ALPHABET) + 1, 0.15),
    "ordinal": (3, MOST + 1, 0.3),
    "leader": (3, CHAIN_END + 1, 0.15),
    "follower": (3, CHAIN_END + 1, 0.15),
}
# besides, how far right and down: one number each, so that two places can be compared by a difference; of a visual token
# itself, and, where an answer begins, of what is asked about; there also, what the letter that is to be said stands for
FAR, SPOT, NAMED = (2, 0.5), (4, 1.0), (4, 0.5)  # the layer, and the loss's weight
UNASKED = -100


def places(
    index: Int[Tensor, "packed"], thumbnail: bool
) -> tuple[Int[Tensor, "packed"], Int[Tensor, "packed"]]:
    """Row and column on the page of each visual token, ``UNASKED`` for a newline.

    Args:
        index: where the tokens come from, see :func:`tokensel.book.mini.packing.layout`.
        thumbnail: whether the first ``CELLS * CELLS`` of them are the thumbnail's.
    """
    order, first = torch.arange(len(index), device=index.device), CELLS * CELLS * thumbnail
    ends = index < 0
    row = ends.cumsum(0)
    column = order - 1 - torch.where(ends, order, first - 1).cummax(0).values
    small = order < first
    row = torch.where(small, ROWS + order // CELLS, row)
    column = torch.where(small, ROWS + order % CELLS, column)
    return row.masked_fill(ends, UNASKED), column.masked_fill(ends, UNASKED)


def middles(
    row: Int[Tensor, "packed"], column: Int[Tensor, "packed"], size: tuple[int, int]
) -> Float[Tensor, "packed 2"]:
    """How far right and down of the page's middle each visual token lies, from -1 to 1; a newline's means nothing."""
    height, width = size
    small = row >= ROWS  # the thumbnail's cells, as many on any page
    across = torch.where(small, 2 * (column - ROWS + 0.5) / CELLS, 2 * (column + 0.5) * PATCH / width)
    down = torch.where(small, 2 * (row - ROWS + 0.5) / CELLS, 2 * (row + 0.5) * PATCH / height)
    return torch.stack([across, down], 1) - 1


def ordinals(objects: Int[Tensor, "pages packed"]) -> Int[Tensor, "pages packed"]:
    """Of each thing, how many of its kind there are up to it; 0 where there is none."""
    counts = functional.one_hot(objects).cumsum(1).gather(2, objects[..., None])[..., 0]
    return (counts * (objects > 0)).clamp(max=MOST)


class Probes(nn.Module):
    """The heads, and their loss."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count))
                for name, (_, count, _) in ASKED.items()
            }
        )
        self.far = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))
        self.named = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(build_tokenizer())))

    def forward(
        self, states: list[Tensor], asked: list[Tensor], index: Int[Tensor, "packed"], batch: StepBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and of each question how many answers are right and how many were asked for.

        Args:
            states: ``[pages, packed, width]`` behind each layer, the embeddings first.
            asked: ``[pages, text, width]``, the same of the questions.
            index: where the visual tokens come from.
            batch: what they show, and the questions.
        """
        thumbnail, pages = batch.size != (TILE, TILE), len(batch.packed.ids)
        large = (index >= CELLS * CELLS * thumbnail).expand(
            pages, -1
        )  # things are counted where they are seen best

        def shown(name: str) -> Tensor:
            cells = batch.labels[name][: pages * tiles_of(batch.size)].reshape(pages, -1)
            return cells[:, index.clamp(min=0)]

        letters, objects = shown("letters"), shown("objects") * large
        legible = large & (letters > 0) & (letters < ILLEGIBLE)
        row, column = places(index, thumbnail)
        truth = {
            "row": row.expand(pages, -1),
            "column": column.expand(pages, -1),
            "before": shown("before").masked_fill(~legible, UNASKED),
            "earlier": shown("earlier").masked_fill(~legible, UNASKED),
            "ordinal": ordinals(objects).masked_fill(objects == 0, UNASKED),
            **{name: shown(name).masked_fill(shown(name) == 0, UNASKED) for name in ("leader", "follower")},
        }
        far = (self.far(states[FAR[0]]).float() - middles(row, column, batch.size)).square().mean(-1)
        loss, counts = FAR[1] * far[:, index >= 0].mean(), {}
        spots = batch.packed.spots
        there, truly = ~spots.isnan(), spots.nan_to_num()
        said = self.far(asked[SPOT[0]]).float()
        loss = loss + SPOT[1] * ((said - truly).square() * there).sum() / there.sum().clamp(min=1)
        for place, name in enumerate(("across", "down")):
            clear = truly[..., place].abs() > 0.1  # 0 where nothing is asked
            counts[name] = torch.stack(
                [((said[..., place] * truly[..., place] > 0) & clear).sum(), clear.sum()]
            )
        wrong, counts["named"] = _judge(self.named(asked[NAMED[0]]), batch.packed.named)
        loss = loss + NAMED[1] * wrong
        for name, (layer, _, weight) in ASKED.items():
            wrong, counts[name] = _judge(self.heads[name](states[layer]), truth[name])
            loss = loss + weight * wrong
        return loss, counts


def _judge(
    said: Float[Tensor, "pages tokens answers"], truth: Int[Tensor, "pages tokens"]
) -> tuple[Tensor, Tensor]:
    """Mean loss of what is said where something is asked (0 if nothing is), and how much is right of how much."""
    said, asked = said.float(), truth != UNASKED
    every = functional.cross_entropy(
        said.flatten(0, 1), truth.flatten(), ignore_index=UNASKED, reduction="sum"
    )
    count = asked.sum()
    return every / count.clamp(min=1), torch.stack([((said.argmax(-1) == truth) & asked).sum(), count])
