"""The evidence of a question: in how many visual tokens it lies, and how much of it a choice keeps."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.book.mini.canvas import PATCH, QA, Page
from tokensel.book.mini.oracle import patch_worth
from tokensel.vlm.encoded import Encoded

__all__ = ["COMPLETE", "READ", "Evidence", "evidence", "kept_evidence"]

COMPLETE = ("transcribe", "strings")
"""Tasks whose evidence is read from its first letter to its last."""
READ = (*COMPLETE, "forms", "charts", "posters", "scene_text", "words", "nonsense")
"""Tasks whose last box is read. Any part of what is before it will do: it says which text is asked for."""


@dataclass(frozen=True)
class Evidence:
    """Where the answer to a question is seen, in full-resolution visual tokens.

    Tokens of the thumbnail, padding and newlines are not counted.

    Attributes:
        tokens: that the evidence touches.
        share: their share of the page.
        cue: tokens of which any will do: of a colour, a pattern, the name of a field.
        letters: tokens that have to be read one by one. Both are counted where a cue surrounds its text.
    """

    tokens: int
    share: float
    cue: int
    letters: int


def evidence(task: str, page: Page, asked: QA) -> Evidence:
    """The evidence of a question of the small world, from its boxes alone; no model is needed.

    Args:
        task: a task of the small world.
        page: the page.
        asked: a question about it; where it is about the paper, the whole page is the evidence.
    """
    rows, columns = (-(-side // PATCH) for side in reversed(page.image.size))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    cue, letters = _parts(task, page, asked, (places + 0.5) / torch.tensor([rows, columns]))
    touched = cue | letters
    return Evidence(int(touched.sum()), float(touched.float().mean()), int(cue.sum()), int(letters.sum()))


def kept_evidence(
    encoded: Encoded, cells: Bool[Tensor, "packed"], task: str, asked: list[tuple[Page, QA]]
) -> Float[Tensor, "images 3"]:
    """The shares of each question's evidence that a choice of tokens keeps, at full resolution.

    Args:
        encoded: the batch, one image a question.
        cells: packed visual tokens that are kept, from :func:`tokensel.vlm.visual.choose_tokens`.
        task: a task of the small world.
        asked: page and question of each row.

    Returns:
        Of each question the shares of all evidence, of its cue and of its letters; 1 of what there is not.
    """
    layout = encoded.layout
    cell = layout.cell
    centres, image, kept = layout.centres, layout.image[cell], cells[cell]
    full = ~layout.thumbnail[cell]
    shares = []
    for number, (page, qa) in enumerate(asked):
        here = full & (image == number)
        cue, letters = _parts(task, page, qa, centres[here])
        shares += [
            kept[here][part].float().mean() if part.any() else torch.tensor(1.0, device=kept.device)
            for part in (cue | letters, cue, letters)
        ]
    return torch.stack(shares).view(-1, 3)


def _parts(
    task: str, page: Page, asked: QA, centres: Float[Tensor, "tokens 2"]
) -> tuple[Bool[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """Which tokens the cue touches, and which the letters."""
    scale = torch.tensor([page.image.width, page.image.height] * 2)
    boxes = (torch.tensor(asked.evidence or [(0, 0, *page.image.size)]) / scale).float().to(centres.device)
    read = len(boxes) if task in COMPLETE else int(task in READ)  # of them, the last ones

    def touched(part: Tensor) -> Tensor:
        if not len(part):
            return torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
        return patch_worth(part, torch.ones_like(centres[:, 0]), centres) > 0

    return touched(boxes[: len(boxes) - read]), touched(boxes[len(boxes) - read :])
