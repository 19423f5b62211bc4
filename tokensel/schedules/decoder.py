"""The language models inside which tokens can be dropped; all rotate queries and keys in the same way."""

from typing import Any, TypeAlias

from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from tokensel.utils.errors import TokenselError

__all__ = ["Attention", "Decoder", "attention_of", "cache_of", "decoder_of"]

Decoder: TypeAlias = LlamaModel | MistralModel | Qwen2Model
Attention: TypeAlias = LlamaAttention | MistralAttention | Qwen2Attention

MODELS = {"llama": LlamaModel, "mistral": MistralModel, "qwen2": Qwen2Model}


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The Llama, Mistral or Qwen2 inside ``model``.

    Raises:
        TokenselError: another language model, or an attention implementation that takes no mask from this
            library.
    """
    core = getattr(model, "base_model", model)
    decoder: Any = getattr(core, "language_model", core)
    if not isinstance(decoder, tuple(MODELS.values())):
        raise TokenselError(
            f"the language model is a {decoder.config.model_type}: tokens can be dropped inside one of "
            f"{', '.join(MODELS)}"
        )
    attn = decoder.config._attn_implementation
    if attn not in ("sdpa", "eager"):
        raise TokenselError(
            f"attention '{attn}' takes no mask from this library: load the model with attn='sdpa'"
        )
    return decoder


def attention_of(decoder: Decoder, layer: int) -> Attention:
    """The attention module of a decoder layer, counted from 0."""
    attention = decoder.layers[layer].self_attn
    assert isinstance(attention, Attention)
    return attention


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among a layer's arguments: ``cache`` since transformers 5.24, before ``past_key_values``."""
    return kwargs.get("cache", kwargs.get("past_key_values"))
