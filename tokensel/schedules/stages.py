"""What is left of a prompt between two drops, and the tensor operations of a drop."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Drop", "Stage", "evict", "gather_columns"]


@dataclass
class Stage:
    """What is left of the prompt in the layers from one drop to the next.

    Attributes:
        layers: those layers.
        order: columns of the prompt that are left, in their old order.
        real: True where such a column is a token, False where it is padding.
        visual: how many of them are visual tokens, row by row.
        keep: the smallest fraction asked for so far, where all rows were asked for the same.
        whole: nothing was dropped yet, here or in earlier layers.
        maskless: every column is real and the attention implementation does without a mask.
    """

    layers: range
    order: Int[Tensor, "rows left"]
    real: Bool[Tensor, "rows left"]
    visual: Int[Tensor, "rows"]
    keep: float = 1.0
    whole: bool = True
    maskless: bool = False

    def prefill_kwargs(self, hidden: Tensor, kwargs: dict[str, Any], attn: str) -> dict[str, Any]:
        """Positions and mask of what is left, gathered from those of the whole prompt.

        Args:
            hidden: the columns that are left, ``[rows, left, width]``.
            kwargs: what the model passes to the layer.
            attn: its attention implementation.
        """
        rotation = tuple(gather_columns(part, self.order) for part in kwargs["position_embeddings"])
        changed: dict[str, Any] = {"position_embeddings": rotation}
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = gather_columns(kwargs["position_ids"], self.order)
        if self.maskless:
            return changed | {"attention_mask": None}
        square = (hidden.shape[1],) * 2
        causal = torch.ones(square, dtype=torch.bool, device=hidden.device).tril()
        # padding may attend to itself: a softmax over nothing would be NaN
        itself = torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        allowed = causal & self.real[:, None, :] | itself  # [rows, queries, keys]
        return changed | {"attention_mask": as_given(allowed[:, None], hidden, attn)}

    def decode_kwargs(self, hidden: Tensor, kwargs: dict[str, Any], attn: str) -> dict[str, Any]:
        """The mask of a decode step; the arguments are those of :meth:`prefill_kwargs`."""
        if self.maskless:
            return {"attention_mask": None}
        # the cache holds what is left of the prompt and the answer so far; this step adds one more key
        keys = kwargs["past_key_values"].layers[self.layers.start].keys.shape[-2] + 1
        answer = self.real.new_ones(len(self.real), keys - self.real.shape[1])
        allowed = torch.cat([self.real, answer], 1)[:, None, None]  # [rows, 1, 1 query, keys]
        return {"attention_mask": as_given(allowed, hidden, attn)}


@dataclass(frozen=True)
class Drop:
    """One drop: its generation step (0 is the prefill), the layer it happened before, and what is left.

    ``columns`` are the prompt's columns that are left, row by row; -1 where a row has fewer than the longest.
    """

    step: int
    layer: int
    columns: Int[Tensor, "rows left"]


def as_given(allowed: Bool[Tensor, "rows 1 queries keys"], hidden: Tensor, attn: str) -> Tensor:
    """A mask, True where attention is allowed, in the form that the attention implementation takes."""
    if attn == "sdpa":
        return allowed
    # eager attention adds its mask to the logits
    mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(hidden.dtype).min)


def evict(layers: list[Any], chosen: Int[Tensor, "rows kept"], prompt: int) -> None:
    """In these layers' caches keep the ``chosen`` of the first ``prompt`` columns, and all after those."""
    # keys of the answer's tokens stand after the prompt's and always stay
    answer = torch.arange(prompt, layers[0].keys.shape[-2], device=chosen.device).expand(len(chosen), -1)
    columns = torch.cat([chosen, answer], 1)
    for layer in layers:
        for name in ("keys", "values"):
            states = getattr(layer, name).transpose(1, 2)  # [rows, columns, heads, width]
            # contiguous, so that the memory of what was evicted is free for other use
            setattr(layer, name, gather_columns(states, columns).transpose(1, 2).contiguous())


def gather_columns(states: Tensor, order: Int[Tensor, "rows kept"]) -> Tensor:
    """``states`` [rows or 1, length, ...] at the columns of ``order``."""
    states = states.expand(len(order), *states.shape[1:])
    # gather wants an index of as many dimensions as the states, repeated over all but the columns
    index = order.view(*order.shape, *[1] * (states.ndim - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
