"""A tiny model of each family besides LLaVA-NeXT and OneVision, in stock classes, with its processor.

Random weights scaled up as in :mod:`tiny`; a tokenizer of one token a character.
"""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import scale_up
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tokensel.vlm import Vlm, load_vlm
from tokensel.vlm.families.processors import image_processor_only, stock_processor

BASE = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = [c for c in string.printable if c not in "\r\x0b\x0c\t"]
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)


def vocabulary(special: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(BASE + special + LETTERS)}


def tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """One token a character and one for each of ``special``; ``named`` are attributes such as image_token."""
    tokens = Tokenizer(models.WordLevel(vocabulary(special), unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.add_special_tokens(BASE + special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
        padding_side="left",
    )


def template(image: str) -> str:
    """A chat template in which each image is ``image``."""
    return (
        "{% for message in messages %}[INST] "
        "{% for part in message['content'] if part['type'] == 'image' %}" + image + "\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} [/INST]"
        "{% endfor %}"
    )


QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def qwen_ids() -> dict[str, int]:
    """Ids of the special tokens by the names that a Qwen-VL configuration gives them."""
    words = vocabulary(QWEN)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: words[token] for name, token in zip(names, QWEN)}


def qwen_processor(config, patch: int = 4):
    return image_processor_only(stock_processor(config))(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, patch_size=patch
        ),
        tokenizer=tokenizer(QWEN),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen_text(**more) -> dict:
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return TEXT | special | dict(vocab_size=len(vocabulary(QWEN)), rope_parameters=rope) | more


def qwen2_vl() -> tuple[PreTrainedModel, object]:
    vision = dict(depth=3, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4)
    config = Qwen2VLConfig(text_config=qwen_text(), vision_config=vision, **qwen_ids())
    return Qwen2VLForConditionalGeneration(config), qwen_processor(config)


def qwen2_5_vl(**wide: Any) -> tuple[PreTrainedModel, object]:
    vision = dict(depth=3, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4)
    # windows of two by two tokens, so that images have several and the tower changes the order
    vision |= dict(patch_size=4, window_size=16, fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=qwen_text(), vision_config=vision | wide, **qwen_ids())
    processor = qwen_processor(config, config.vision_config.patch_size)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[PreTrainedModel, object]:
    vision = dict(depth=4, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4)
    vision |= dict(patch_size=4, num_position_embeddings=64, deepstack_visual_indexes=[0, 2])
    config = Qwen3VLConfig(text_config=qwen_text(head_dim=8), vision_config=vision, **qwen_ids())
    return Qwen3VLForConditionalGeneration(config), qwen_processor(config)


INTERN = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]


def internvl(
    text: PreTrainedConfig | None = None, side: int = 24, **wide: Any
) -> tuple[PreTrainedModel, object]:
    cells = (side // wide.get("patch_size", (4, 4))[0] // 2) ** 2
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    words = vocabulary(INTERN)
    config = InternVLConfig(
        vision_config=vision | dict(image_size=(side, side), patch_size=(4, 4)) | wide,
        text_config=text or Qwen2Config(**TEXT, vocab_size=len(words)),
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


def internvl3_5() -> tuple[PreTrainedModel, object]:
    """Its language model is a Qwen3, which normalises queries and keys head by head."""
    return internvl(Qwen3Config(**TEXT, head_dim=8, vocab_size=len(vocabulary(INTERN))))


def llava() -> tuple[PreTrainedModel, object]:
    words = vocabulary(["<image>"])
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=24, patch_size=4),
        text_config=LlamaConfig(**TEXT, vocab_size=len(words)),
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


IDEFICS = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
IDEFICS += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def idefics3(config_class=Idefics3Config, model_class=Idefics3ForConditionalGeneration, image=None, **more):
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    words = vocabulary(IDEFICS)
    config = config_class(
        vision_config=vision | dict(image_size=24, patch_size=4),
        text_config=LlamaConfig(**TEXT, vocab_size=len(words), pad_token_id=0),
        scale_factor=2,
        image_token_id=words["<image>"],
        pad_token_id=0,
    )
    processor = image_processor_only(stock_processor(config))(
        image_processor=(image or Idefics3ImageProcessorPil)(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
        ),
        tokenizer=tokenizer(IDEFICS, image_token="<image>"),
        image_seq_len=9,
        chat_template=template("<image>"),
        **more,
    )
    model = model_class(config)
    # all tokens have the same norm behind a norm with the weights that it begins with
    torch.nn.init.normal_(model.model.vision_model.post_layernorm.weight, 1.0, 0.5)
    return model, processor


def smolvlm() -> tuple[PreTrainedModel, object]:
    # its processor needs this package for the time stamps of videos, and refuses to be made without it
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    return idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil)


GEMMA = ["<image>", "<boi>", "<eoi>"]


def gemma_vision(side: int = 24) -> dict:
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return vision | dict(image_size=side, patch_size=4, vision_use_head=False)


def gemma3() -> tuple[PreTrainedModel, object]:
    words = vocabulary(GEMMA)
    text = TEXT | dict(head_dim=8, vocab_size=len(words), query_pre_attn_scalar=8, sliding_window=512)
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


def paligemma() -> tuple[PreTrainedModel, object]:
    made = tokenizer(["<image>"], image_token="<image>")
    images = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    images.image_seq_length = 36
    processor = PaliGemmaProcessor(images, made)  # adds words
    text = TEXT | dict(head_dim=8, vocab_size=len(made), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = PaliGemmaConfig(
        text_config=text | dict(model_type="gemma2", query_pre_attn_scalar=8, sliding_window=512),
        vision_config=gemma_vision() | dict(model_type="siglip_vision_model"),
        projection_dim=32,
        image_token_index=vocabulary(["<image>"])["<image>"],
    )
    model = PaliGemmaForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.vision_tower.post_layernorm.weight, 1.0, 0.5)
    return model, processor


MAKERS: dict[str, Callable[..., tuple[PreTrainedModel, object]]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "internvl3_5": internvl3_5,
    "llava": llava,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
}


# towers of two layers with the width of the published ones, by family
WIDE: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": dict(hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112)
    | dict(depth=2),
    "internvl": dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=2)
    | dict(side=448, patch_size=(14, 14)),
}


def save(family: str, folder: Path, wide: bool = False) -> None:
    """Save a checkpoint of ``family`` with its processor, its tower as wide as published ones or tiny."""
    torch.manual_seed(0)
    model, processor = MAKERS[family](**WIDE[family] if wide else {})
    scale_up(model)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def loaded(family: str, folder: Path) -> Vlm:
    """A tiny model of ``family`` that was saved and loaded as a checkpoint."""
    save(family, folder)
    return load_vlm(folder, device="cpu")
