"""Drop visual tokens inside a stock language model: gathered, not masked, so that time and cache are saved.

Hooks on the decoder layers shorten the prompt where a schedule asks for it: hidden states, positions and mask
are gathered, and the layers from there on cache only what reaches them. In decode steps a schedule may evict
more: then the caches of those layers are gathered too. The model's attention stays as fast as it was. The one
row of attention that ranks the tokens is computed in addition, at the one layer that needs it, and only when
tokens are dropped.

Which columns are left is known on the host. The row of attention is the one thing that is fetched from the
device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from tokensel.schedules.choosing import Choosing
from tokensel.schedules.decoder import Decoder, attention_of, cache_of, decoder_of
from tokensel.schedules.options import check_cache, check_window
from tokensel.schedules.prompt import Prompt
from tokensel.schedules.schedule import Schedule
from tokensel.schedules.stages import Drop, Stage, evict, gather_columns, report_length
from tokensel.utils.errors import TokenselError, check_layers

__all__ = ["Pruning", "pruned"]

Changed = (
    tuple[tuple, dict[str, Any]] | None
)  # what a hook returns: arguments of the layer, None to leave them


@contextmanager
def pruned(model: PreTrainedModel, prompt: Prompt, schedule: Schedule) -> Iterator["Pruning"]:
    """While this context lasts, ``model`` drops visual tokens of one prompt as ``schedule`` asks.

    >>> with pruned(model, reduced.prompt, FastV(layer=2, keep=0.5)):
    ...     model.generate(**reduced)

    The last column of the prompt always stays, even if it is a visual token: the answer is predicted from it.
    Rows without an image pass unchanged. Only the thread that enters the context is affected, so other
    threads may use the model at the same time, with another schedule or with none.

    Args:
        model: a vision-language model with one of the language models in
            :data:`tokensel.schedules.decoder.MODELS`, or such a language model.
        prompt: what the columns of the prompt hold, such as ``reduced.prompt``.
        schedule: which tokens stay.

    Raises:
        TokenselError: another language model, a schedule that names layers it does not have, a prompt padded
            on the right, a way to generate in which tokens cannot be dropped, a second schedule within the
            first, or (at the end) a model that was used in other threads only.
    """
    pruning = Pruning(decoder_of(model), prompt, schedule)
    try:
        yield pruning
    finally:
        pruning.remove()
    pruning.check_used()


class Pruning:
    """The hooks of one prompt, and what they did.

    Attributes:
        drops: each time that tokens were dropped.
        left: for each generation step the visual tokens that every layer reads, ``[layers, rows]``; newlines
            count.
        cells: the same without newlines, which is what a fraction to keep counts.
    """

    def __init__(self, decoder: Decoder, prompt: Prompt, schedule: Schedule):
        count = len(decoder.layers)
        check_layers(schedule.name, schedule.layers(), count)
        self.decoder, self.schedule, self.thread = decoder, schedule, get_ident()
        self.choosing = Choosing(decoder, schedule)
        self.evicts: bool = getattr(schedule, "evicts", False) and bool(schedule.layers())
        self.given = self.prompt = prompt.on_host()
        self.length = self.given.visual.shape[1]
        check_window(schedule.name, decoder, self.length)
        self.drops: list[Drop] = []
        self.left: list[Int[Tensor, "layers rows"]] = []
        self.cells: list[Int[Tensor, "layers rows"]] = []
        self.answer_keys: Tensor | None = None  # of the first layer, where rows are copies of one prompt
        self.used, self.used_elsewhere = False, False
        self.stages: dict[int, Stage] = {}  # by the first of their layers
        self.changed: dict[str, Any] = {}  # keyword arguments of a stage's layers at this step, computed once
        self.hooks: list[Any] = []
        try:
            self._register(count)
        except BaseException:
            self.remove()  # a hook without its Pruning would break the model for good
            raise

    def _register(self, count: int) -> None:
        layers = self.decoder.layers
        for hook in layers[0]._forward_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Pruning) and other.thread == self.thread:
                raise TokenselError(
                    f"{self.schedule.name}: {other.schedule.name} drops tokens of this model already; leave "
                    "its pruned() first"
                )
        if isinstance(self.decoder, Qwen3VLTextModel):
            self.hooks.append(self.decoder.register_forward_pre_hook(self._take_deepstack, with_kwargs=True))
            for index, layer in enumerate(layers):
                self.hooks.append(layer.register_forward_hook(self._add_deepstack(index)))
        self.hooks.append(layers[0].register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer in self.schedule.layers():
            attention, hook = attention_of(self.decoder, layer - 1), self._remember(layer)
            self.hooks.append(attention.register_forward_hook(hook, with_kwargs=True))
        # what is evicted everywhere is missing in decode steps from the first layer on
        first = 0 if self.evicts else min(self.schedule.layers(), default=count)
        for index in range(first, count):
            hook = self._enter(index)
            self.hooks.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        if self.choosing.rank is not None:
            # after the hooks above, so that a layer's input is what it is after a drop
            for index in {0, *(layer - 1 for layer in self.schedule.layers())}:
                hook = self._remember_input(index)
                self.hooks.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks: the model is what it was."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    @property
    def ranked(self) -> dict[tuple[int, int], Tensor]:
        """Rows of attention computed in addition to the model's own, see :class:`Choosing`."""
        return self.choosing.ranked

    @property
    def reread(self) -> Int[Tensor, "rows"]:
        """How many layers read the prompt of each row a second time."""
        return self.choosing.reread

    @property
    def step(self) -> int:
        """The generation step; 0 is the prefill, -1 is before it."""
        return self.choosing.step

    def ranked_in(self, row: int, steps: int) -> list[tuple[int, int]]:
        """Where one row of the batch needed its attention in its first ``steps`` steps: step and layer."""
        return [
            place
            for place, counts in self.ranked.items()
            if place[0] < steps
            for _ in range(int(counts[row]))
        ]

    @property
    def cached(self) -> list[Int[Tensor, "layers rows"]]:
        """As ``left``, but what every layer's cache holds after the step, which may be less than it read."""
        if self.choosing.restores:
            return self.left[:1] * len(self.left)
        if not (self.evicts and self.left):
            return self.left
        return [self.left[0][-1:].expand_as(self.left[0]), *self.left[1:]]

    def check_used(self) -> None:
        """Raise where only other threads used the model, so that nothing was dropped.

        Raises:
            TokenselError: that is so.
        """
        if self.used_elsewhere and not self.used:
            raise TokenselError(
                f"{self.schedule.name}: another thread used the model, and nothing was dropped there: enter "
                "pruned() in the thread that generates"
            )

    def _is_mine(self) -> bool:
        mine = get_ident() == self.thread
        self.used, self.used_elsewhere = self.used or mine, self.used_elsewhere or not mine
        return mine

    # Hooks take ``kwargs`` as an option: a second thread may call one while it is being registered or
    # removed, and then without them. It gets None, that is, it is left alone.
    def _begin(self, _layer: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Changed:
        """Before the first layer: is this the prefill or a decode step? The cache knows."""
        if not self._is_mine() or kwargs is None:
            return None
        cache, (rows, length) = cache_of(kwargs), args[0].shape[:2]
        check_cache(self.schedule.name, cache)
        # of the first layer, which reports what was evicted from it, too
        past = 0 if cache is None else cache.get_seq_length()
        check_window(self.schedule.name, self.decoder, past + length)
        self.choosing.rows.clear()
        if past == 0:
            self._begin_prefill(rows, length, kwargs)
        elif length == 1 and self.step >= 0 and past == self.length + self.step:
            self.choosing.begin_decode()
            self._check_rows(cache)
            for counts in (self.left, self.cells):
                # after the prefill an evicting schedule leaves in every layer what it left in the last
                counts.append(counts[-1][-1:].expand_as(counts[-1]) if self.evicts else counts[-1])
        else:
            raise TokenselError(
                f"{self.schedule.name}: the model reads {length} tokens after {past}, where the prompt has "
                f"{self.length}: one pass has to read the whole prompt, every other pass one token more"
            )
        return None

    def _take_deepstack(
        self, _decoder: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> Changed:
        """Before the language model: what it would add to visual columns, :meth:`_add_deepstack` adds."""
        if not self._is_mine() or kwargs is None:
            return None
        return args, self.choosing.deepstack.take(kwargs)

    def _add_deepstack(self, index: int) -> Callable:
        """A hook on layer ``index`` that adds to its output what belongs to the columns that are left."""

        def hook(_layer: nn.Module, _args: tuple, hidden: Tensor) -> Tensor | None:
            if not self._is_mine() or not self.choosing.deepstack.features:
                return None
            stage = self.stages[max(start for start in self.stages if start <= index)]
            return self.choosing.deepstack.add(index, hidden, stage.order, stage.real)

        return hook

    def _begin_prefill(self, rows: int, length: int, kwargs: dict[str, Any]) -> None:
        times, rest = divmod(rows, len(self.given.visual))
        if length != self.length or rest or not times:
            raise TokenselError(
                f"{self.schedule.name}: the model reads {rows} rows of {length} tokens, where the prompt has "
                f"{len(self.given.visual)} of {self.length}: give it that prompt, in one pass, with a cache"
            )
        self.prompt = self.given.repeat(times)
        starts = self.choosing.starts
        ends = (*starts[1:], len(self.decoder.layers))
        columns = torch.arange(length).expand(rows, -1)
        self.stages = {
            start: Stage(range(start, end), order=columns, real=self.prompt.real)
            for start, end in zip(starts, ends)
        }
        layers = len(self.decoder.layers)
        self.choosing.begin_prefill(self.prompt, self.stages)
        self.choosing.layer_kwargs = kwargs
        self.drops, self.answer_keys = [], None
        self.left = [self.prompt.visual.sum(1).expand(layers, -1)]
        self.cells = [self.choosing.total.expand(layers, -1)]

    def _check_rows(self, cache: Any) -> None:
        """Raise if copies of one prompt changed places: what is left is known row by row."""
        if len(self.prompt.visual) == len(self.given.visual):
            return
        # [rows, answer so far], one number for each token
        keys = cache.layers[0].keys[:, 0, self.stages[0].order.shape[1] :, 0]
        if self.answer_keys is not None and not torch.equal(
            keys[:, : self.answer_keys.shape[1]], self.answer_keys
        ):
            raise TokenselError(
                f"{self.schedule.name}: beam search reorders the cache's rows; leave num_beams out"
            )
        self.answer_keys = keys.clone()

    def _remember(self, index: int) -> Callable:
        """A hook on the attention before layer ``index``, whose inputs a choice may need."""

        def hook(_attention: nn.Module, _args: tuple, kwargs: dict[str, Any], _out: Any = None) -> None:
            if self._is_mine():
                self.choosing.remember_attention(index, kwargs)

        return hook

    def _remember_input(self, index: int) -> Callable:
        """A hook on layer ``index``, whose input a choice may need."""

        def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
            if self._is_mine():
                self.choosing.remember_input(index, args[0])

        return hook

    def _enter(self, index: int) -> Callable:
        """A hook that hands layer ``index`` what is left, after a drop at its entrance if there is one."""

        def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Changed:
            if not self._is_mine() or kwargs is None:
                return None
            hidden = args[0]
            if index in self.stages:
                hidden = self._shorten(index, hidden, kwargs) if index else hidden
                stage, attn = self.stages[index], str(self.decoder.config._attn_implementation)
                change = stage.prefill_kwargs if self.step == 0 else stage.decode_kwargs
                untouched = stage.whole and stage.attended is None
                self.changed = {} if untouched else change(hidden, kwargs, attn)
            return (hidden, *args[1:]), kwargs | self.changed

        return hook

    def _shorten(
        self, index: int, hidden: Float[Tensor, "rows length width"], kwargs: dict[str, Any]
    ) -> Tensor:
        """Choose what stays in the layers from ``index`` on; gather it, from ``hidden`` or from the cache."""
        stage, prefill = self.stages[index], self.step == 0
        if prefill:  # takes over what earlier layers left
            stage = self.stages[index] = replace(self.choosing.before(index), layers=stage.layers)
        stay, hidden = self.choosing.choose(index, stage, hidden)
        if self.choosing.restores:
            stage.attended = None if torch.equal(stay, stage.real) else stay
            self._record(index, stage, stay)
            return hidden
        if torch.equal(stay, stage.real):
            return hidden
        length = int(stay.sum(1).max())
        if prefill or length < stay.shape[1]:
            # a stable sort by "stays" moves what is dropped, padding included, to the left and keeps all
            # orders
            chosen = stay.to(torch.uint8).argsort(dim=1, stable=True)[:, -length:]
            if prefill:
                hidden = gather_columns(hidden, chosen)
            else:
                caches = [cache_of(kwargs).layers[layer] for layer in stage.layers]
                evict(caches, chosen, stay.shape[1])
            stage.order, stay = stage.order.gather(1, chosen), stay.gather(1, chosen)
        stage.real, stage.whole = stay, False
        stage.maskless = self.decoder.config._attn_implementation == "sdpa" and bool(stay.all())
        if prefill and self.evicts:
            self._evict_before(index, chosen, cache_of(kwargs))
        self._record(index, stage, stay)
        return hidden

    def _record(self, index: int, stage: Stage, stay: Bool[Tensor, "rows left"]) -> None:
        """Note what is left, or attended to, in the layers from ``index`` on."""
        if self.step or not self.choosing.restores:
            self.drops.append(Drop(self.step, index, stage.order.masked_fill(~stay, -1)))
        for counts, columns in ((self.left, self.prompt.visual), (self.cells, self.prompt.cells)):
            counts[-1] = counts[-1].clone()  # it may be the tensor of the step before
            counts[-1][stage.layers.start :] = (columns.gather(1, stage.order) & stay).sum(1)

    def _evict_before(self, index: int, chosen: Int[Tensor, "rows kept"], cache: Any) -> None:
        """Leave in the layers before ``index``, which ran already, what that layer is given."""
        stage, length = self.stages[index], self.choosing.before(index).order.shape[1]
        for start in [start for start in self.choosing.starts if start < index]:
            self.stages[start] = replace(stage, layers=self.stages[start].layers)
        if cache is not None:
            evict(cache.layers[:index], chosen, length)
            report_length(cache.layers[0], self.length - chosen.shape[1])
