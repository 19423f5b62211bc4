"""What a schedule reads when it ranks the columns of a prompt by a rule of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.schedules.prompt import Prompt

__all__ = ["Rows", "View"]

Rows = Callable[[Int[Tensor, "rows queries"], bool], Float[Tensor, "rows heads queries left"]]


@dataclass(frozen=True, eq=False)
class View:
    """A prompt in the prefill, at the entrance of a layer at which it is shortened.

    Indices and masks are on the host, the hidden states on the device of the layer.

    Attributes:
        layer: the layer that is about to run, counted from 0.
        columns: what the columns hold that are left there.
        order: the numbers of these columns in the whole prompt.
        prompt: what the whole prompt held, before anything was dropped.
        embeddings: hidden states that entered the first layer, of the whole prompt.
        before: hidden states that entered the layer before, of the columns that are left.
        hidden: hidden states that enter this layer, of the same columns.
        rows: computes what :meth:`attention` returns.
        second: computes what :meth:`without` returns.
    """

    layer: int
    columns: Prompt
    order: Int[Tensor, "rows left"]
    prompt: Prompt
    embeddings: Float[Tensor, "rows length width"]
    before: Float[Tensor, "rows left width"]
    hidden: Float[Tensor, "rows left width"]
    rows: Rows
    second: Callable[[Bool[Tensor, "rows length"]], Float[Tensor, "rows heads length"]] | None = None
    _known: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def attention(
        self, queries: Int[Tensor, "rows queries"], rotate: bool = True
    ) -> Float[Tensor, "rows heads queries left"]:
        """The attention that some columns pay to all that are left, in the layer before.

        It is computed in addition to the model's own, at most once for the same queries.

        Args:
            queries: indices into the columns that are left, the same number in every row.
            rotate: whether queries and keys are rotated by their positions, as in the model itself.
        """
        key = (rotate, *queries.shape, *queries.flatten().tolist())
        if key not in self._known:
            self._known[key] = self.rows(queries, rotate)
        return self._known[key]

    def last(self, rotate: bool = True) -> Float[Tensor, "rows left"]:
        """The attention that the last column pays, averaged over heads."""
        index = torch.full((len(self.order), 1), self.order.shape[1] - 1)
        return self.attention(index, rotate)[:, :, 0].mean(1)

    def without(self, unread: Bool[Tensor, "rows length"]) -> Float[Tensor, "rows length"]:
        """The attention that the last column would pay if nobody read the columns ``unread``, over heads.

        The layers before this one run a second time for that, with the positions of the whole prompt. For a
        ranking at the first cut, where the columns that are left are those of the prompt.
        """
        assert self.second is not None, "a view in a prefill has it"
        return self.second(unread).mean(1)

    @property
    def question(self) -> Bool[Tensor, "rows left"]:
        """True at the text after the last visual token of the whole prompt; at all text of a row without any.

        Not after the last one that is left: some families have text between the tokens of an image.
        """
        # no visual token here nor further right
        after = self.prompt.visual.flip(1).cumsum(1).flip(1) == 0
        return after.gather(1, self.order) & self.columns.real
