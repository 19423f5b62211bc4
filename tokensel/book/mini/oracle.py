"""Scorers that know where the small world drew things: limits for what a choice of tokens can reach.

A real scorer reads features. These read the page: the world can draw it again from the question's id, and
remembers what it drew where. One knows the question and keeps its evidence; the other keeps all drawings.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.benchmarks.questions import stable_keys
from tokensel.book.mini.canvas import QA, Box, Page
from tokensel.book.mini.suite import ROWS, asked_page
from tokensel.book.mini.words import SPLITS
from tokensel.book.mini.world import CONTROLS, DRAW
from tokensel.data.features import Features
from tokensel.scorers import SCORERS
from tokensel.utils.errors import TokenselError
from tokensel.utils.hashing import mix

__all__ = ["DrawnScorer", "OracleScorer", "patch_worth", "register_oracles"]


class OracleScorer:
    """Keeps the patches of what has to be seen to answer the question that is asked.

    A patch is worth the share of it that the evidence covers. Patches without evidence follow by their
    distance from it, so that a larger budget keeps its surroundings. Of equals those of the map come before
    those of the thumbnail. Where the question is about the paper, every patch is evidence.
    """

    name = "oracle"
    needs_cls_attention = False
    scope = "image"
    adaptive = False

    def __call__(self, features: Features) -> Float[Tensor, "images tokens"]:
        """Scores in (-2, 1]: above 0 where there is evidence. A row is one image.

        Raises:
            TokenselError: the features carry no keys or places, or a key that is no question's of the suite.
        """
        if features.keys is None or features.centre is None or features.tile is None:
            raise TokenselError(
                f"scorer '{self.name}' needs Features.keys, .tile and .centre: score an encoded batch of the "
                "small world's questions, with the keys of their ids"
            )
        known, device = _questions(), features.tokens.device
        rows = []
        tiles = features.tile.cpu()
        if features.valid is not None:
            tiles = tiles.masked_fill(~features.valid.cpu(), -1)  # padding lies nowhere
        for key, tile, centre in zip(features.keys.tolist(), tiles, features.centre.cpu()):
            if key not in known:
                raise TokenselError(
                    f"scorer '{self.name}' knows the first {ROWS} questions of the small world alone: ask "
                    "those of tokensel.book.mini.suite"
                )
            page, asked = asked_page(*known[key])
            # boxes as fractions of the page, which is what the centres of patches are
            scale = torch.tensor([page.image.width, page.image.height] * 2)
            boxes = torch.tensor(self.boxes(page, asked) or [(0, 0, *page.image.size)]) / scale
            rows.append(patch_worth(boxes.float(), tile, centre))
        return torch.stack(rows).to(device)

    def boxes(self, page: Page, asked: QA) -> list[Box]:
        """What is kept of a page, in its pixels."""
        return asked.evidence


class DrawnScorer(OracleScorer):
    """Keeps the patches in which anything is drawn, whatever is asked."""

    name = "drawn"

    def boxes(self, page: Page, asked: QA) -> list[Box]:
        """All boxes of the page."""
        return page.drawn


def register_oracles() -> None:
    """Make methods of the two: ``oracle`` and ``drawn`` can be evaluated like every scorer from here on."""
    SCORERS.update({scorer.name: scorer for scorer in (OracleScorer, DrawnScorer)})


@cache
def _questions() -> dict[int, tuple[str, str, int]]:
    """Task, split and index of every question by the key that an evaluation gives its image."""
    tasks = (*DRAW, *CONTROLS)
    places = [(task, split, index) for task in tasks for split in SPLITS for index in range(ROWS)]
    keys = torch.tensor(stable_keys([f"{task}-{split}-{index}" for task, split, index in places]))
    # the first tile of the first image of a row
    return dict(zip(mix(mix(keys, 0), 0).tolist(), places, strict=True))


def patch_worth(
    boxes: Float[Tensor, "boxes 4"], tile: Tensor, centre: Float[Tensor, "tokens 2"]
) -> Float[Tensor, "tokens"]:
    """The share of each patch that boxes cover; where that is 0, less than 0 by the distance from them."""
    half = torch.full_like(centre, 0.5)
    for part in (tile == 0, tile > 0):  # the patches of the thumbnail are larger
        for axis in (0, 1):
            places = centre[part, axis].unique()
            gaps = places.diff()[places.diff() > 1e-4]
            half[part, axis] = float(gaps.min()) / 2 if len(gaps) else 0.5
    low, high = (centre - half).flip(1)[:, None], (centre + half).flip(1)[:, None]  # [tokens, 1, (x, y)]
    sides = torch.minimum(high, boxes[:, 2:]) - torch.maximum(low, boxes[:, :2])  # [tokens, boxes, 2]
    area = sides.clamp(min=0).prod(-1) / (high - low).prod(-1)
    away = (-sides).clamp(min=0).square().sum(-1).sqrt().amin(1)
    covered = area.sum(1).clamp(max=1)
    worth = torch.where(covered > 0, covered, -away)
    return worth - 1e-3 * (tile == 0) * bool((tile > 0).any())
