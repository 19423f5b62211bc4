"""What a linear probe still finds in the residual stream when visual tokens are gone.

A probe is a ridge regression from the state of one visual token behind one layer to what it stands for: its
letter, the letter before it in its word, its column and its row on the page. It is fitted on whole images and
asked on shortened ones, at the same tokens: where it fails, the model has not worked out, or has written
elsewhere, what it works out when all tokens are there.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from tokensel.benchmarks.statistics import bootstrap
from tokensel.book.mini.canvas import CELLS, ILLEGIBLE, Page
from tokensel.book.mini.words import ALPHABET
from tokensel.book.mini.world import draw_page
from tokensel.scorers import Scorer
from tokensel.vlm import Encoded, Reduced, Vlm, encode, reduce

__all__ = ["SETTINGS", "TARGETS", "kept_cells", "probed"]

TASKS = ("forms", "posters", "scene_text")
TARGETS = {
    "letter": len(ALPHABET) + 1,
    "letter before": len(ALPHABET) + 1,
    "column": 2 * CELLS,
    "row": 2 * CELLS,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "all tokens": {"keep": 1.0},
    "removed": {},
    "copied": {"dropped": "copied"},
    "blank": {"dropped": "blank"},
    "runs": {"neighbours": 2},
}
BEHIND = ("a gap", "a kept token")
_RIDGE = 1.0
_BATCH = 20

States = Float[Tensor, "layers tokens width"]
Labels = Int[Tensor, "tokens targets"]


def probed(vlm: Vlm, scorer: Scorer, keep: float, n: int, split: str = "test") -> pd.DataFrame:
    """Share of right predictions behind each layer under each setting, with 95 % intervals over pages.

    The tokens asked are those with a legible letter that the scorer keeps, one by one and in runs alike, on
    pages that have some behind a gap and some behind a kept token.

    Args:
        vlm: the small model.
        scorer: ranks the tokens.
        keep: fraction that is kept.
        n: pages a task to fit the probes on, and as many to ask.
        split: of the pages that are asked; the probes are fitted on the training split.

    Returns:
        Columns ``setting``, ``layer`` (0: the embeddings), ``target``, ``behind`` (what stands before the
        token in its row when single tokens are kept), ``right``, ``ci_low``, ``ci_high`` (0 to 100),
        ``difference`` from all tokens with ``low`` and ``high``, ``n`` (pages).
    """
    probes = _fit(vlm, n)
    right: dict[str, list[np.ndarray]] = {
        name: [] for name in SETTINGS
    }  # [layers, targets, BEHIND] of a page
    for encoded, labels in tqdm(_pages(vlm, split, n), desc="probes", total=len(TASKS) * -(-n // _BATCH)):
        choices = {name: {"keep": keep, "thumbnail": "last"} | more for name, more in SETTINGS.items()}
        reduced = {name: reduce(encoded, scorer, **options) for name, options in choices.items()}
        kept = kept_cells(encoded, reduced["removed"])
        asked = kept & kept_cells(encoded, reduced["runs"]) & (labels[:, 0] > 0) & encoded.layout.behind
        before = kept.roll(1)  # whether the token on the left was kept; it is one of the same row
        groups = torch.stack([asked & ~before, asked & before])
        image = encoded.layout.image
        pages = [i for i in range(len(encoded.layout.tiles)) if all((groups & (image == i)).any(1).tolist())]
        for name, prompt in reduced.items():
            states, places = _states(vlm, encoded, prompt)
            hits = (_predict(probes, states) == labels[places]).double()  # [layers, tokens, targets]
            for page in pages:
                own = [(group & (image == page))[places] for group in groups]
                right[name].append(torch.stack([hits[:, here].mean(1) for here in own], -1).numpy())
    return _summary({name: np.stack(pages) for name, pages in right.items()})


def _summary(right: dict[str, np.ndarray]) -> pd.DataFrame:
    """The rows of the table from ``[pages, layers, targets, BEHIND]`` of each setting."""
    rows = []
    for name, pages in right.items():
        shape = pages.shape[1:]
        own, against = (
            [100 * part.reshape(shape) for part in bootstrap(values.reshape(len(values), -1))]
            for values in (pages, pages - right["all tokens"])
        )
        for at in np.ndindex(shape):
            layer, target, behind = at
            cells = {"layer": layer, "target": list(TARGETS)[target], "behind": BEHIND[behind]}
            cells |= dict(zip(("right", "ci_low", "ci_high"), (part[at] for part in own)))
            cells |= dict(zip(("difference", "low", "high"), (part[at] for part in against)))
            rows.append({"setting": name, **cells, "n": len(pages)})
    return pd.DataFrame(rows)


def _pages(vlm: Vlm, split: str, n: int) -> Iterator[tuple[Encoded, Labels]]:
    """Batches of pages and the labels of their packed tokens."""
    for task in TASKS:
        for start in range(0, n, _BATCH):
            pages = [draw_page(task, split, index) for index in range(start, min(n, start + _BATCH))]
            prompts = [vlm.prompt(page.questions[0].question) for page in pages]
            encoded = encode(vlm.model, vlm.inputs([page.image for page in pages], prompts))
            yield encoded, _labels(encoded, pages)


def _labels(encoded: Encoded, pages: list[Page]) -> Labels:
    """Letter, letter before, column and row of each packed token; letter 0 where none can be read."""
    layout = encoded.layout
    source = layout.source.clamp(min=0)
    letters, before = (
        torch.from_numpy(np.concatenate([getattr(page, name).reshape(-1) for page in pages]))[source]
        for name in ("letters", "before")
    )
    legible = layout.cell & ~layout.thumbnail & (letters > 0) & (letters < ILLEGIBLE)
    places = torch.zeros(len(source), 2)
    places[layout.cell] = layout.centres
    # in halves of the page no more than 2 * CELLS rows and columns, whatever its size
    row, column = (places * 2 * CELLS).long().clamp(max=2 * CELLS - 1).unbind(1)
    return torch.stack([letters * legible, before, column, row], 1)


@torch.no_grad()
def _states(vlm: Vlm, encoded: Encoded, reduced: Reduced) -> tuple[States, Int[Tensor, "tokens"]]:
    """The states behind every layer, embeddings first, at the prompt's cells; and which tokens these are."""
    inputs = {name: value for name, value in reduced.inputs.items() if torch.is_tensor(value)}
    hidden = vlm.model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
    cells = reduced.visual & ~reduced.newlines
    full = int(cells.sum()) == int(encoded.layout.cell.sum())
    stands = encoded.layout.cell if full else kept_cells(encoded, reduced)
    return torch.stack([layer[cells] for layer in hidden]), stands.nonzero()[:, 0]


