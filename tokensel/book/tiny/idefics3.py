"""Tiny models of Idefics3 and SmolVLM."""

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm as stock
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tokensel.book.tiny.characters import LANGUAGE, TOWER, Pair, template, tokenizer, vocabulary
from tokensel.vlm.families.processors import image_processor_only, stock_processor

__all__ = ["idefics3", "smolvlm"]

IDEFICS = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
IDEFICS += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def idefics3(
    config_class: Any = Idefics3Config,
    model_class: Any = Idefics3ForConditionalGeneration,
    image_class: Any = Idefics3ImageProcessorPil,
) -> Pair:
    """Square tiles with tags between them, the thumbnail last.

    Args:
        config_class, model_class, image_class: of Idefics3 or of SmolVLM.
    """
    words = vocabulary(IDEFICS)
    config = config_class(
        vision_config=TOWER | dict(image_size=24, patch_size=4),
        text_config=LlamaConfig(**LANGUAGE, vocab_size=len(words), pad_token_id=0),
        scale_factor=2,
        image_token_id=words["<image>"],
        pad_token_id=0,
    )
    processor = image_processor_only(stock_processor(config))(
        image_processor=image_class(size={"longest_edge": 48}, max_image_size={"longest_edge": 24}),
        tokenizer=tokenizer(IDEFICS, image_token="<image>"),
        image_seq_len=9,
        chat_template=template("<image>"),
    )
    model = model_class(config)
    # all tokens have the same norm behind a norm with the weights that it begins with
    torch.nn.init.normal_(model.model.vision_model.post_layernorm.weight, 1.0, 0.5)
    return model, processor


def smolvlm() -> Pair:
    """The same, in SmolVLM's classes."""
    # its processor needs this package for the time stamps of videos, and refuses to be made without it
    module: Any = stock
    module.num2words = module.num2words or str
    return idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil)
