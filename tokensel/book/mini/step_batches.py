"""The batches of the small model's training: pages, cut into tiles, with labels and questions.

A batch is a function of (recipe, phase, step, worker) alone, so a killed run resumes to the
same weights, and other processes can prepare batches ahead.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from tokensel.book.mini.canvas import CELLS, GROWTH, ILLEGIBLE, OBJECTS, PAPERS, QA, Page
from tokensel.book.mini.packing import PackedQuestions, drills, pack_questions, tiles
from tokensel.book.mini.reading import print_page
from tokensel.book.mini.recipe import Recipe
from tokensel.book.mini.words import COLORS, SHAPES
from tokensel.book.mini.world import SIZES, draw_page

# names of the patch labels, and how many values each has besides 0, "nothing"
LABELS = {
    "letters": ILLEGIBLE,
    "shapes": len(SHAPES),
    "colors": len(COLORS),
    "objects": len(OBJECTS),
    "sizes": len(GROWTH) + 1,
    "papers": len(PAPERS),
}


@dataclass
class StepBatch:
    """One worker's share of one training step.

    Attributes:
        pixels: tiles, thumbnails first, page by page; those of print, which nothing is asked about, come
            last.
        labels: of the patches of each tile: those of ``LABELS``, and what stands before and after what they
            show.
        size: of the pages that are asked about, in pixels; ``None`` in the tower's phase.
        shrunk: whether the model's own compression is on.
        tasks: of these pages, in order.
        packed: their questions.
        drill: questions without an image.
        probed: whether the language model is also asked about every visual token.
        hidden: True where a patch is hidden from the tower; ``None`` where it sees all.
    """

    pixels: Float[Tensor, "tiles 3 height width"]
    labels: dict[str, Int[Tensor, "tiles cells"]]
    size: tuple[int, int] | None = None
    shrunk: bool = False
    tasks: tuple[str, ...] = ()
    packed: PackedQuestions | None = None
    drill: PackedQuestions | None = None
    hidden: Bool[Tensor, "tiles cells"] | None = None
    probed: bool = True

    def to(self, device: torch.device) -> "StepBatch":
        """The same on a device."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            labels={name: labels.to(device, non_blocking=True) for name, labels in self.labels.items()},
            packed=self.packed and self.packed.to(device),
            drill=self.drill and self.drill.to(device),
            hidden=None if self.hidden is None else self.hidden.to(device),
        )


class StepBatches(Dataset):
    """The batches of a range of steps; a map-style dataset, so that a ``DataLoader`` can prefetch."""

    def __init__(
        self,
        recipe: Recipe,
        phase: str,
        steps: range,
        visual: dict[tuple[tuple[int, int], bool], int],
        worker: int = 0,
        workers: int = 1,
    ):
        """
        Args:
            recipe: what is drawn.
            phase: "tower", "heads" (the same pages) or "language".
            steps: the steps whose batches are wanted.
            visual: visual tokens of a page, by its size and whether they are shrunk, if they ever are.
            worker, workers: which share of each step.
        """
        self.recipe, self.phase, self.steps, self.visual = recipe, phase, steps, visual
        self.worker, self.workers = worker, workers

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> StepBatch:
        step = self.steps[place]
        return self.answer_batch(step) if self.phase == "language" else self.tower_batch(step)

    def _rng(self, purpose: int, step: int) -> np.random.Generator:
        return np.random.default_rng([self.recipe.seed, purpose, step, self.worker])

    def pages(
        self,
        purpose: int,
        step: int,
        count: int,
        size: tuple[int, int] | None = None,
        oversample: dict[str, float] | None = None,
    ) -> tuple[tuple[str, ...], list[Page]]:
        """This worker's share of the ``count`` pages of ``step``: their tasks and themselves."""
        rng = np.random.default_rng([self.recipe.seed, purpose, step])
        weights = np.array(
            [weight * (oversample or {}).get(task, 1.0) for task, weight in self.recipe.weights.items()]
        )
        names = [
            str(name) for name in rng.choice(list(self.recipe.weights), count, p=weights / weights.sum())
        ]
        share = range(self.worker, count, self.workers)
        first = step * 1000 + 10**9 * (purpose + 100 * self.recipe.seed)  # no page is used twice
        return tuple(names[place] for place in share), [
            draw_page(names[place], "train", first + place, size) for place in share
        ]

    def tower_batch(self, step: int) -> StepBatch:
        """For the tower alone: pages of the world and pages of random text."""
        _, pages = self.pages(0, step, self.recipe.tower_pages)
        rng = self._rng(1, step)
        pages = [
            print_page(rng, SIZES[int(rng.integers(len(SIZES)))])
            if rng.random() < self.recipe.print_share
            else page
            for page in pages
        ]
        batch = StepBatch(torch.cat([tiles(page) for page in pages]), labels_of(pages))
        if self.recipe.hidden:
            cells = torch.from_numpy(rng.random((len(batch.pixels), CELLS * CELLS)))
            batch.hidden = cells < self.recipe.hidden
        return batch

    def answer_batch(self, step: int) -> StepBatch:
        """For all parts together: pages of one size with their questions, some random text, some drills."""
        recipe, stage = self.recipe, self.recipe.stage(step)
        sizes = np.random.default_rng([recipe.seed, 2, step])
        size = stage.sizes[int(sizes.integers(len(stage.sizes)))]
        shrunk = (size, True) in self.visual and bool(sizes.random() < recipe.shrunk)
        names, pages = self.pages(3, step, stage.pages(size), size, stage.oversample)
        rng = self._rng(4, step)
        asked = [
            _some(rng, page.questions, stage.questions) + _some(rng, page.practice, stage.practice)
            for page in pages
        ]
        packed = pack_questions(asked, self.visual[size, shrunk], rng, recipe.free, recipe.drill)
        printed = [
            print_page(rng, (128, 128))
            for _ in range(recipe.print_pages // self.workers if stage.tower else 0)
        ]
        drill = drills(rng, max(1, stage.drills // self.workers), 8) if stage.drills else None
        all_pages = pages + printed
        return StepBatch(
            torch.cat([tiles(page) for page in all_pages]),
            labels_of(all_pages),
            size,
            shrunk,
            names,
            packed,
            drill,
            probed=stage.probes,
        )


def _some(rng: np.random.Generator, questions: list[QA], most: int) -> list[QA]:
    """At most ``most`` of ``questions``, in random order."""
    return [questions[int(place)] for place in rng.permutation(len(questions))[:most]]


def labels_of(pages: list[Page]) -> dict[str, Int[Tensor, "tiles cells"]]:
    """The labels of every tile of ``pages``, by name."""
    names = (*LABELS, "before", "earlier", "leader", "follower")
    return {
        name: torch.from_numpy(np.concatenate([getattr(page, name) for page in pages])).flatten(1)
        for name in names
    }
