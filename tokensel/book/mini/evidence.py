"""The evidence of a question: in how many visual tokens it lies, and how much of it a choice keeps."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.book.mini.canvas import PATCH, QA, Page
from tokensel.book.mini.oracle import patch_worth
from tokensel.vlm.encoded import Encoded

__all__ = ["COMPLETE", "Evidence", "evidence", "kept_evidence"]

COMPLETE = ("forms", "charts", "posters", "scene_text", "transcribe", "words", "nonsense", "strings")
"""Tasks whose evidence has to be seen completely: letters. Of a colour or a pattern, any part will do."""


@dataclass(frozen=True)
class Evidence:
    """Where the answer to a question is seen.

    Attributes:
        tokens: full-resolution visual tokens that the evidence touches; tokens of the thumbnail, padding and
            newlines are not counted.
        share: their share of the page.
        complete: whether all of it has to be seen.
    """

    tokens: int
    share: float
    complete: bool


def evidence(task: str, page: Page, asked: QA) -> Evidence:
    """The evidence of a question of the small world, from its boxes alone; no model is needed.

    Args:
        task: a task of the small world.
        page: the page.
        asked: a question about it; where it is about the paper, the whole page is the evidence.
    """
    rows, columns = (-(-side // PATCH) for side in reversed(page.image.size))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    centre = (places + 0.5) / torch.tensor([rows, columns])
    touched = patch_worth(_boxes(page, asked), torch.ones(len(centre)), centre) > 0
    return Evidence(int(touched.sum()), float(touched.float().mean()), task in COMPLETE)


def kept_evidence(
    encoded: Encoded, cells: Bool[Tensor, "packed"], asked: list[tuple[Page, QA]]
) -> Float[Tensor, "images"]:
    """The share of each question's evidence that a choice of tokens keeps, at full resolution.

    Args:
        encoded: the batch, one image a question.
        cells: packed visual tokens that are kept, from :func:`tokensel.vlm.visual.choose_tokens`.
        asked: page and question of each row.
    """
    layout = encoded.layout
    cell = layout.cell
    centres, image, kept = layout.centres, layout.image[cell], cells[cell]
    full = ~layout.thumbnail[cell]
    shares = []
    for number, (page, qa) in enumerate(asked):
        here = full & (image == number)
        touched = patch_worth(_boxes(page, qa), torch.ones(int(here.sum())), centres[here]) > 0
        shares.append(kept[here][touched].float().mean())
    return torch.stack(shares)


def _boxes(page: Page, asked: QA) -> Float[Tensor, "boxes 4"]:
    """The boxes of the evidence as fractions of the page."""
    scale = torch.tensor([page.image.width, page.image.height] * 2)
    return (torch.tensor(asked.evidence or [(0, 0, *page.image.size)]) / scale).float()
