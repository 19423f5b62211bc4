"""Drop visual tokens inside a stock language model: gathered away, not masked, so that time and cache are saved.

Hooks on the decoder layers shorten the prompt where a schedule says so: hidden states, positions and mask are gathered,
and the layers from there on cache only what reaches them. The model's attention stays as fast as it was; the one row of
attention that ranks the tokens is computed beside it, at the one layer that needs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokensel.budget import fraction_count, top_count
from tokensel.errors import TokenselError

MODELS = ("llama", "mistral", "qwen2")  # all rotate queries and keys alike
UNSUPPORTED = {
    "num_beams": "beam search reorders the cache's rows",
    "assistant_model": "assisted decoding cuts the cache",
    "prompt_lookup_num_tokens": "prompt lookup cuts the cache",
    "cache_implementation": "a cache of fixed size has no room to shrink",
    "use_cache": "without a cache every token would be computed again",
}


@runtime_checkable
class Schedule(Protocol):
    """Which visual tokens stay, by layer."""

    name: str

    def entering(self, layer: int) -> float:
        """Fraction of the prompt's visual tokens that enters ``layer``, counted from 0; it never grows."""

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""


def check_options(options: dict[str, Any]) -> None:
    """Refuse ways to generate in which dropping inside the model cannot work.

    Raises:
        TokenselError: one of them is asked for.
    """
    for name, why in UNSUPPORTED.items():
        harmless = {"num_beams": 1, "use_cache": True}.get(name)
        if options.get(name) not in (None, harmless):
            raise TokenselError(f"{name}={options[name]!r}: {why}; leave it out when a schedule drops tokens")


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
    pruning = Pruning(_decoder(model), visual, attention_mask, schedule)
    try:
        yield pruning
    finally:
        pruning.remove()


def _decoder(model: PreTrainedModel) -> nn.Module:
    core = getattr(model, "base_model", model)
    decoder = getattr(core, "language_model", core)
    kind = decoder.config.model_type
    if kind not in MODELS:
        raise TokenselError(f"the language model is a {kind}: tokens can be dropped inside one of {', '.join(MODELS)}")
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        raise TokenselError(
            f"attention '{decoder.config._attn_implementation}' takes no mask of ours: load the model with attn='sdpa'"
        )
    return decoder


