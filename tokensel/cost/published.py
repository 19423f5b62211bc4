"""The shapes of four published models, so that their cost can be counted without downloading them.

The values are those of the configurations under these ids on the Hub. Figs. 4 and 5 of the paper use
LLaVA-NeXT, Figs. 6 and 7 LLaVA-OneVision; it does not say of which size and with which language model.
"""

from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from tokensel.utils.errors import TokenselError

CLIP: dict[str, Any] = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
    vocab_size=32000,
)
SIGLIP: dict[str, Any] = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    vision_use_head=False,
)
MISTRAL: dict[str, Any] = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32064,
    max_position_embeddings=32768,
    rope_theta=1e6,
    sliding_window=None,
    rms_norm_eps=1e-5,
)
VICUNA: dict[str, Any] = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
QWEN2_7B: dict[str, Any] = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152128,
    max_position_embeddings=32768,
    rope_theta=1e6,
)
QWEN2_HALF_B: dict[str, Any] = dict(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=152000,
    max_position_embeddings=32768,
    rope_theta=1e6,
    tie_word_embeddings=True,
)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# id on the hub: language model and its shape; the family decides the rest
PUBLISHED: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llava-hf/llava-v1.6-mistral-7b-hf": (MistralConfig, MISTRAL),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (LlamaConfig, VICUNA),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (Qwen2Config, QWEN2_7B),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (Qwen2Config, QWEN2_HALF_B),
}


def published_config(
    name: str, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> PretrainedConfig:
    """The configuration of a published model.

    Args:
        name: a key of :data:`PUBLISHED`.
        vision: fields of the vision tower to change, such as the number of layers.
        text: fields of the language model to change.

    Raises:
        TokenselError: another name.
    """
    if name not in PUBLISHED:
        raise TokenselError(
            f"'{name}': the shapes known here are those of {', '.join(PUBLISHED)}; give one of them"
        )
    kind, shape = PUBLISHED[name]
    language = kind(**(shape | (text or {})))
    tied = language.tie_word_embeddings
    if kind is Qwen2Config:
        tower = SiglipVisionConfig(**(SIGLIP | (vision or {})))
        return LlavaOnevisionConfig(vision_config=tower, text_config=language, tie_word_embeddings=tied)
    tower = CLIPVisionConfig(**(CLIP | (vision or {})))
    return LlavaNextConfig(
        vision_config=tower,
        text_config=language,
        image_token_index=32000,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )


def hollow(config: PretrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights: enough to count them, and to lay out tokens."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
