"""The shapes of published models of the other families, to count their cost without downloading them.

The values are those of the configurations under these ids on the Hub, and of the image processors beside
them. :mod:`tokensel.cost.published` has LLaVA-NeXT and LLaVA-OneVision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    PaliGemmaConfig,
    PixtralVisionConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tokensel.cost.published import CLIP, QWEN2_7B, VICUNA
from tokensel.utils.errors import TokenselError
from tokensel.vlm.families import family_of

__all__ = ["PUBLISHED_FAMILIES", "PublishedModel", "image_grids"]


@dataclass(frozen=True)
class PublishedModel:
    """The shape of a published model.

    Attributes:
        config: makes its configuration.
        image_processor: makes its image processor.
    """

    config: Callable[[], PretrainedConfig]
    image_processor: Callable[[], Any]


QWEN2_VL_7B: dict[str, Any] = QWEN2_7B | dict(vocab_size=152064)
SIGLIP_SO: dict[str, Any] = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14
)


def _qwen2_vl() -> PretrainedConfig:
    vision: dict[str, Any] = dict(depth=32, embed_dim=1280, hidden_size=3584, mlp_ratio=4, patch_size=14)
    return Qwen2VLConfig(text_config=QWEN2_VL_7B, vision_config=vision)


def _qwen2_5_vl() -> PretrainedConfig:
    vision: dict[str, Any] = dict(depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
    vision |= dict(patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    return Qwen2_5_VLConfig(text_config=QWEN2_VL_7B, vision_config=vision)


def _qwen3_vl() -> PretrainedConfig:
    text = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32)
    text |= dict(num_key_value_heads=8, head_dim=128, vocab_size=151936)
    vision: dict[str, Any] = dict(depth=27, hidden_size=1152, intermediate_size=4304, out_hidden_size=4096)
    vision |= dict(patch_size=16, deepstack_visual_indexes=[8, 16, 24])
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def _internvl() -> PretrainedConfig:
    text: dict[str, Any] = QWEN2_7B | dict(vocab_size=151674)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    return InternVLConfig(text_config=Qwen2Config(**text), vision_config=vision, tie_word_embeddings=False)


def _llava() -> PretrainedConfig:
    return LlavaConfig(text_config=LlamaConfig(**VICUNA), vision_config=CLIPVisionConfig(**CLIP))


def _smolvlm() -> PretrainedConfig:
    text: dict[str, Any] = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24)
    text |= dict(num_attention_heads=32, num_key_value_heads=32, vocab_size=49155)
    vision = SIGLIP_SO | dict(image_size=384)
    return Idefics3Config(text_config=LlamaConfig(**text), vision_config=vision, scale_factor=3)


def _gemma3() -> PretrainedConfig:
    text = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8)
    text |= dict(num_key_value_heads=4, head_dim=256, vocab_size=262208, sliding_window=1024)
    vision = SIGLIP_SO | dict(image_size=896, vision_use_head=False)
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


def _paligemma() -> PretrainedConfig:
    text: dict[str, Any] = dict(model_type="gemma2", hidden_size=2304, intermediate_size=9216, head_dim=256)
    text |= dict(num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, vocab_size=257216)
    vision = SIGLIP_SO | dict(model_type="siglip_vision_model", image_size=448, vision_use_head=False)
    return PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2304)


def _mistral3() -> PretrainedConfig:
    text: dict[str, Any] = dict(hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, head_dim=128)
    text |= dict(num_attention_heads=32, num_key_value_heads=8, vocab_size=131072, sliding_window=None)
    vision: dict[str, Any] = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    vision |= dict(num_attention_heads=16, image_size=1540, patch_size=14)
    return Mistral3Config(
        text_config=MistralConfig(**text),
        vision_config=PixtralVisionConfig(**vision),
        tie_word_embeddings=False,
    )


def _square(make: Callable[..., Any], side: int, **options: Any) -> Any:
    return make(size={"height": side, "width": side}, **options)


# by the id on the Hub
PUBLISHED_FAMILIES: dict[str, PublishedModel] = {
    "Qwen/Qwen2-VL-7B-Instruct": PublishedModel(_qwen2_vl, Qwen2VLImageProcessorPil),
    "Qwen/Qwen2.5-VL-7B-Instruct": PublishedModel(_qwen2_5_vl, Qwen2VLImageProcessorPil),
    "Qwen/Qwen3-VL-8B-Instruct": PublishedModel(
        _qwen3_vl,
        lambda: Qwen2VLImageProcessorPil(
            patch_size=16, size={"shortest_edge": 256**2, "longest_edge": 4096**2}
        ),
    ),
    "OpenGVLab/InternVL3-8B-hf": PublishedModel(
        _internvl, lambda: _square(GotOcr2ImageProcessorPil, 448, crop_to_patches=True)
    ),
    "llava-hf/llava-1.5-7b-hf": PublishedModel(
        _llava,
        lambda: CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    ),
    "HuggingFaceTB/SmolVLM-Instruct": PublishedModel(
        _smolvlm,
        lambda: Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * 384}, max_image_size={"longest_edge": 384}
        ),
    ),
    "google/gemma-3-4b-it": PublishedModel(_gemma3, lambda: _square(Gemma3ImageProcessorPil, 896)),
    "google/paligemma2-3b-mix-448": PublishedModel(_paligemma, lambda: _square(SiglipImageProcessorPil, 448)),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": PublishedModel(
        _mistral3,
        lambda: PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size={"height": 28, "width": 28}),
    ),
}


def image_grids(name: str, height: int, width: int) -> Int[Tensor, "tiles 2"]:
    """Rows and columns of the tokens of each tile that a published model makes of an image.

    Args:
        name: a key of :data:`PUBLISHED_FAMILIES`.
        height, width: of the image in pixels.

    Raises:
        TokenselError: another name.
    """
    if name not in PUBLISHED_FAMILIES:
        raise TokenselError(
            f"'{name}': the shapes known here are those of {', '.join(PUBLISHED_FAMILIES)}; give one of them"
        )
    model = PUBLISHED_FAMILIES[name]
    config = model.config()
    family = family_of(config)
    # the image processor itself cuts a black image of this size, so that no rule of it is written twice
    tiles = family.cut(model.image_processor(), Image.new("RGB", (width, height)), whole=False)
    joined = {key: torch.cat([tile[key] for tile in tiles]) for key in tiles[0]}
    grid = family.tiles_layout(config, joined).grid
    assert grid is not None, "these families have no newlines"
    return grid
