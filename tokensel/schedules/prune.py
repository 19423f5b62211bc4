"""Drop visual tokens inside a stock language model: gathered away, not masked, so that time and cache are saved.

Hooks on the decoder layers shorten the prompt where a schedule says so: hidden states, positions and mask are gathered,
and the layers from there on cache only what reaches them. While the answer grows, a schedule may let go of more: then the
caches of those layers are gathered too. The model's attention stays as fast as it was; the one row of attention that ranks
the tokens is computed beside it, at the one layer that needs it, and only when something goes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.budget import fraction_count, top_count
from tokensel.schedules.attention import RESPONSE, last_rows, token_types, type_mass
from tokensel.schedules.schedule import Schedule
from tokensel.utils.errors import TokenselError, check_layers

MODELS = ("llama", "mistral", "qwen2")  # all rotate queries and keys alike


@contextmanager
def pruned(
    model: PreTrainedModel,
    visual: Bool[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    schedule: Schedule,
) -> Iterator["Pruning"]:
    """While this lasts, ``model`` drops visual tokens of one prompt as ``schedule`` says.

    >>> with pruned(model, reduced.visual, reduced["attention_mask"], FastV(layer=2, keep=0.5)):
    ...     model.generate(**reduced)

    Args:
        model: a LLaVA whose language model is a Llama, Mistral or Qwen2, or such a language model.
        visual: True at the prompt's visual tokens, newlines among them.
        attention_mask: 1 at real tokens, 0 at padding.
        schedule: what stays.

    Raises:
        TokenselError: another language model, a schedule that names layers it does not have, a prompt without
            visual tokens, or attention in a sliding window.
    """
    pruning = Pruning(decoder_of(model), visual, attention_mask, schedule)
    try:
        yield pruning
    finally:
        pruning.remove()


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The Llama, Mistral or Qwen2 inside ``model``.

    Raises:
        TokenselError: another language model, or an attention that takes no mask of ours.
    """
    core = getattr(model, "base_model", model)
    decoder = getattr(core, "language_model", core)
    kind = decoder.config.model_type
    if kind not in MODELS:
        raise TokenselError(
            f"the language model is a {kind}: tokens can be dropped inside one of {', '.join(MODELS)}"
        )
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        raise TokenselError(
            f"attention '{decoder.config._attn_implementation}' takes no mask of ours: load the model with attn='sdpa'"
        )
    return decoder


@dataclass
class _Stage:
    """What is left of the prompt in the layers from one drop to the next.

    Attributes:
        layers: those layers.
        order: columns of the prompt that are left, in their old order.
        real: which of them are, the others being padding.
        visual: how many of them are visual tokens, row by row.
        keep: the smallest fraction asked for so far, where all rows were asked for the same.
        whole: nothing was dropped yet, here or in earlier layers.
        open: every column is real, and the model's attention does without a mask.
    """

    layers: range
    order: Int[Tensor, "rows left"]
    real: Bool[Tensor, "rows left"]
    visual: Int[Tensor, "rows"]
    keep: float = 1.0
    whole: bool = True
    open: bool = False


@dataclass(frozen=True)
class Drop:
    """That tokens went: at which generation step (0 reads the prompt), at the entrance of which layer, and what is left.

    ``columns`` are the prompt's columns that are left, row by row; -1 where a row has fewer than the longest.
    """

    step: int
    layer: int
    columns: Int[Tensor, "rows left"]