def kept_cells(encoded: Encoded, reduced: Reduced) -> Bool[Tensor, "packed"]:
    """The kept cells among packed tokens."""
    layout = encoded.layout
    assert reduced.kept is not None, "no tile was encoded again"
    return layout.cell & reduced.kept.flatten()[layout.source.clamp(min=0)]


def _with_one(states: States) -> Float[Tensor, "layers tokens inputs"]:
    """The states and a constant, in double precision."""
    return torch.cat([states, torch.ones_like(states[..., :1])], -1).double()


def _fit(vlm: Vlm, n: int) -> list[Float[Tensor, "layers inputs _"]]:
    """One probe a target, fitted on whole pages of the training split at all tokens with a letter."""
    squares: Tensor | float = 0.0
    products: list[Tensor | float] = [0.0] * len(TARGETS)
    for encoded, labels in _pages(vlm, "train", n):
        states, places = _states(vlm, encoded, reduce(encoded))
        legible = labels[places][:, 0] > 0
        x, truth = _with_one(states[:, legible]), labels[places][legible]
        squares = squares + x.mT @ x
        for number, classes in enumerate(TARGETS.values()):
            products[number] = products[number] + x.mT @ one_hot(truth[:, number], classes).double()
    assert isinstance(squares, Tensor)
    ridge = _RIDGE * torch.eye(squares.shape[-1], dtype=squares.dtype)
    return [torch.linalg.solve(squares + ridge, product) for product in products]


def _predict(
    probes: list[Float[Tensor, "layers inputs _"]], states: States
) -> Int[Tensor, "layers tokens targets"]:
    return torch.stack([(_with_one(states) @ probe).argmax(-1) for probe in probes], -1)
