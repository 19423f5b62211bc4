"""Auxiliary losses inside the small language model, by probing heads that are discarded after training.

An answer of two or three tokens says little about where on a page things stand; a page has some 300 visual
tokens, and each can be asked. The language model learnt rows, columns and letters from this within 500 steps,
and with them to find a value by its key. To know a place at a visual token is not yet to know it where the
answer begins: there the model had taken over how far down a thing lies and never how far right, until it was
asked there too.
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
MOST = 5  # largest count of one kind
# what is asked -> the layer of the language model behind which it is asked, the number of answers, the loss's
# weight
ASKED = {
    "row": (2, ROWS + CELLS, 0.15),
    "column": (2, ROWS + CELLS, 0.15),
    "before": (3, len(ALPHABET) + 1, 0.15),
    "earlier": (3, len(ALPHABET) + 1, 0.15),
    "ordinal": (3, MOST + 1, 0.3),
    "leader": (3, CHAIN_END + 1, 0.15),
    "follower": (3, CHAIN_END + 1, 0.15),
}
# besides, how far right and down: one number each, so that two places can be compared by a difference; of a
# visual token itself, and, where an answer begins, of what is asked about; there also, what the letter that
# is to be said stands for
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
    """Offset of each visual token from the page's middle, right and down, -1 to 1; newlines have none."""
    height, width = size
    small = row >= ROWS  # the thumbnail's cells, as many on any page
    across = torch.where(small, 2 * (column - ROWS + 0.5) / CELLS, 2 * (column + 0.5) * PATCH / width)
    down = torch.where(small, 2 * (row - ROWS + 0.5) / CELLS, 2 * (row + 0.5) * PATCH / height)
    return torch.stack([across, down], 1) - 1


def ordinals(objects: Int[Tensor, "pages packed"]) -> Int[Tensor, "pages packed"]:
    """For each object, how many of its kind there are up to and including it; 0 where there is none."""
    counts = functional.one_hot(objects).cumsum(1).gather(2, objects[..., None])[..., 0]
    return (counts * (objects > 0)).clamp(max=MOST)


class Probes(nn.Module):
    """The probing heads and their loss."""

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
        """The loss, and for each probe how many predictions are right, and of how many.

        Args:
            states: ``[pages, packed, width]`` at the visual tokens after each layer, the embeddings first.
            asked: ``[pages, text, width]``, the same at the questions.
            index: where the visual tokens come from.
            batch: labels and questions of the second phase.
        """
        assert batch.packed is not None and batch.size is not None, "a batch of the second phase has both"
        packed, size = batch.packed, batch.size
        thumbnail, pages = size != (TILE, TILE), len(packed.ids)
        large = (index >= CELLS * CELLS * thumbnail).expand(
            pages, -1
        )  # objects are counted where they are largest

        def labels(name: str) -> Tensor:
            cells = batch.labels[name][: pages * tiles_of(size)].reshape(pages, -1)
            return cells[:, index.clamp(min=0)]

        letters, objects = labels("letters"), labels("objects") * large
        legible = large & (letters > 0) & (letters < ILLEGIBLE)
        row, column = places(index, thumbnail)
        truth = {
            "row": row.expand(pages, -1),
            "column": column.expand(pages, -1),
            "before": labels("before").masked_fill(~legible, UNASKED),
            "earlier": labels("earlier").masked_fill(~legible, UNASKED),
            "ordinal": ordinals(objects).masked_fill(objects == 0, UNASKED),
            **{name: labels(name).masked_fill(labels(name) == 0, UNASKED) for name in ("leader", "follower")},
        }
        far = (self.far(states[FAR[0]]).float() - middles(row, column, size)).square().mean(-1)
        loss, counts = FAR[1] * far[:, index >= 0].mean(), {}
        spots = packed.spots
        asked_here, target = ~spots.isnan(), spots.nan_to_num()
        predicted = self.far(asked[SPOT[0]]).float()
        loss = loss + SPOT[1] * ((predicted - target).square() * asked_here).sum() / asked_here.sum().clamp(
            min=1
        )
        for axis, name in enumerate(("across", "down")):
            clear = target[..., axis].abs() > 0.1  # 0 where nothing is asked
            counts[name] = torch.stack(
                [((predicted[..., axis] * target[..., axis] > 0) & clear).sum(), clear.sum()]
            )
        wrong, counts["named"] = _probe_loss(self.named(asked[NAMED[0]]), packed.named)
        loss = loss + NAMED[1] * wrong
        for name, (layer, _, weight) in ASKED.items():
            wrong, counts[name] = _probe_loss(self.heads[name](states[layer]), truth[name])
            loss = loss + weight * wrong
        return loss, counts


def _probe_loss(
    logits: Float[Tensor, "pages tokens answers"], truth: Int[Tensor, "pages tokens"]
) -> tuple[Tensor, Tensor]:
    """Mean loss where something is asked (0 if nothing is), and counts of right and of all predictions."""
    logits, asked = logits.float(), truth != UNASKED
    total = functional.cross_entropy(
        logits.flatten(0, 1), truth.flatten(), ignore_index=UNASKED, reduction="sum"
    )
    count = asked.sum()
    return total / count.clamp(min=1), torch.stack([((logits.argmax(-1) == truth) & asked).sum(), count])
