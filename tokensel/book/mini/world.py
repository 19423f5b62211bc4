"""The small world: every image is a pure function of (task, split, index)."""

import zlib

import numpy as np

from tokensel.book.mini import general, large, reading
from tokensel.book.mini.canvas import Page
from tokensel.book.mini.words import SPLITS
from tokensel.utils.errors import TokenselError

# task -> the function that draws one page of it
DRAW = {
    "forms": reading.form,
    "charts": reading.chart,
    "posters": reading.poster,
    "scene_text": reading.scene_text,
    "attributes": general.attributes,
    "science": general.science,
    "diagrams": general.diagram,
    "mixed": general.mixed,
    "transcribe": reading.text_page,
    "describe": general.scene,
}

# Tasks that no model is trained on and no sweep asks: they isolate one thing.
CONTROLS = {
    "words": reading.word_form,
    "nonsense": reading.nonsense_form,
    "full_pages": reading.full_page,
}

# Tasks whose evidence is as large as in photographs, and two in which it grows from one token on. The models
# that ship have not seen them; the large ones have.
LARGE = {
    "objects": large.objects,
    "patterns": large.patterns,
    "larger": large.larger,
    "scenes": large.scenes,
    "spots": large.spots,
    "strings": large.strings,
}

# Page sizes (height, width) that LLaVA-NeXT's processor tiles without resampling, so that text stays crisp.
SIZES = ((128, 128), (96, 128), (128, 96), (112, 128), (64, 128), (128, 64))
SHARES = (0.4, 0.15, 0.1, 0.15, 0.12, 0.08)


def draw_page(task: str, split: str, index: int, size: tuple[int, int] | None = None) -> Page:
    """Draw page ``index`` of ``task``.

    Args:
        task: a key of ``DRAW``, ``CONTROLS`` or ``LARGE``.
        split: train, validation or test; their images never meet, nor do their answers of four letters or
            more.
        index: any non-negative integer.
        size: (height, width) in pixels; by default drawn from ``SIZES`` with ``SHARES``.

    Raises:
        TokenselError: an unknown task or split.
    """
    draw = DRAW | CONTROLS | LARGE
    if task not in draw:
        raise TokenselError(f"no task {task!r} in the small world: choose one of {', '.join(draw)}")
    if split not in SPLITS:
        raise TokenselError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    drawn = SIZES[0] if size is None else size
    for attempt in range(100):
        rng = np.random.default_rng([task_seed(task), SPLITS.index(split), index, attempt])
        drawn = size or SIZES[int(rng.choice(len(SIZES), p=SHARES))]
        page = draw[task](rng, split, drawn)
        if page.questions and page.questions[0].answers[0]:
            return page
    raise TokenselError(f"{task} cannot be drawn on a page of {drawn[0]}x{drawn[1]} pixels")


def task_seed(task: str) -> int:
    """The seed of a task's pages; nonsense stands on the pages of the words."""
    return zlib.crc32(("words" if task == "nonsense" else task).encode())
