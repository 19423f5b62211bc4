"""Which visual tokens of an encoded batch stay, and the embeddings of those that stand in the prompt."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.scorers import Scorer
from tokensel.utils.errors import TokenselError, check_keep
from tokensel.vlm.choose import Choices, adaptive_cells, add_newlines, choose_cells
from tokensel.vlm.encoded import Encoded

__all__ = ["choose_tokens", "embed_tokens"]


def choose_tokens(
    encoded: Encoded, scorer: Scorer | None, keep: float | None, options: Choices
) -> tuple[Bool[Tensor, "packed"], Bool[Tensor, "packed"]]:
    """Which visual cells of a batch stay, and which packed tokens: these cells and the newlines with them.

    See :func:`tokensel.vlm.reduce.reduce` for the arguments and errors.
    """
    layout = encoded.layout
    if scorer is not None and not hasattr(scorer, "adaptive"):
        raise TokenselError(f"scorer is {scorer!r}: make one with make_scorer()")
    if scorer is None and keep != 1.0:
        raise TokenselError(f"keep is {keep} but there is no scorer to rank the tokens: pass scorer=")
    if scorer is not None and keep is None and not scorer.adaptive:
        raise TokenselError(f"scorer '{scorer.name}' has no threshold of its own: give keep, such as 0.3")
    scores = torch.zeros(len(layout.source)) if scorer is None else encoded.score(scorer)
    if keep is None:
        cells = adaptive_cells(layout, scores, options)
    elif options.budget == "threshold" and keep != 1.0:
        cells = adaptive_cells(layout, scores - _threshold(scorer, keep), options)
    else:
        cells = choose_cells(layout, scores, keep, options)
    return cells, add_newlines(layout, cells, options.newline)


def embed_tokens(
    encoded: Encoded,
    scorer: Scorer | None,
    cells: Bool[Tensor, "packed"],
    stands: Bool[Tensor, "packed"],
) -> Float[Tensor, "stands width"]:
    """Embeddings of the packed tokens that stand in the prompt.

    Args:
        encoded: the batch.
        scorer: what chose the cells; some merge what is dropped into what is kept.
        cells: the cells that it chose.
        stands: packed tokens that stand in the prompt.
    """
    # with nothing dropped, there is nothing to merge
    merges = hasattr(scorer, "merge") and bool(cells.any()) and not torch.equal(cells, encoded.layout.cell)
    return encoded.family.project(encoded, stands, encoded.merged(scorer, cells) if merges else None)


def _threshold(scorer: Any, keep: float) -> float:
    """The score above which a scorer keeps a fraction of the tokens on average.

    Raises:
        TokenselError: the scorer knows none, or ``keep`` is not in (0, 1].
    """
    if not hasattr(scorer, "threshold"):
        raise TokenselError(
            f"scorer '{scorer.name}' has no threshold: choose budget image or tile, or scorer selector"
        )
    return scorer.threshold(check_keep(keep))
