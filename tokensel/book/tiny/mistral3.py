"""A tiny Mistral 3."""

from typing import Any

from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tokensel.book.tiny.characters import LANGUAGE, TOWER, Pair, template, tokenizer, vocabulary
from tokensel.vlm.families.mistral3 import PixtralProcessor

__all__ = ["mistral3"]

PIXTRAL = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]


def mistral3() -> Pair:
    """A Pixtral tower for images of any size, four patches a token, and a Mistral."""
    words = vocabulary(PIXTRAL)
    text: dict[str, Any] = LANGUAGE | dict(head_dim=8, vocab_size=len(words), sliding_window=None)
    vision: dict[str, Any] = TOWER | dict(image_size=64, patch_size=4)
    config = Mistral3Config(
        text_config=MistralConfig(**text),
        vision_config=PixtralVisionConfig(**vision),
        image_token_index=words["[IMG]"],
        tie_word_embeddings=False,
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": 64}, patch_size={"height": 4, "width": 4}
        ),
        tokenizer=tokenizer(PIXTRAL),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=template("[IMG]"),
    )
    return Mistral3ForConditionalGeneration(config), processor
