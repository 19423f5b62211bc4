"""A bias on the attention to single tokens of a prompt, in a stock language model.

A softmax over fewer keys gives each of them, and all text, a larger share. The bias ``log(w)`` on the logits
of one key has the effect of ``w`` copies of that key and its value, so that the image keeps the weight that
it had when it was whole (proportional attention, Bolya et al. 2022, arXiv 2210.09461, who weigh merged tokens
inside a vision tower). The bias minus infinity hides a token.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.schedules.decoder import Decoder, attention_of, cache_of, decoder_of
from tokensel.schedules.prune import Pruning
from tokensel.utils.errors import TokenselError

__all__ = ["biased", "check_read"]

# the biases of the contexts that are open in this thread
_OPEN: ContextVar[tuple[Tensor, ...]] = ContextVar("open_biases", default=())


@contextmanager
def biased(
    model: PreTrainedModel,
    bias: Float[Tensor, "rows length"] | None,
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
) -> Iterator[None]:
    """While this context lasts, a bias is added to the attention logits of the prompt's columns.

    >>> reduced = reduce_inputs(model, inputs, scorer, keep=0.3, attention="proportional")
    >>> with biased(model, reduced.attn_bias):
    ...     model.generate(**reduced)

    It holds for every token that attends to a column, itself included, in the prefill and in decode steps;
    the columns of the answer get none. ``generate`` may repeat the rows, as it does for beams. Only the
    thread that enters the context is affected. Biases of contexts within each other add up.

    Args:
        model: a vision-language model with one of the language models in
            :data:`tokensel.schedules.decoder.MODELS`, or such a language model.
        bias: for each column of the prompt, such as ``reduced.attn_bias``; ``None`` changes nothing.
        layers: the layers that it acts in, counted from 0; all by default.
        heads: the query heads that it acts on, counted from 0; all by default.

    Raises:
        TokenselError: another language model, an attention implementation that takes no bias, a layer or head
            that the model does not have; while the model runs, another prompt, or a schedule that drops
            columns.
    """
    if bias is None:
        yield
        return
    decoder = decoder_of(model)
    config: Any = decoder.config
    adding = _Adding(decoder, bias, _indices("heads", heads, config.num_attention_heads))
    indices = _indices("layers", layers, len(decoder.layers))
    chosen = range(len(decoder.layers)) if indices is None else indices
    hooks, token = [], _OPEN.set((*_OPEN.get(), bias))
    try:
        for layer in chosen:
            attention = attention_of(decoder, layer)
            hooks.append(attention.register_forward_pre_hook(adding, with_kwargs=True))
        yield
    finally:
        _OPEN.reset(token)
        for hook in hooks:
            hook.remove()


def check_read(bias: Tensor | None) -> None:
    """Raise where a prompt with a bias is about to be read without it.

    Raises:
        TokenselError: no context with this bias is open.
    """
    if bias is not None and not any(bias is other for other in _OPEN.get()):
        raise TokenselError(
            "this prompt is to be read with a bias, which its inputs alone do not have: use vlm.generate, or "
            "model.generate inside `with biased(model, reduced.attn_bias):`"
        )


def _indices(name: str, given: Iterable[int] | None, count: int) -> list[int] | None:
    """Layers or heads, checked; ``None`` for all."""
    indices = None if given is None else sorted({int(index) for index in given})
    if indices and not 0 <= indices[0] <= indices[-1] < count:
        raise TokenselError(f"{name} is {indices}: this model has 0 to {count - 1}")
    return indices


class _Adding:
    """The hook on attention modules that puts a bias into their mask."""

    def __init__(self, decoder: Decoder, bias: Float[Tensor, "rows length"], heads: list[int] | None):
        self.decoder, self.thread = decoder, get_ident()
        self.bias = bias[:, None, None, :]  # [rows, heads or 1, 1 query, length]
        if heads is not None:
            config: Any = decoder.config
            acts = torch.zeros(config.num_attention_heads, dtype=torch.bool)
            acts[heads] = True
            self.bias = torch.where(acts.to(bias.device)[:, None, None], self.bias, 0.0)
        self.made: tuple[Any, Tensor] | None = None  # the last mask, which most layers share, and of what

    def __call__(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        # another thread may call the hook while it is being registered or removed, and then without kwargs
        if get_ident() != self.thread or kwargs is None:
            return None
        hidden, given, cache = kwargs["hidden_states"], kwargs.get("attention_mask"), cache_of(kwargs)
        rows, queries = hidden.shape[:2]
        past, keys, first = 0, queries, 0
        if cache is not None:
            layer: Any = attention.layer_idx
            past = int(cache.get_seq_length(layer))
            keys, first = map(int, cache.get_mask_sizes(queries, layer))
        self._check(rows, past + queries)
        place = (rows, queries, past, keys, first, hidden.device, hidden.dtype)
        if self.made is None or self.made[0][0] is not given or self.made[0][1] != place:
            bias = self._columns(rows, first, keys, hidden)
            self.made = (given, place), _added(given, bias, queries, past - first)
        return args, kwargs | {"attention_mask": self.made[1]}

    def _check(self, rows: int, read: int) -> None:
        """Raise unless this pass reads the prompt of the bias, in full and with nothing dropped inside."""
        given, length = len(self.bias), self.bias.shape[-1]
        if rows % given or read < length:
            raise TokenselError(
                f"a bias of {given} rows and {length} columns, and the model reads {rows} rows of {read} "
                "tokens: give it that prompt, in one pass"
            )
        for hook in self.decoder.layers[0]._forward_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Pruning) and other.thread == self.thread:
                raise TokenselError(
                    f"{other.schedule.name} drops tokens inside the model, which moves the columns of a "
                    "bias: leave the schedule or the bias out"
                )

    def _columns(self, rows: int, first: int, keys: int, hidden: Tensor) -> Tensor:
        """The bias of the keys that a layer's cache holds, ``[rows, heads or 1, 1 query, keys]``.

        Args:
            rows: of the pass; ``generate`` repeats each row of the prompt in place.
            first: column of the first of the keys, which is not 0 where a sliding window left some behind.
            keys: how many there are.
            hidden: its device and precision are wanted.
        """
        bias = self.bias[..., first : first + keys].to(hidden)
        # columns of the answer, and of a cache of fixed size those that are still empty
        bias = nn.functional.pad(bias, (0, keys - bias.shape[-1]))
        return bias.repeat_interleave(rows // len(bias), 0)


def _added(mask: Tensor | None, bias: Tensor, queries: int, before: int) -> Tensor:
    """An attention mask with a bias, in the form that is added to the logits.

    Args:
        mask: True where attention is allowed, or added to the logits itself; ``None`` for a causal one.
        bias: ``[rows, heads or 1, 1 query, keys]``.
        queries: tokens of this pass.
        before: keys in front of the first of them.
    """
    least = torch.finfo(bias.dtype).min
    if mask is None:
        ones = torch.ones(queries, bias.shape[-1], dtype=torch.bool, device=bias.device)
        mask = ones.tril(before)
    added = torch.where(mask, bias, least) if mask.dtype == torch.bool else mask + bias
    # a softmax over nothing but -inf would be NaN
    return added.clamp(min=least)
