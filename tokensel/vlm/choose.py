"""Which packed tokens stay: the budget per image or per tile, the thumbnail, the newlines."""

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.budget import fraction_count, top_count
from tokensel.utils.errors import TokenselError, check_count
from tokensel.vlm.layout import Layout

__all__ = ["Choices", "adaptive_cells", "add_newlines", "choose_cells"]


@dataclass(frozen=True)
class Choices:
    """What the paper leaves open about dropping visual tokens.

    The default of ``thumbnail`` is the literal reading of the paper: one competition among all visual tokens.
    The book's chapters pass ``thumbnail="last"``, which a measurement on the book's small model chose, alike
    for all scorers and on questions that no other result is counted on (``data/results/choices.csv``). The
    thumbnail of that model shows no letter; that of a real LLaVA does, so repeat the measurement before you
    pass it there.

    Attributes:
        budget: "image": one competition among all visual cells of an image; "tile": every tile keeps the same
            share of its own (the two keep equally many in total); "threshold": every cell stays that scores
            above one threshold, at which the scorer keeps the fraction on average over the images that it was
            trained on, so that full images keep more and empty ones less.
        thumbnail: "compete": its cells are treated like all others; "keep": they are kept first, and the
            high-resolution cells share what is left; "last": they share what the high-resolution cells leave;
            "drop": only high-resolution cells are kept, where there are any. All four keep the same number,
            as far as there are enough cells. Where a threshold decides, with ``keep=None`` or the budget
            "threshold", "last" equals "compete".
        neighbours: how many cells to each side of it in its row every cell brings along. A cell is then worth
            as much as the best of those around it, so that what stays are runs of a row, with fewer gaps in
            what is read as one. The budget is the same.
        newline: "keep" all, "drop" all, or "row": keep the newline of a row where a cell of the row stays.
        positions: "compact": kept tokens are renumbered without gaps; "original": every token keeps the
            position it has in the full sequence.
        attention: "plain"; "proportional": every kept cell counts for the dropped cells that are most like
            it, see :func:`~tokensel.vlm.dropped.token_weights`; "uniform": every kept cell of an image counts
            for equally many. What is added to the attention logits is no input of the model:
            ``vlm.generate`` adds it, and around ``model.generate`` :func:`~tokensel.vlm.bias.biased` does.
        strength: the factor of what is added, at least 0: 0 for nothing, 1 for as much attention as that many
            tokens would get.
        dropped: "removed" from the prompt, which saves time. The others are experiments, in which the prompt
            has its full length: "masked": dropped tokens stand there and no one attends to them; "blank" or
            "copied": something else stands in their place, see :func:`~tokensel.vlm.dropped.fill_dropped`.
    """

    budget: Literal["image", "tile", "threshold"] = "image"
    thumbnail: Literal["compete", "keep", "last", "drop"] = "compete"
    newline: Literal["keep", "drop", "row"] = "keep"
    positions: Literal["compact", "original"] = "original"
    attention: Literal["plain", "proportional", "uniform"] = "plain"
    strength: float = 1.0
    dropped: Literal["removed", "masked", "blank", "copied"] = "removed"
    neighbours: int = 0

    @classmethod
    def of(cls, values: "dict[str, Any] | Choices | None") -> "Choices":
        """Choices from a mapping; options that are missing take their default.

        Raises:
            TokenselError: an unknown option, or a value that is not one of its options.
        """
        if isinstance(values, Choices):
            return values
        given: dict[str, Any] = dict(values or {})
        options = {field.name: get_args(field.type) for field in fields(cls)}
        for name, value in given.items():
            if name not in options:
                raise TokenselError(f"'{name}' is not an option: choose among {', '.join(options)}")
            if name == "strength":
                given[name] = _check_strength(value)
            elif name == "neighbours":
                given[name] = check_count("neighbours", value, 2, least=0)
            elif value not in options[name]:
                raise TokenselError(f"{name} is '{value}': choose one of {', '.join(options[name])}")
        options = cls(**given)
        if options.neighbours and options.budget == "threshold":
            raise TokenselError(
                f"neighbours is {options.neighbours} and budget 'threshold': a threshold is measured on "
                "single cells; give the budget 'image' or 'tile', or no neighbours"
            )
        return options


def _check_strength(value: Any) -> float:
    """Return ``value`` as a ``float``; raises ``TokenselError`` unless it is a number of at least 0."""
    # NaN fails every comparison and lands here too; True is a number only to Python
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0.0 <= number < math.inf:
        raise TokenselError(f"strength is {value!r}: give a number of at least 0, such as 0.5")
    return number


def _quota(
    cells: Int[Tensor, "tiles"], image: Int[Tensor, "tiles"], amount: Int[Tensor, "images"]
) -> Int[Tensor, "tiles"]:
    """Share ``amount`` among the tiles of each image by their number of cells, to the last token.

    Rounding the running sum, rather than every share, makes the shares add up.
    """
    total = torch.zeros_like(amount).index_add_(0, image, cells)
    before_image = (total.cumsum(0) - total)[image]
    ratio = amount.double() / total.clamp(min=1)
    upto = cells.cumsum(0) - before_image
    share = torch.floor(torch.stack([upto, upto - cells]) * ratio[image] + 0.5)
    return (share[0] - share[1]).long()


