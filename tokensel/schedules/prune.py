"""Drop visual tokens inside a stock language model: gathered, not masked, so that time and cache are saved.

Hooks on the decoder layers shorten the prompt where a schedule asks for it: hidden states, positions and mask
are gathered, and the layers from there on cache only what reaches them. In decode steps a schedule may evict
more: then the caches of those layers are gathered too. The model's attention stays as fast as it was. The one
row of attention that ranks the tokens is computed in addition, at the one layer that needs it, and only when
tokens are dropped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.budget import fraction_count, top_count
from tokensel.schedules.attention import RESPONSE, last_rows, token_types, type_mass
from tokensel.schedules.decoder import Decoder, attention_of, decoder_of
from tokensel.schedules.schedule import Schedule
from tokensel.schedules.stages import Drop, Stage, evict, gather_columns
from tokensel.utils.errors import TokenselError, check_layers

__all__ = ["Pruning", "pruned"]


@contextmanager
def pruned(
    model: PreTrainedModel,
    visual: Bool[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    schedule: Schedule,
) -> Iterator["Pruning"]:
    """While this context lasts, ``model`` drops visual tokens of one prompt as ``schedule`` asks.

    >>> with pruned(model, reduced.visual, reduced["attention_mask"], FastV(layer=2, keep=0.5)):
    ...     model.generate(**reduced)

    Args:
        model: a LLaVA whose language model is a Llama, Mistral or Qwen2, or such a language model.
        visual: True at the prompt's visual tokens, newlines among them.
        attention_mask: 1 at real tokens, 0 at padding.
        schedule: which tokens stay.

    Raises:
        TokenselError: another language model, a schedule that names layers it does not have, a prompt without
            visual tokens, or attention in a sliding window.
    """
    pruning = Pruning(decoder_of(model), visual, attention_mask, schedule)
    try:
        yield pruning
    finally:
        pruning.remove()


class Pruning:
    """The hooks of one prompt, and what they did.

    Attributes:
        drops: each time that tokens were dropped.
        left: for each generation step the visual tokens that every layer holds, ``[layers, rows]``; newlines
            count.
        ranked: step and layer of every row of attention that was computed in addition to the model's own.
    """

    def __init__(self, decoder: Decoder, visual: Tensor, attention_mask: Tensor, schedule: Schedule):
        count = len(decoder.layers)
        check_layers(schedule.name, schedule.layers(), count)
        if not bool(visual.any(1).all()):
            raise TokenselError(f"{schedule.name}: a prompt has no visual tokens, there is nothing to drop")
        windowed = getattr(decoder.config, "use_sliding_window", True)
        window = getattr(decoder.config, "sliding_window", None) if windowed else None
        if window is not None and visual.shape[1] >= window:
            raise TokenselError(
                f"{schedule.name}: a prompt of {visual.shape[1]} tokens is longer than the sliding window of "
                f"{window}, which dropped tokens would shift; give shorter prompts, or another model"
            )
        self.decoder, self.schedule = decoder, schedule
        self.visual, self.prompt = visual, attention_mask.bool()
        self.types, self.total = token_types(visual, self.prompt), visual.sum(1)
        self.drops: list[Drop] = []
        self.left: list[Int[Tensor, "layers rows"]] = []
        self.ranked: list[tuple[int, int]] = []
        self.step = 0
        self.starts = (0, *sorted(schedule.layers()))
        self.stages: dict[int, Stage] = {}  # by the first of their layers
        self.changed: dict[str, Any] = {}  # keyword arguments of a stage's layers at this step, computed once
        self.attention_inputs: dict[int, tuple] = {}  # of the attention before a drop, at this step
        self.rows: dict[int, Tensor] = {}  # the attention its last token paid
        self.hooks = [decoder.layers[0].register_forward_pre_hook(self._begin)]
        for layer in schedule.layers():
            hook = self._remember(layer)
            self.hooks.append(attention_of(decoder, layer - 1).register_forward_hook(hook, with_kwargs=True))
        for index in range(min(schedule.layers(), default=count), count):
            hook = self._enter(index)
            self.hooks.append(decoder.layers[index].register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks: the model is what it was."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _begin(self, _layer: nn.Module, args: tuple) -> None:
        """One more token is one more step; a prompt starts from the beginning, with nothing dropped yet."""
        self.rows.clear()
        if args[0].shape[1] == 1:
            self.step += 1
            self.left.append(self.left[-1])
            return
        ends = (*self.starts[1:], len(self.decoder.layers))
        columns = torch.arange(self.prompt.shape[1], device=self.prompt.device).expand_as(self.prompt)
        self.stages = {
            start: Stage(range(start, end), order=columns, real=self.prompt, visual=self.total)
            for start, end in zip(self.starts, ends)
        }
        self.step, self.left = 0, [self.total.expand(len(self.decoder.layers), -1)]
        self.drops, self.ranked = [], []

    def _remember(self, index: int) -> Callable:
        """A hook that keeps the inputs of the attention before layer ``index``, in case they are needed."""

        def hook(_attention: nn.Module, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
            names = ("hidden_states", "position_embeddings", "past_key_values")
            self.attention_inputs[index] = tuple(kwargs[name] for name in names)

        return hook

    def _attention(self, index: int) -> Float[Tensor, "rows heads keys"]:
        """What the newest token attended to in the layer before ``index``, computed at most once a step."""
        if index not in self.rows:
            hidden, rotation, cache = self.attention_inputs[index]
            attention = attention_of(self.decoder, index - 1)
            real = self._before(index).real
            # the newest token sees what is left of the prompt, and every token of the answer: one a decode
            # step
            attn_mask = torch.cat([real, real.new_ones(len(real), self.step)], 1)[:, None]
            self.rows[index] = last_rows(attention, hidden, rotation, cache, attn_mask)[:, :, 0]
            self.ranked.append((self.step, index - 1))
        return self.rows[index]

    def _before(self, index: int) -> Stage:
        return self.stages[self.starts[self.starts.index(index) - 1]]

    def _mass(self, index: int) -> Float[Tensor, "rows heads types"]:
        """The same by type of token, as a schedule may read it."""
        types = self.types.gather(1, self._before(index).order)
        types = torch.cat([types, types.new_full((len(types), self.step), RESPONSE)], 1)
        return type_mass(self._attention(index)[:, :, None], types)[:, 0]

    def _scores(self, index: int) -> Float[Tensor, "rows left"]:
        """The same averaged over heads (FastV's ranking), for the columns that layer ``index`` may keep."""
        before = self._before(index).order
        rows = self._attention(index).mean(1)[:, : before.shape[1]]  # without the answer's tokens
        # the layer before may hold more columns than this stage: go through the prompt's own numbering
        prompt = torch.zeros_like(self.visual, dtype=rows.dtype).scatter(1, before, rows)
        return prompt.gather(1, self.stages[index].order)

    def _enter(self, index: int) -> Callable:
        """A hook that hands layer ``index`` what is left, after a drop at its entrance if there is one."""

        def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden = args[0]
            if index in self.stages:
                hidden = self._shorten(index, hidden, kwargs)
                stage, attn = self.stages[index], self.decoder.config._attn_implementation
                change = stage.prefill_kwargs if hidden.shape[1] > 1 else stage.decode_kwargs
                self.changed = {} if stage.whole else change(hidden, kwargs, str(attn))
            return (hidden, *args[1:]), kwargs | self.changed

        return hook

    def _shorten(
        self, index: int, hidden: Float[Tensor, "rows length width"], kwargs: dict[str, Any]
    ) -> Tensor:
        """Choose what stays in the layers from ``index`` on; gather it, from ``hidden`` or from the cache."""
        stage, prefill = self.stages[index], hidden.shape[1] > 1
        if prefill:  # takes over what earlier layers left
            stage = self.stages[index] = replace(self._before(index), layers=stage.layers)
        stay = self._choose(index, stage)
        if stay is None:
            return hidden
        length = int(stay.sum(1).max())
        if prefill or length < stay.shape[1]:
            # a stable sort by "stays" moves what is dropped, padding included, to the left and keeps all
            # orders
            chosen = stay.to(torch.uint8).argsort(dim=1, stable=True)[:, -length:]
            if prefill:
                hidden = gather_columns(hidden, chosen)
            else:
                caches = [kwargs["past_key_values"].layers[layer] for layer in stage.layers]
                evict(caches, chosen, stay.shape[1])
            stage.order, stay = stage.order.gather(1, chosen), stay.gather(1, chosen)
        stage.real, stage.whole = stay, False
        stage.visual = (self.visual.gather(1, stage.order) & stay).sum(1)
        stage.maskless = self.decoder.config._attn_implementation == "sdpa" and bool(stay.all())
        self.drops.append(Drop(self.step, index, stage.order.masked_fill(~stay, -1)))
        self.left[-1] = self.left[-1].clone()  # it may be the tensor of the step before
        self.left[-1][stage.layers.start :] = stage.visual
        return hidden

    def _choose(self, index: int, stage: Stage) -> Bool[Tensor, "rows left"] | None:
        """Which of the stage's columns stay; ``None`` where all do. An evicted column never comes back."""
        keep = self.schedule.entering(index, self.step, partial(self._mass, index))
        if isinstance(keep, Tensor):
            count = torch.minimum(fraction_count(self.total, keep), stage.visual)
            if bool((count == stage.visual).all()):
                return None
        elif keep >= stage.keep:
            return None
        else:
            stage.keep = keep
            count = fraction_count(self.total, keep) if keep > 0 else torch.zeros_like(self.total)
        visual = self.visual.gather(1, stage.order) & stage.real
        stay = stage.real & ~visual
        return stay | top_count(self._scores(index), count, visual) if bool(count.any()) else stay
