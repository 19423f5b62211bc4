"""A tiny Pixtral."""

from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PixtralVisionConfig

from tokensel.book.tiny.characters import LANGUAGE, TOWER, Pair, vocabulary
from tokensel.book.tiny.mistral3 import PIXTRAL, pixtral_processor

__all__ = ["pixtral"]


def pixtral() -> Pair:
    """A tower for images of any size in the class of LLaVA-1.5, one patch a token, and a Mistral."""
    words = vocabulary(PIXTRAL)
    text: dict[str, Any] = LANGUAGE | dict(head_dim=8, vocab_size=len(words), sliding_window=None)
    vision: dict[str, Any] = TOWER | dict(image_size=64, patch_size=8)
    config = LlavaConfig(
        text_config=MistralConfig(**text),
        vision_config=PixtralVisionConfig(**vision),
        image_token_index=words["[IMG]"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), pixtral_processor(patch=8, merge=1)