class Pruning:
    """The hooks of one prompt, and what they did.

    Attributes:
        drops: each time that tokens went.
        left: for each generation step the visual tokens that every layer holds, ``[layers, rows]``; newlines count.
        ranked: step and layer of every row of attention that was computed beside the model's own.
    """

    def __init__(self, decoder: nn.Module, visual: Tensor, attention_mask: Tensor, schedule: Schedule):
        count = len(decoder.layers)
        check_layers(schedule.name, schedule.layers(), count)
        if not bool(visual.any(1).all()):
            raise TokenselError(f"{schedule.name}: a prompt has no visual tokens, there is nothing to drop")
        windowed = getattr(decoder.config, "use_sliding_window", True)
        window = getattr(decoder.config, "sliding_window", None) if windowed else None
        if window is not None and visual.shape[1] >= window:
            raise TokenselError(
                f"{schedule.name}: a prompt of {visual.shape[1]} tokens is longer than the sliding window of {window}, "
                "which dropped tokens would shift; give shorter prompts, or a model without such a window"
            )
        self.decoder, self.schedule = decoder, schedule
        self.visual, self.prompt = visual, attention_mask.bool()
        self.types, self.total = token_types(visual, self.prompt), visual.sum(1)
        self.drops: list[Drop] = []
        self.left: list[Int[Tensor, "layers rows"]] = []
        self.ranked: list[tuple[int, int]] = []
        self.step = 0
        self.starts = (0, *sorted(schedule.layers()))
        self.stages: dict[int, _Stage] = {}  # by the first of their layers
        self.given: dict[str, Any] = {}  # what the layers of a stage are given at this step, computed once
        self.looking: dict[int, tuple] = {}  # what the attention before a drop was given at this step
        self.rows: dict[int, Tensor] = {}  # the attention its last token paid
        self.hooks = [decoder.layers[0].register_forward_pre_hook(self._begin)]
        for layer in schedule.layers():
            attention = decoder.layers[layer - 1].self_attn
            self.hooks.append(attention.register_forward_hook(self._look(layer), with_kwargs=True))
        for index in range(min(schedule.layers(), default=count), count):
            hook = self._enter(index)
            self.hooks.append(decoder.layers[index].register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks away: the model is what it was."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _begin(self, _layer: nn.Module, args: tuple) -> None:
        """A further token is a further step; a prompt starts afresh, nothing has been dropped of it yet."""
        self.rows.clear()
        if args[0].shape[1] == 1:
            self.step += 1
            self.left.append(self.left[-1])
            return
        ends = (*self.starts[1:], len(self.decoder.layers))
        columns = torch.arange(self.prompt.shape[1], device=self.prompt.device).expand_as(self.prompt)
        whole = {"order": columns, "real": self.prompt, "visual": self.total}
        self.stages = {start: _Stage(range(start, end), **whole) for start, end in zip(self.starts, ends)}
        self.step, self.left = 0, [self.total.expand(len(self.decoder.layers), -1)]
        self.drops, self.ranked = [], []

    def _look(self, index: int):
        """Remember what the attention before layer ``index`` was given, in case its last token's attention is asked for."""

        def hook(attention: nn.Module, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
            names = ("hidden_states", "position_embeddings", "past_key_values")
            self.looking[index] = (attention, *(kwargs[name] for name in names))

        return hook

    def _attention(self, index: int) -> Float[Tensor, "rows heads keys"]:
        """What the newest token attended to in the layer before ``index``, computed at most once a step."""
        if index not in self.rows:
            attention, hidden, rotation, cache = self.looking[index]
            real = self._before(index).real
            seen = torch.cat([real, real.new_ones(len(real), self.step)], 1)[:, None]
            self.rows[index] = last_rows(attention, hidden, rotation, cache, seen)[:, :, 0]
            self.ranked.append((self.step, index - 1))
        return self.rows[index]

    def _before(self, index: int) -> _Stage:
        return self.stages[self.starts[self.starts.index(index) - 1]]

    def _mass(self, index: int) -> Float[Tensor, "rows heads types"]:
        """The same by type of token, as a schedule may read it."""
        types = self.types.gather(1, self._before(index).order)
        types = torch.cat([types, types.new_full((len(types), self.step), RESPONSE)], 1)
        return type_mass(self._attention(index)[:, :, None], types)[:, 0]

    def _scores(self, index: int) -> Float[Tensor, "rows left"]:
        """The same averaged over heads (FastV's ranking), for the columns that are left behind layer ``index``."""
        before = self._before(index).order
        rows = self._attention(index).mean(1)[:, : before.shape[1]]
        return (
            torch.zeros_like(self.visual, dtype=rows.dtype)
            .scatter(1, before, rows)
            .gather(1, self.stages[index].order)
        )

    def _enter(self, index: int):
        def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden = args[0]
            if index in self.stages:
                hidden = self._shorten(index, hidden, kwargs)
                stage, prompt = self.stages[index], hidden.shape[1] > 1
                self.given = (
                    {} if stage.whole else (self._prompt if prompt else self._further)(stage, hidden, kwargs)
                )
            return (hidden, *args[1:]), kwargs | self.given

        return hook

    def _shorten(
        self, index: int, hidden: Float[Tensor, "rows length width"], kwargs: dict[str, Any]
    ) -> Tensor:
        """Choose what stays in the layers from ``index`` on. The rest is gathered away, from ``hidden`` or from the cache."""
        stage, prompt = self.stages[index], hidden.shape[1] > 1
        if prompt:  # takes over what earlier layers left
            stage = self.stages[index] = replace(self._before(index), layers=stage.layers)
        stay = self._choose(index, stage)
        if stay is None:
            return hidden
        length = int(stay.sum(1).max())
        if prompt or length < stay.shape[1]:
            # a stable sort by "stays" sends what goes, padding included, to the left and moves nothing past another
            chosen = stay.to(torch.uint8).argsort(dim=1, stable=True)[:, -length:]
            if prompt:
                hidden = gather_columns(hidden, chosen)
            else:
                _evict(
                    [kwargs["past_key_values"].layers[layer] for layer in stage.layers], chosen, stay.shape[1]
                )
            stage.order, stay = stage.order.gather(1, chosen), stay.gather(1, chosen)
        stage.real, stage.whole = stay, False
        stage.visual = (self.visual.gather(1, stage.order) & stay).sum(1)
        stage.open = self.decoder.config._attn_implementation == "sdpa" and bool(stay.all())
        self.drops.append(Drop(self.step, index, stage.order.masked_fill(~stay, -1)))
        self.left[-1] = self.left[-1].clone()
        self.left[-1][stage.layers.start :] = stage.visual
        return hidden

    def _choose(self, index: int, stage: _Stage) -> Bool[Tensor, "rows left"] | None:
        """Which of the stage's columns stay; ``None`` where all do. What is gone never comes back."""
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

    def _prompt(self, stage: _Stage, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positions and mask of what is left, out of those of the whole prompt."""
        given = {
            "position_embeddings": tuple(
                gather_columns(part, stage.order) for part in kwargs["position_embeddings"]
            )
        }
        if kwargs.get("position_ids") is not None:
            given["position_ids"] = gather_columns(kwargs["position_ids"], stage.order)
        if stage.open:
            return given | {"attention_mask": None}
        length = hidden.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        itself = torch.eye(
            length, dtype=torch.bool, device=hidden.device
        )  # padding looks at itself: no softmax over nothing
        return given | {
            "attention_mask": self._as_given((causal & stage.real[:, None, :] | itself)[:, None], hidden)
        }

    def _further(self, stage: _Stage, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The mask for a token behind the prompt."""
        if stage.open:
            return {"attention_mask": None}
        new = kwargs["past_key_values"].layers[stage.layers.start].keys.shape[-2] + 1 - stage.real.shape[1]
        mask = torch.cat([stage.real, stage.real.new_ones(len(stage.real), new)], 1)[:, None, None]
        return {"attention_mask": self._as_given(mask, hidden)}

    def _as_given(self, mask: Bool[Tensor, "rows 1 queries keys"], hidden: Tensor) -> Tensor:
        if self.decoder.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(hidden.dtype).min
        )


def _evict(layers: list[Any], chosen: Int[Tensor, "rows kept"], prompt: int) -> None:
    """Keep the ``chosen`` of the first ``prompt`` columns in the caches of some layers, and all that follow these."""
    new = torch.arange(prompt, layers[0].keys.shape[-2], device=chosen.device).expand(len(chosen), -1)
    columns = torch.cat([chosen, new], 1)
    for layer in layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)  # [rows, heads, columns, width]
            setattr(layer, name, gather_columns(states.transpose(1, 2), columns).transpose(1, 2).contiguous())


def gather_columns(states: Tensor, order: Int[Tensor, "rows kept"]) -> Tensor:
    """``states`` [rows or 1, length, ...] at the columns of ``order``."""
    states = states.expand(len(order), *states.shape[1:])
    index = order.view(*order.shape, *[1] * (states.ndim - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
