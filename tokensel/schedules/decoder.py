"""The language models inside which tokens can be dropped or weighed; all rotate queries and keys alike."""

from typing import Any, TypeAlias

from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model, Qwen3Model
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention, Qwen2VLTextModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention, Qwen3VLTextModel

from tokensel.utils.errors import TokenselError

__all__ = ["Attention", "Decoder", "attention_of", "cache_of", "decoder_of"]

Decoder: TypeAlias = (
    LlamaModel
    | MistralModel
    | Qwen2Model
    | Qwen3Model
    | Qwen2VLTextModel
    | Qwen2_5_VLTextModel
    | Qwen3VLTextModel
)
Attention: TypeAlias = (
    LlamaAttention
    | MistralAttention
    | Qwen2Attention
    | Qwen3Attention
    | Qwen2VLAttention
    | Qwen2_5_VLAttention
    | Qwen3VLTextAttention
)

# M-RoPE differs in how positions become cosines and sines, which happens before the first layer
MODELS = {
    "llama": LlamaModel,
    "mistral": MistralModel,
    "qwen2": Qwen2Model,
    "qwen3": Qwen3Model,
    "qwen2_vl_text": Qwen2VLTextModel,
    "qwen2_5_vl_text": Qwen2_5_VLTextModel,
    "qwen3_vl_text": Qwen3VLTextModel,
}


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The language model inside ``model``, one of :data:`MODELS`.

    Raises:
        TokenselError: another language model, or an attention implementation that takes no mask from this
            library.
    """
    core = getattr(model, "base_model", model)
    # transformers calls it text_model in Idefics3 and SmolVLM
    decoder: Any = getattr(core, "language_model", getattr(core, "text_model", core))
    if not isinstance(decoder, tuple(MODELS.values())):
        raise TokenselError(
            f"the language model is a {decoder.config.model_type}: tokens can be dropped or weighed inside "
            f"one of {', '.join(MODELS)}"
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
