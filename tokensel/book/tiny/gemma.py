"""Tiny models of Gemma 3 and PaliGemma."""

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tokensel.book.tiny.characters import LANGUAGE, TOWER, Pair, template, tokenizer, vocabulary

__all__ = ["gemma3", "paligemma"]

GEMMA = ["<image>", "<boi>", "<eoi>"]


def gemma_vision(side: int = 24) -> dict[str, Any]:
    return TOWER | dict(image_size=side, patch_size=4, vision_use_head=False)


def gemma3() -> Pair:
    """One square image whose tokens are means of four patches; half of its layers have a window."""
    words = vocabulary(GEMMA)
    text = LANGUAGE | dict(head_dim=8, vocab_size=len(words), query_pre_attn_scalar=8, sliding_window=512)
    layers = ["sliding_attention", "full_attention"] * 2
    config = Gemma3Config(
        text_config=text | dict(layer_types=layers, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        vision_config=gemma_vision(48),
        mm_tokens_per_image=36,
        boi_token_index=words["<boi>"],
        eoi_token_index=words["<eoi>"],
        image_token_index=words["<image>"],
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 48, "width": 48}),
        tokenizer=tokenizer(GEMMA, image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"),
        image_seq_length=36,
        chat_template=template("<boi>"),
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=32**-0.5)
    # all tokens have the same norm behind a norm with the weights that it begins with
    torch.nn.init.normal_(model.model.vision_tower.post_layernorm.weight, 1.0, 0.5)
    return model, processor


def paligemma() -> Pair:
    """One square image, with Gemma 2 for its language model."""
    words = tokenizer(["<image>"], image_token="<image>")
    images: Any = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    images.image_seq_length = 36
    processor = PaliGemmaProcessor(images, words)  # adds words
    text = LANGUAGE | dict(head_dim=8, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = PaliGemmaConfig(
        text_config=text | dict(model_type="gemma2", query_pre_attn_scalar=8, sliding_window=512),
        vision_config=gemma_vision() | dict(model_type="siglip_vision_model"),
        projection_dim=32,
        image_token_index=vocabulary(["<image>"])["<image>"],
    )
    model = PaliGemmaForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.vision_tower.post_layernorm.weight, 1.0, 0.5)
    return model, processor
