"""Ways to generate in which no schedule can work, and the sliding window that an answer must not cross."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tokensel.schedules.decoder import Decoder
from tokensel.utils.errors import TokenselError

__all__ = ["check_cache", "check_options", "check_window"]

# option of generate -> values that are harmless, and why any other cannot work
UNSUPPORTED: dict[str, tuple[Iterable[Any], str]] = {
    "num_beams": ((1,), "beam search reorders the cache's rows"),
    "num_beam_groups": ((1,), "beam search reorders the cache's rows"),
    "constraints": ((), "beam search reorders the cache's rows"),
    "force_words_ids": ((), "beam search reorders the cache's rows"),
    "guidance_scale": ((1,), "guidance runs a second prompt through the same layers"),
    "prefill_chunk_size": ((), "tokens are ranked when the whole prompt was read"),
    "assistant_model": ((), "assisted decoding cuts the cache"),
    "assistant_early_exit": ((), "assisted decoding cuts the cache"),
    "prompt_lookup_num_tokens": ((), "prompt lookup cuts the cache"),
    "use_mtp": ((False,), "predicting several tokens cuts the cache"),
    "penalty_alpha": ((0,), "contrastive search repeats the cache's rows"),
    "dola_layers": ((), "its layers are compared over the whole prompt"),
    "custom_generate": ((), "code from elsewhere may do anything to the cache"),
    "cache_implementation": (("dynamic", "dynamic_full"), "only a dynamic cache in memory can shrink"),
    "past_key_values": ((), "the prompt starts with an empty cache"),
    "cache": ((), "the prompt starts with an empty cache"),
    "use_cache": ((True,), "without a cache every token would be computed again"),
}


def check_options(effective: Callable[[str], Any]) -> None:
    """Raise on ways to generate in which tokens cannot be dropped inside the model.

    Args:
        effective: from the name of an option of ``generate`` to its value, the checkpoint's defaults
            included; ``None`` where nobody set it.

    Raises:
        TokenselError: one of these ways is asked for, by the call or by the checkpoint.
    """
    for name, (harmless, why) in UNSUPPORTED.items():
        value = effective(name)
        if value is None or any(value is good or value == good for good in harmless):
            continue
        shown = value if isinstance(value, int | float | str) else type(value).__name__
        raise TokenselError(
            f"{name}={shown}, by the call or the checkpoint: {why}; leave it out when a schedule drops tokens"
        )


def check_cache(name: str, cache: Cache | None) -> None:
    """Raise where the caches of single layers cannot be shortened.

    Args:
        name: of the schedule.
        cache: what the model was given.

    Raises:
        TokenselError: a cache of fixed size, quantised or offloaded.
    """
    if cache is None:
        return
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if not isinstance(cache, DynamicCache) or kinds or getattr(cache, "offloading", False):
        raise TokenselError(
            f"{name}: this {type(cache).__name__} cannot shrink: leave cache_implementation, cache and "
            "past_key_values out when a schedule drops tokens"
        )


def check_window(name: str, decoder: Decoder, prompt: int, new: int = 1) -> None:
    """Raise where the model attends in a sliding window that prompt and answer would reach.

    The window is counted in columns of the cache, so that dropped tokens would shift it.

    Args:
        name: of the schedule.
        decoder: the language model.
        prompt: tokens of the prompt.
        new: tokens of the answer.

    Raises:
        TokenselError: they reach it.
    """
    windowed = getattr(decoder.config, "use_sliding_window", True)
    window = getattr(decoder.config, "sliding_window", None) if windowed else None
    # the answer's last token is never read
    if window is not None and prompt + new - 1 >= window:
        raise TokenselError(
            f"{name}: a prompt of {prompt} tokens and an answer of {new} reach the sliding window of "
            f"{window}, which dropped tokens would shift; give a shorter prompt, fewer max_new_tokens"
        )
