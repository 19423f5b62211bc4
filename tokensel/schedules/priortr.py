"""PriorTR (arXiv 2606.24156): what the question adds to the attention that an image draws anyway.

A token that stands between image and question has seen the image and, by causality, not the question. Its
attention is the prior. The question's is the posterior. A token is worth what the second gains on the first.
"""

from dataclasses import dataclass
from typing import ClassVar, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.schedules.schedule import Mass, Ranked
from tokensel.schedules.view import View
from tokensel.utils.errors import TokenselError

__all__ = ["PriorTR", "gain"]

EPSILON = 1e-10
QUERIES, PRIORS = ("last", "question"), ("token", "forward")


def gain(
    prior: Float[Tensor, "rows tokens"],
    posterior: Float[Tensor, "rows tokens"],
    cells: Bool[Tensor, "rows tokens"],
) -> Float[Tensor, "rows tokens"]:
    """The score ``P log((P + eps) / (Q + eps))`` of each cell, P and Q normalised over the cells of a row.

    Args:
        prior: attention of the null token, Q before it is normalised.
        posterior: attention of the question, P before it is normalised.
        cells: the tokens that compete; others score 0.
    """

    def normalised(paid: Tensor) -> Tensor:
        paid = paid.float().masked_fill(~cells, 0.0)
        # a row without a cell has no sum to divide by
        return paid / paid.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    q, p = normalised(prior), normalised(posterior)
    return p * ((p + EPSILON) / (q + EPSILON)).log()


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class PriorTR(Ranked):
    """The first ``layer`` layers run in full; then the best fraction ``keep`` of the cells stays everywhere.

    The caches of the layers that ran in full are shortened too, and positions stay what they were. The
    attention is that of the layer before the cut, averaged over heads.

    What we chose: the null token is the first text token after the last visual one, whatever the chat
    template puts there (in LLaVA a line break), so that the prior covers all images of a row. A prompt with
    the image at its end has none and is refused; with the image after the question, what follows the image
    is the template alone, and the method cannot tell: ask the question last. Newlines do not compete, see
    ``newline``. The constant eps is that of the public code, 1e-10; the paper has 1e-6.

    Attributes:
        queries: whose attention is the posterior: that of the "last" token, as the public code does for
            LLaVA-NeXT, or of the whole "question" from the null token to the end, as for LLaVA-1.5.
        prior: whose attention is the prior: that of the null "token", or that of the prompt's last token in a
            second "forward" that reads the image without the question (the paper's PriorTR-2F). This one
            takes prompts in any order, and costs the first ``layer`` layers once more. What is read is the
            first token, the image and the last token, each at its position in the whole prompt.

    Raises:
        TokenselError: as :class:`~tokensel.schedules.schedule.Ranked`; ``queries`` or ``prior`` is unknown,
            or there are the queries of a "question" with the prior of a "forward", which knows no null token.
    """

    layer: int = 3
    queries: str = "last"
    prior: str = "token"
    name: ClassVar[str] = "priortr"
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries not in QUERIES:
            raise TokenselError(f"queries is {self.queries!r}: choose one of {', '.join(QUERIES)}")
        if self.prior not in PRIORS:
            raise TokenselError(f"prior is {self.prior!r}: choose one of {', '.join(PRIORS)}")
        if self.prior == "forward" and self.queries != "last":
            raise TokenselError("queries is 'question': with prior='forward' give 'last'")

    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float:
        """Fraction of the prompt's visual cells that enters ``layer``; decode steps drop nothing more."""
        return self.keep if layer >= self.layer and step == 0 else 1.0

    def rank(self, view: View) -> Float[Tensor, "rows left"]:
        """The gain of each cell.

        Raises:
            TokenselError: a row with an image and without a text token after it that is followed by another.
        """
        question, cells = view.question, view.columns.cells
        if self.prior == "forward":
            prior = view.without(_between(view))
            return gain(prior, view.last().to(prior), cells.to(prior.device))
        count = question.sum(1)
        if bool(((count < 2) & cells.any(1)).any()):
            raise TokenselError(
                "priortr: nothing stands between the image and the prompt's last token, so there is no token "
                "that has seen the image and not the question: put the image before the question, or take "
                "prior='forward'"
            )
        null = question.long().argmax(1, keepdim=True)  # the first True
        prior = view.attention(null)[:, :, 0].mean(1)
        return gain(prior, self._posterior(view, question, null), cells.to(prior.device))

    def _posterior(
        self, view: View, question: Bool[Tensor, "rows left"], null: Int[Tensor, "rows 1"]
    ) -> Float[Tensor, "rows left"]:
        if self.queries == "last":
            return view.last()
        # columns are padded on the left, so the question is the end of every row; shorter ones start later
        longest = int(question.sum(1).max())
        index = torch.arange(question.shape[1] - longest, question.shape[1]).expand(len(question), -1)
        paid = view.attention(index).mean(1)  # [rows, queries, left]
        asked = (index >= null).to(paid)[:, :, None]
        return (paid * asked).sum(1) / asked.sum(1)


def _between(view: View) -> Bool[Tensor, "rows length"]:
    """True at the text of a prompt, but for its first and its last token."""
    prompt = view.prompt
    text = prompt.real & ~prompt.visual
    text[:, -1] = False
    # the first real column, at which padding on the left ends
    return text & (prompt.real.cumsum(1) > 1)