def _best_around(layout: Layout, scores: Float[Tensor, "packed"], count: int) -> Float[Tensor, "packed"]:
    """The best score among each cell and ``count`` cells to each side of it in its row."""
    if not count:
        return scores
    together = layout.behind[1:]  # a cell and the one before it
    for _ in range(count):
        before, after = scores[:-1], scores[1:]
        further = scores.clone()
        further[1:] = torch.where(together, torch.maximum(after, before), after)
        further[:-1] = torch.where(together, torch.maximum(further[:-1], after), further[:-1])
        scores = further
    return scores


def _among_neighbours(layout: Layout, scores: Float[Tensor, "packed"], count: int) -> Tensor:
    """Scores that order the cells by the best around them, and equals among those by their own."""
    if not count or bool(scores.isnan().any()):  # a NaN has no order: who ranks the cells refuses it
        return scores
    around = _best_around(layout, scores, count)
    (_, around), (own_levels, own) = (values.unique(return_inverse=True) for values in (around, scores))
    return (around * len(own_levels) + own).unique(return_inverse=True)[1].double()


def _only_thumbnail(
    thumbnail: Bool[Tensor, "cells"], image: Int[Tensor, "cells"], images: int
) -> Bool[Tensor, "cells"]:
    """True for cells of images that only have a thumbnail: of a very thin image, unpadding leaves no row."""
    others = torch.bincount(image[~thumbnail], minlength=images)
    return others[image] == 0


def choose_cells(
    layout: Layout, scores: Float[Tensor, "packed"], keep: float, choices: Choices
) -> Bool[Tensor, "packed"]:
    """Keep the best ``max(1, round(keep * n))`` of the ``n`` visual cells of each image, newlines apart.

    Args:
        layout: where the packed tokens come from.
        scores: one for each packed token; those of newlines are ignored.
        keep: fraction of the visual cells of an image (after unpadding) to keep, in (0, 1].
        choices: budget, thumbnail and neighbours.

    Returns:
        True for kept cells; False at newlines.

    Raises:
        TokenselError: ``keep`` is not in (0, 1], or a score is NaN.
    """
    cell = layout.cell
    source, thumbnail, images = layout.source[cell], layout.thumbnail[cell], len(layout.tiles)
    image, slot, total = layout.slots
    amount = fraction_count(total, keep)
    if choices.budget != "tile":
        group, shape = image, (images, int(total.max()) if images else 0)
    else:
        group, slot, shape = (
            source // layout.tokens,
            source % layout.tokens,
            (sum(layout.tiles), layout.tokens),
        )

    def grid(values: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=values.dtype, device=values.device).index_put_((group, slot), values)

    def best(pool: Bool[Tensor, "cells"], amount: Int[Tensor, "images"]) -> Bool[Tensor, "rows slots"]:
        """The ``amount`` best of each image's cells in the pool."""
        members = grid(pool)
        if choices.budget == "tile":
            amount = torch.minimum(amount, torch.bincount(image[pool], minlength=images))
            amount = _quota(members.sum(1), layout.image_of_tile, amount)
        return top_count(ranked, amount, members)

    ranked = grid(_among_neighbours(layout, scores, choices.neighbours)[cell])
    if choices.thumbnail == "compete":
        chosen = best(torch.ones_like(thumbnail), amount)
    elif choices.thumbnail == "drop":
        chosen = best(~thumbnail | _only_thumbnail(thumbnail, image, images), amount)
    else:
        ahead = thumbnail if choices.thumbnail == "keep" else ~thumbnail
        first = torch.minimum(amount, torch.bincount(image[ahead], minlength=images))
        chosen = best(ahead, first) | best(~ahead, amount - first)
    kept = torch.zeros_like(cell)
    kept[cell] = chosen[group, slot]
    return kept


def adaptive_cells(
    layout: Layout, scores: Float[Tensor, "packed"], choices: Choices
) -> Bool[Tensor, "packed"]:
    """Keep every cell that scores above zero, however many that are; the thumbnail as ``choices`` say."""
    kept = (_best_around(layout, scores, choices.neighbours) > 0) & layout.cell
    if choices.thumbnail == "keep":
        return kept | layout.thumbnail
    if choices.thumbnail == "drop":
        cell = layout.cell
        alone = torch.zeros_like(cell)
        alone[cell] = _only_thumbnail(layout.thumbnail[cell], layout.image[cell], len(layout.tiles))
        return kept & (~layout.thumbnail | alone)
    return kept


def add_newlines(layout: Layout, kept: Bool[Tensor, "packed"], newline: str) -> Bool[Tensor, "packed"]:
    """The kept cells, and the newlines that stay with them: all, none, or those of rows with a kept cell."""
    ends = ~layout.cell
    if newline != "row":
        return kept | ends if newline == "keep" else kept
    row = ends.cumsum(0) - ends.long()  # rows of the whole batch, counted by the newlines that end them
    # the thumbnail stands before the first row of its image without being part of it
    hits = torch.bincount(row[kept & ~layout.thumbnail], minlength=int(ends.sum()) + 1)
    return kept | (ends & (hits[row] > 0))
