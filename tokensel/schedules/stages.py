"""What is left of a prompt between two drops, and the tensor operations of a drop.

What is left is known on the host. Indices and masks made of it move to the device of the tensors they are
applied to, which may differ from layer to layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokensel.budget import top_count
from tokensel.schedules.decoder import cache_of
from tokensel.schedules.prompt import Prompt

__all__ = ["Drop", "Stage", "as_given", "evict", "gather_columns", "report_length", "stay_columns"]


@dataclass
class Stage:
    """What is left of the prompt in the layers from one drop to the next.

    Attributes:
        layers: those layers.
        order: columns of the prompt that are left, in their old order; on the host, as ``real``.
        real: True where such a column is a token, False where it is padding.
        keep: the smallest fraction asked for so far, where all rows were asked for the same.
        whole: nothing was dropped yet, here or in earlier layers.
        maskless: every column is real and the attention implementation does without a mask.
        attended: the columns that this decode step attends to, where others stay in the cache; ``None`` where
            it attends to all that are real.
    """

    layers: range
    order: Int[Tensor, "rows left"]
    real: Bool[Tensor, "rows left"]
    keep: float = 1.0
    whole: bool = True
    maskless: bool = False
    attended: Bool[Tensor, "rows left"] | None = None

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
        real = self.real.to(hidden.device)
        allowed = causal & real[:, None, :] | itself  # [rows, queries, keys]
        return changed | {"attention_mask": as_given(allowed[:, None], hidden, attn)}

    def decode_kwargs(self, hidden: Tensor, kwargs: dict[str, Any], attn: str) -> dict[str, Any]:
        """The mask of a decode step; the arguments are those of :meth:`prefill_kwargs`."""
        if self.maskless and self.attended is None:
            return {"attention_mask": None}
        # the cache holds what is left of the prompt and the answer so far; this step adds one more key
        keys = cache_of(kwargs).layers[self.layers.start].keys.shape[-2] + 1
        seen = self.real if self.attended is None else self.attended
        answer = seen.new_ones(len(seen), keys - seen.shape[1])
        allowed = torch.cat([seen, answer], 1)[:, None, None]  # [rows, 1, 1 query, keys]
        return {"attention_mask": as_given(allowed.to(hidden.device), hidden, attn)}


@dataclass(frozen=True)
class Drop:
    """One drop: its generation step (0 is the prefill), the layer it happened before, and what is left.

    ``columns`` are the prompt's columns that are left, row by row; -1 where a row has fewer than the longest.
    """

    step: int
    layer: int
    columns: Int[Tensor, "rows left"]


def stay_columns(
    prompt: Prompt,
    stage: Stage,
    count: Int[Tensor, "rows"],
    dropping: Bool[Tensor, "rows"],
    scores: Callable[[Bool[Tensor, "rows"]], Float[Tensor, "rows left"]],
    newline: str,
) -> Bool[Tensor, "rows left"]:
    """Which columns of a stage stay, on the host.

    Args:
        prompt: what its columns hold.
        stage: which of them are left.
        count: cells that each row keeps at most.
        dropping: False for rows that keep every cell, and with them every newline.
        scores: computes what cells are ranked by, given the rows that need it: some cells stay, but not all.
        newline: "keep", "drop" or "row".
    """
    cells = prompt.cells.gather(1, stage.order) & stage.real
    newlines = (prompt.visual & ~prompt.cells).gather(1, stage.order) & stage.real
    some = (count > 0) & (count < cells.sum(1))
    kept = top_count(scores(some) if bool(some.any()) else torch.zeros(cells.shape), count, cells)
    stay = stage.real & ~cells & ~newlines | kept
    if newline == "keep":
        stay |= newlines
    else:
        stay |= newlines & ~dropping[:, None]
    if newline == "row":
        # count the kept cells of every row of the map, then look the count up at the row's newline
        map_row, map_cells = prompt.map_row.gather(1, stage.order), prompt.map_cells.gather(1, stage.order)
        hits = torch.zeros(len(stay), int(prompt.map_row.max()) + 1, dtype=torch.long)
        hits.scatter_add_(1, map_row, (kept & map_cells).long())
        stay |= newlines & (hits.gather(1, map_row) > 0)
    stay[:, -1] = True  # the next token is predicted from the prompt's last column, whatever it holds
    return stay


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


def report_length(layer: Any, evicted: int) -> None:
    """Let the first layer's cache report the length it would have if nothing were ``evicted`` from it.

    The model asks that layer how many tokens it has read, to place the next one and to make its mask. A layer
    with a sliding window counts by itself.
    """
    if type(layer) is DynamicLayer:
        counted: Any = layer  # whose keys may be None to a type checker
        counted.get_seq_length = lambda: counted.keys.shape[-2] + evicted


def gather_columns(states: Tensor, order: Int[Tensor, "rows kept"]) -> Tensor:
    """``states`` [rows or 1, length, ...] at the columns of ``order``."""
    states, order = states.expand(len(order), *states.shape[1:]), order.to(states.device)
    # gather wants an index of as many dimensions as the states, repeated over all but the columns
    index = order.view(*order.shape, *[1] * (states.ndim - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