class Pruning:
    """The hooks of one prompt, and what they did.

    Attributes:
        columns: for each layer at which tokens were dropped, the prompt's columns that enter it, row by row;
            -1 where a row has fewer than the longest.
    """

    def __init__(self, decoder: nn.Module, visual: Tensor, attention_mask: Tensor, schedule: Schedule):
        count = len(decoder.layers)
        for layer in schedule.layers():
            if not 0 < layer < count:
                raise TokenselError(f"{schedule.name}: layer {layer} is not inside the {count} layers of this model")
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
        self.real = self.prompt
        self.total = visual.sum(1)
        self.columns: dict[int, Int[Tensor, "rows kept"]] = {}
        self.order: Tensor | None = None  # columns of the prompt that are left, padding at the left
        self.left: Tensor | None = None  # which of them are real; None if all are and the model needs no mask
        self.ok: dict[int, Tensor | None] = {}  # the same by layer, for the tokens that follow the prompt
        self.given: dict[str, Any] = {}  # what the layers up to the next drop are given, computed once
        self.scores: Tensor | None = None
        self.hooks = [decoder.layers[0].register_forward_pre_hook(self._begin)]
        for layer in schedule.layers():
            if schedule.entering(layer) > 0:
                attention = decoder.layers[layer - 1].self_attn
                self.hooks.append(attention.register_forward_hook(self._rank, with_kwargs=True))
        for index in range(min(schedule.layers(), default=count), count):
            hook = self._enter(index)
            self.hooks.append(decoder.layers[index].register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks away: the model is what it was."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _begin(self, _layer: nn.Module, args: tuple) -> None:
        """A prompt, not a further token, starts afresh: nothing has been dropped of it yet."""
        if args[0].shape[1] > 1:
            self.order, self.real = None, self.prompt

    def _rank(self, attention: nn.Module, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
        """Keep what the last token attends to in this layer, if this is the prompt."""
        hidden = kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            real = self.real if self.order is None else self.real.gather(1, self.order)
            self.scores = last_row(attention, hidden, kwargs["position_embeddings"], kwargs["past_key_values"], real).mean(1)

    def _enter(self, index: int):
        def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden = args[0]
            if hidden.shape[1] == 1 and index in self.ok:
                return args, kwargs | {"attention_mask": self._step_mask(index, hidden, kwargs["past_key_values"])}
            if index in self.schedule.layers():
                hidden = self._shorten(index, hidden)
                self.given = self._prompt(hidden, kwargs)
            self.ok[index] = self.left
            return (hidden, *args[1:]), kwargs | self.given

        return hook

    def _shorten(self, index: int, hidden: Float[Tensor, "rows length width"]) -> Float[Tensor, "rows kept width"]:
        """Choose what enters the layer, and gather it: the rest is gone from here on."""
        before = self.order
        if before is None:
            before = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        visual, real = self.visual.gather(1, before), self.real.gather(1, before)
        keep = self.schedule.entering(index)
        stay = real & ~visual
        if keep > 0:
            stay = stay | top_count(self.scores, fraction_count(self.total, keep), visual)
        length = int(stay.sum(1).max())
        # a stable sort by "stays" sends what goes, padding included, to the left and moves nothing past another
        chosen = stay.to(torch.uint8).argsort(dim=1, stable=True)[:, -length:]
        real_after = stay.gather(1, chosen)
        self.order = before.gather(1, chosen)
        self.real = self.real.scatter(1, self.order, real_after)
        self.columns[index] = self.order.masked_fill(~real_after, -1)
        return _gather(hidden, chosen)

    def _prompt(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positions and mask of what is left, out of those of the whole prompt."""
        real, length = self.real.gather(1, self.order), hidden.shape[1]
        needs_none = self.decoder.config._attn_implementation == "sdpa" and bool(real.all())
        self.left = None if needs_none else real
        given = {"position_embeddings": tuple(_gather(part, self.order) for part in kwargs["position_embeddings"])}
        if kwargs.get("position_ids") is not None:
            given["position_ids"] = _gather(kwargs["position_ids"], self.order)
        if needs_none:
            return given | {"attention_mask": None}
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)  # padding looks at itself: no softmax over nothing
        return given | {"attention_mask": self._as_given((causal & real[:, None, :] | itself)[:, None], hidden)}

    def _step_mask(self, index: int, hidden: Tensor, cache: Cache) -> Tensor | None:
        ok = self.ok[index]
        if ok is None:
            return None
        new = cache.layers[index].keys.shape[-2] + 1 - ok.shape[1]
        return self._as_given(torch.cat([ok, ok.new_ones(len(ok), new)], 1)[:, None, None], hidden)

    def _as_given(self, mask: Bool[Tensor, "rows 1 queries keys"], hidden: Tensor) -> Tensor:
        if self.decoder.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill_(~mask, torch.finfo(hidden.dtype).min)


def last_row(
    attention: nn.Module,
    hidden: Float[Tensor, "rows length width"],
    rotation: tuple[Tensor, Tensor],
    cache: DynamicCache | None,
    real: Bool[Tensor, "rows length"],
) -> Float[Tensor, "rows heads length"]:
    """Attention that the last token pays in one layer: one row of the matrix, not the matrix.

    Args:
        attention: the layer's attention, of a Llama, Mistral or Qwen2.
        hidden: what it was given.
        rotation: cosine and sine of the positions.
        cache: where its keys are, if they were kept.
        real: False at padding.
    """
    rows, length, _ = hidden.shape
    cosine, sine = rotation

    def heads(states: Tensor) -> Tensor:
        return states.view(rows, states.shape[1], -1, attention.head_dim).transpose(1, 2)

    query = heads(attention.q_proj(hidden[:, -1:]))
    query, _ = apply_rotary_pos_emb(query, query, cosine[:, -1:], sine[:, -1:])
    if cache is not None and len(cache.layers) > attention.layer_idx and cache.layers[attention.layer_idx].is_initialized:
        keys = cache.layers[attention.layer_idx].keys
    else:
        keys = heads(attention.k_proj(hidden))
        _, keys = apply_rotary_pos_emb(keys, keys, cosine, sine)
    keys = keys.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ keys.transpose(2, 3) * attention.scaling).float()
    return logits.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)[:, :, 0]


def _gather(states: Tensor, order: Int[Tensor, "rows kept"]) -> Tensor:
    """``states`` [rows or 1, length, ...] at the columns of ``order``."""
    states = states.expand(len(order), *states.shape[1:])
    index = order.view(*order.shape, *[1] * (states.ndim - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
