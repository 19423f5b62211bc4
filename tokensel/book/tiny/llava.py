"""A tiny LLaVA-1.5."""

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tokensel.book.tiny.characters import LANGUAGE, TOWER, Pair, template, tokenizer, vocabulary

__all__ = ["llava"]


def llava() -> Pair:
    """One square tile an image, CLIP and Llama."""
    words = vocabulary(["<image>"])
    vision: dict[str, Any] = TOWER | dict(intermediate_size=64)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=24, patch_size=4),
        text_config=LlamaConfig(**LANGUAGE, vocab_size=len(words)),
        image_token_index=words["<image>"],
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
        ),
        tokenizer=tokenizer(["<image>"], image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return LlavaForConditionalGeneration(config), processor
