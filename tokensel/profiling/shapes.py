"""Configurations at true size, to measure without a checkpoint: latency depends on shapes, not on weights."""

from collections.abc import Callable

from transformers import CLIPVisionConfig, LlavaNextConfig, PretrainedConfig, Qwen2Config

from tokensel.cost.published import CLIP, PINPOINTS, published_config


def llava_next(text: PretrainedConfig) -> LlavaNextConfig:
    """A LLaVA-NeXT with any language model, its usual tower (CLIP ViT-L/14 at 336 pixels) and grids."""
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def qwen2_half_billion() -> LlavaNextConfig:
    """LLaVA-NeXT with the shape of Qwen2-0.5B: 358 million parameters in its layers, for two CPU cores."""
    return llava_next(
        Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
        )
    )


def mistral_7b() -> PretrainedConfig:
    """The shape of llava-hf/llava-v1.6-mistral-7b-hf."""
    return published_config("llava-hf/llava-v1.6-mistral-7b-hf")


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llava-next-0.5b": qwen2_half_billion,
    "llava-next-7b": mistral_7b,
}
