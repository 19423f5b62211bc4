"""A tiny InternVL."""

from typing import Any

from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedConfig, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tokensel.book.tiny.characters import LANGUAGE, TOWER, Pair, template, tokenizer, vocabulary
from tokensel.vlm.families.processors import image_processor_only, stock_processor

__all__ = ["INTERN", "internvl"]

INTERN = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]


def internvl(text: PreTrainedConfig | None = None, side: int = 24, **wide: Any) -> Pair:
    """Square tiles of ``side`` pixels, the thumbnail last; ``wide`` changes fields of the tower.

    Args:
        text: of the language model; by default that of a Qwen2.
        side: of a tile in pixels.
        wide: fields of the tower's configuration.
    """
    cells = (side // wide.get("patch_size", (4, 4))[0] // 2) ** 2
    words = vocabulary(INTERN)
    config = InternVLConfig(
        vision_config=TOWER | dict(image_size=(side, side), patch_size=(4, 4)) | wide,
        text_config=text or Qwen2Config(**LANGUAGE, vocab_size=len(words)),
        image_token_id=words["<IMG_CONTEXT>"],
        image_seq_length=cells,
    )
    processor = image_processor_only(stock_processor(config))(
        image_processor=GotOcr2ImageProcessorPil(size={"height": side, "width": side}, max_patches=4),
        tokenizer=tokenizer(
            INTERN,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_seq_length=cells,
        chat_template=template("<IMG_CONTEXT>"),
    )
    return InternVLForConditionalGeneration(config), processor
