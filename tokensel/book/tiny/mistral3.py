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

__all__ = ["PIXTRAL", "mistral3", "pixtral_processor"]

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
    return Mistral3ForConditionalGeneration(config), pixtral_processor(patch=4, merge=2)


def pixtral_processor(patch: int, merge: int) -> PixtralProcessor:
    """The processor of a Pixtral tower.

    Args:
        patch: side of a patch in pixels.
        merge: patches along each side of a token.
    """
    return PixtralProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": 64}, patch_size={"height": patch, "width": patch}
        ),
        tokenizer=tokenizer(PIXTRAL),
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=template("[IMG]"),
    )
