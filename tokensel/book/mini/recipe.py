"""The recipe of the small models: steps, sizes and learning rates of their training.

1. The vision tower alone learns from dense labels what each patch shows, and its CLS token what the tile
   holds, on the world's pages and on pages full of random print, from which letters are learnt ten times as
   fast. With ``Recipe.hidden`` it learns from pixels alone, as a masked autoencoder, and no label reaches it.
2. Projector and language model join it and learn to answer, from single tiles to full pages, on which the
   tower goes on with its labels. A model that starts on full pages learns nothing for a long time: finding
   and copying first appear in short contexts. Exercises about the same page (``Page.practice``) stand beside
   the questions, and on its way the language model is asked about every visual token: where it lies, which
   letters stand before it, how many of its kind there were (:mod:`tokensel.book.mini.probes`).

No visual token is ever dropped here: the paper's claim is about models that have never seen a reduced image.
"""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tokensel.book.mini.canvas import TILE
from tokensel.book.mini.world import DRAW, SIZES

ONE_TILE = ((TILE, TILE),)
HARD = {"science": 4.0, "mixed": 3.0, "attributes": 2.0, "diagrams": 1.5, "charts": 1.5}
MANY = {
    "science": 2.0,
    "attributes": 2.0,
    "diagrams": 2.0,
    "forms": 1.7,
    "describe": 1.3,
    "transcribe": 1.3,
    "posters": 1.2,
}
MANY |= {"charts": 0.9, "mixed": 0.8, "scene_text": 0.8}
STRIPS = ((TILE, 2 * TILE), (2 * TILE, TILE))


def tiles_of(size: tuple[int, int]) -> int:
    """Tiles of a page of ``size``, with the thumbnail of a page of several tiles."""
    tiles = -(-size[0] // TILE) * -(-size[1] // TILE)
    return tiles + (tiles > 1)


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: ``steps`` batches of about ``tiles`` tiles, each with pages of one size."""

    name: str
    steps: int
    tiles: int
    sizes: tuple[tuple[int, int], ...]
    questions: int = 4  # at most, on a page
    practice: int = 4  # exercises about the same page beside them, at most
    tower: bool = True  # whether the vision tower is trained too
    probes: bool = True  # whether the language model is also asked about every visual token
    drills: int = 0  # rows of eight questions without an image: which letter stands for a given option?
    oversample: dict[str, float] = field(default_factory=dict)  # by how much a task is drawn more often

    def pages(self, size: tuple[int, int]) -> int:
        """How many pages of ``size`` make a batch."""
        return max(1, self.tiles // tiles_of(size))


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, except for the machine's arithmetic."""

    seed: int = 0
    tower_steps: int = 1600
    tower_pages: int = 24
    head_steps: int = 160  # in place of the tower's steps, when training starts from a finished model
    head_rate: float = 1e-2
    print_share: float = 0.6  # of the pages in the first phase: pages of random text
    # Share of a tile's patches that are hidden from the tower in the first phase, which then learns to
    # reconstruct pixels and sees no label; it stays as it is in the second. 0: the tower learns from labels.
    hidden: float = 0.0
    stages: tuple[Stage, ...] = (
        Stage("tile", 1800, 48, ONE_TILE, tower=False),
        Stage("tile, with tower", 900, 40, ONE_TILE, oversample=HARD),
        Stage("mixed", 800, 64, (*ONE_TILE, *STRIPS, *SIZES[:4]), 6, drills=12, oversample=HARD),
        Stage("page", 5000, 80, (SIZES[0], *SIZES), 8, 6, drills=2, oversample=MANY),
    )
    rate: float = 3e-3  # of Muon; half of it for AdamW beside it
    joint_rate: float = 5e-4  # of the tower's Muon and AdamW, in the second phase
    decay: float = 0.05  # of weights, but for the language model's embeddings and norms
    warmup: int = 60
    tower_cooldown: float = 0.4  # share of the first phase over which the rate falls to zero
    cooldown: float = 1.0  # the same of the last stage
    print_pages: int = 2  # full of print, beside the pages of each step of the second phase
    free: float = 0.3  # share of multiple-choice questions that are asked without options
    drill: float = 0.15  # share of them that ask for the letter of a given option
    shrunk: float = (
        0.5  # share of the steps in which a model that shrinks large pages does so; LLaVA-NeXT never does
    )
    weights: dict[str, float] = field(
        default_factory=lambda: (
            dict.fromkeys(DRAW, 1.0)
            | {"charts": 1.5, "diagrams": 1.5, "mixed": 1.5, "attributes": 1.5, "describe": 0.6}
        )
    )

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """The recipe in a model's ``recipe.json``.

        Models trained by version 0.1 call ``oversample`` ``oftener``; their files stay as they are, since
        recorded results identify a model by the content of its folder.
        """
        text = Path(path).read_text(encoding="utf-8").replace('"oftener":', '"oversample":')
        content: dict[str, Any] = json.loads(text)
        # the file has machine settings too, and an older one lacks what came later
        options = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        for stage in options["stages"]:
            stage["sizes"] = tuple((height, width) for height, width in stage["sizes"])
        options["stages"] = tuple(Stage(**stage) for stage in options["stages"])
        return cls(**options)

    def scaled(self, times: float = 1.0, batch: float = 1.0) -> "Recipe":
        """The same recipe with ``times`` as many steps and ``batch`` times as many pages a step."""
        return replace(
            self,
            tower_steps=round(self.tower_steps * times),
            tower_pages=round(self.tower_pages * batch),
            print_pages=round(self.print_pages * batch),
            stages=tuple(
                replace(
                    stage,
                    steps=round(stage.steps * times),
                    tiles=round(stage.tiles * batch),
                    drills=round(stage.drills * batch),
                )
                for stage in self.stages
            ),
        )

    @property
    def steps(self) -> int:
        """Steps of the second phase, over all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that ``step`` of the second phase belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def scale(self, step: int, total: int, cooling: int) -> float:
        """Factor of the learning rate: warm-up, constant, then linear to 0 in the last ``cooling`` steps."""
        return min(1.0, (step + 1) / self.warmup, (total - step) / max(1, cooling))
