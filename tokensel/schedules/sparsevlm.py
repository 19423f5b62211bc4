"""SparseVLM (Zhang et al. 2024, arXiv 2410.04417): the words that fit the image rate it, in stages."""

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.schedules.recycling import recycled
from tokensel.schedules.schedule import Mass, check_newline
from tokensel.schedules.staged import check_cuts
from tokensel.schedules.view import View
from tokensel.utils.errors import TokenselError

__all__ = ["SparseVLM", "raters"]


def raters(
    embeddings: Float[Tensor, "length width"],
    words: Bool[Tensor, "length"],
    cells: Bool[Tensor, "length"],
) -> Bool[Tensor, "length"]:
    """The words that rate the image: those that its cells attend to at least as much as to the mean word.

    Args:
        embeddings: what enters the language model.
        words: the tokens to choose from.
        cells: the visual tokens that attend to them, by the softmax of inner products.
    """
    asked = embeddings[words].float()
    paid = (embeddings[cells].float() @ asked.T).softmax(1).mean(0)  # [words]
    chosen = torch.zeros_like(words)
    chosen[words] = paid >= paid.mean() - 1e-6  # of equal words, rounding must not lose one
    return chosen


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class SparseVLM:
    """Visual tokens are ranked by the attention of the raters; how many go depends on its rank.

    At each cut ``scale * (n - r)`` of the ``n`` cells are dropped, where ``r`` is the rank of the matrix
    [raters, cells] of attention in the layer before, averaged over heads: what r directions span, r tokens
    can carry.

    With ``recycling``, the best of the dropped cells are clustered, and the centre of each cluster comes back
    at its own position as the mean of the cluster; from there on it is a cell like others.

    What we chose: the words are the text after the last image, the template included. Recycling is off by
    default; how many clusters there are, how density is measured, and that a cluster becomes its mean are
    ours, see :mod:`~tokensel.schedules.recycling`. The caches of earlier layers keep their tokens. The rank
    is counted with the tolerance of ``torch.linalg.matrix_rank``.

    Attributes:
        scale: the paper's lambda, in [0, 1]; 0 keeps everything, 1 leaves as many cells as the rank.
        cuts: layers at whose entrance tokens are dropped, counted from 0; published for 32 layers.
        newline: "keep", "drop" or "row", see :class:`~tokensel.schedules.Schedule`.
        recycling: the share of the dropped cells that is clustered, in [0, 1].

    Raises:
        TokenselError: ``scale`` or ``recycling`` is not in [0, 1], ``cuts`` do not rise from 1 on, or
            ``newline`` is unknown.
    """

    scale: float = 0.5
    cuts: tuple[int, ...] = (2, 6, 15)
    newline: str = "keep"
    recycling: float = 0.0
    name: ClassVar[str] = "sparsevlm"
    uses_keep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in ("scale", "recycling"):
            value = getattr(self, option)
            number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else -1.0
            if not 0 <= number <= 1:
                raise TokenselError(f"{option} is {value!r}: give a number in [0, 1], such as 0.5")
            # a frozen dataclass takes assignments only this way
            object.__setattr__(self, option, number)
        object.__setattr__(self, "cuts", check_cuts(self.cuts))
        check_newline(self.newline)

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return () if self.scale == 0.0 else self.cuts

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """1 before the first cut and in decode steps, which drop nothing more.

        Raises:
            TokenselError: behind the first cut in the prefill, where the prompt decides, see :meth:`count`.
        """
        if step > 0 or not self.layers() or layer < self.cuts[0]:
            return 1.0
        raise TokenselError(
            "sparsevlm keeps a number of tokens that depends on the prompt, so that it is known only when "
            "the prompt was read: take another schedule where a fraction is needed in advance"
        )

    def count(self, view: View) -> Int[Tensor, "rows"]:
        """How many cells of each row stay, at least 1 of those that have any."""
        cells = view.columns.cells
        left = cells.sum(1)
        ranks = [
            int(torch.linalg.matrix_rank(paid[:, cells[row].to(paid.device)]))
            if bool(cells[row].any())
            else 0
            for row, paid in enumerate(self._paid(view))
        ]
        dropped = (self.scale * (left - torch.tensor(ranks)).double()).floor().long()
        return torch.minimum((left - dropped).clamp(min=1), left)

    def rank(self, view: View) -> Float[Tensor, "rows left"]:
        """Attention that the raters pay, averaged over heads and raters."""
        return torch.stack([paid.mean(0) for paid in self._paid(view)])

    def recycle(
        self, view: View, stay: Bool[Tensor, "rows left"]
    ) -> tuple[Bool[Tensor, "rows left"], Float[Tensor, "rows left width"]]:
        """The columns with those that come back, and the hidden states with what they become."""
        hidden = view.hidden
        if self.recycling == 0.0:
            return stay, hidden
        stay, hidden, scores = stay.clone(), hidden.clone(), self.rank(view)
        for row, gone in enumerate(view.columns.cells & ~stay):
            dropped = gone.nonzero()[:, 0].to(hidden.device)
            back, states = recycled(
                hidden[row, dropped], scores[row][dropped.to(scores.device)], self.recycling
            )
            hidden[row, dropped[back]] = states
            stay[row, dropped[back].cpu()] = True
        return stay, hidden

    def _paid(self, view: View) -> list[Float[Tensor, "raters left"]]:
        """Row by row, the attention of the raters to all columns, averaged over heads."""
        prompt, device = view.prompt, view.embeddings.device
        words = view.question
        numbers = []  # of the raters among the columns that are left
        for row, order in enumerate(view.order):
            asked, cells = torch.zeros(prompt.visual.shape[1], dtype=torch.bool), prompt.cells[row]
            asked[order[words[row]]] = True
            if bool(cells.any()) and bool(asked.any()):
                asked = raters(view.embeddings[row], asked.to(device), cells.to(device)).cpu()
            asked[-1] |= not bool(asked.any())  # an image at the end leaves the last token alone to rate it
            numbers.append((asked[order] & view.columns.real[row]).nonzero()[:, 0])
        most = max(map(len, numbers))
        # rows with fewer raters repeat their last one, and it is cut off again
        queries = torch.stack([torch.cat([n, n[-1:].expand(most - len(n))]) for n in numbers])
        paid = view.attention(queries).mean(1)  # [rows, raters, left]
        return [paid[row, : len(n)] for row, n in enumerate(numbers)]
