"""Tiny models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from typing import Any

from transformers import (
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tokensel.book.tiny.characters import LANGUAGE, Pair, template, tokenizer, vocabulary
from tokensel.vlm.families.processors import image_processor_only, stock_processor

__all__ = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]

QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def qwen_ids() -> dict[str, Any]:
    """Ids of the special tokens by the names that a Qwen-VL configuration gives them."""
    words = vocabulary(QWEN)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: words[token] for name, token in zip(names, QWEN)}


def qwen_processor(config: PreTrainedConfig, patch: int = 4) -> Any:
    return image_processor_only(stock_processor(config))(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, patch_size=patch
        ),
        tokenizer=tokenizer(QWEN),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen_text(**more: Any) -> dict[str, Any]:
    special: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return LANGUAGE | special | dict(vocab_size=len(vocabulary(QWEN)), rope_parameters=rope) | more


def qwen2_vl() -> Pair:
    """Three vision layers, images of any size."""
    vision: dict[str, Any] = dict(
        depth=3, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4
    )
    config = Qwen2VLConfig(text_config=qwen_text(), vision_config=vision, **qwen_ids())
    return Qwen2VLForConditionalGeneration(config), qwen_processor(config)


def qwen2_5_vl(**wide: Any) -> Pair:
    """As Qwen2-VL, with attention windows in the tower; ``wide`` changes fields of the tower."""
    vision: dict[str, Any] = dict(
        depth=3, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4
    )
    # windows of two by two tokens, so that images have several and the tower changes the order
    vision |= dict(patch_size=4, window_size=16, fullatt_block_indexes=[1])
    vision |= wide
    config = Qwen2_5_VLConfig(text_config=qwen_text(), vision_config=vision, **qwen_ids())
    return Qwen2_5_VLForConditionalGeneration(config), qwen_processor(config, vision["patch_size"])


def qwen3_vl() -> Pair:
    """Features of two further layers of the tower enter inside the language model."""
    vision: dict[str, Any] = dict(
        depth=4, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4
    )
    vision |= dict(patch_size=4, num_position_embeddings=64, deepstack_visual_indexes=[0, 2])
    config = Qwen3VLConfig(text_config=qwen_text(head_dim=8), vision_config=vision, **qwen_ids())
    return Qwen3VLForConditionalGeneration(config), qwen_processor(config)
