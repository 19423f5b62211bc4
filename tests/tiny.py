"""A tiny LLaVA-NeXT and LLaVA-OneVision in stock classes, with their processors.

Random weights, no network, seconds on one core.

The weights are scaled up so that logits depend on what is in the image and where; with the usual
initialisation every test of equality would pass by being near zero.
"""

import inspect
import string
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tokensel.book.tiny import scale_up
from tokensel.data.features import Features
from tokensel.model.diffprune import DiffPrune, DiffPruneConfig
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.model.visionselector import VisionSelector, VisionSelectorConfig
from tokensel.vlm import Vlm
from tokensel.vlm.native import LlavaOnevisionProcessor

TILE, PATCH, WIDTH = 24, 4, 32  # 6 x 6 tokens a tile
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]  # those of LLaVA-NeXT, in units of a tile
MANY_PINPOINTS = [[TILE * i, TILE * j] for i in range(1, 7) for j in range(1, 7)]  # those of LLaVA-OneVision
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} [/INST]"
    "{% else %} {{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as the small model that ships with the book."""
    letters = [c for c in string.printable if c not in "\r\x0b\x0c\t"]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def tiny_processor(
    tile: int = TILE, patch: int = PATCH, pinpoints: list[list[int]] = PINPOINTS
) -> LlavaNextProcessor:
    """The stock processor for tiles of ``tile`` pixels cut into patches of ``patch``."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tiny_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def tiny_config(
    text: str = "llama",
    attn: str = "sdpa",
    vision: CLIPVisionConfig | None = None,
    pinpoints: list[list[int]] = PINPOINTS,
    **text_shape: int,
) -> LlavaNextConfig:
    """Three vision layers and two language layers of width 32, by default."""
    vocabulary = 4 + len(SPECIAL) + len(string.printable)
    shape = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=4096)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaNextConfig(
        vision_config=vision
        or CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
        ),
        text_config={"llama": LlamaConfig, "mistral": MistralConfig}[text](**(shape | text_shape | special)),
        image_grid_pinpoints=pinpoints,
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    config._attn_implementation = attn
    return config


def tiny_llava(
    text: str = "llama", attn: str = "sdpa", seed: int = 0
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """A LLaVA-NeXT with a CLIP tower and a Llama or Mistral, and the processor that belongs to it."""
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(tiny_config(text, attn))
    scale_up(model)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.eval(), tiny_processor()


def tiny_vlm(text: str = "llama", attn: str = "sdpa") -> Vlm:
    """:func:`tiny_llava` as the library takes it."""
    return Vlm(*tiny_llava(text, attn), "tiny")


def onevision_processor(
    tile: int = TILE,
    patch: int = PATCH,
    pinpoints: list[list[int]] = MANY_PINPOINTS,
    ratio: str = "anyres_max_9",
) -> LlavaOnevisionProcessor:
    """The stock processor without its half for videos."""
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tiny_tokenizer(),
        num_image_tokens=(tile // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        vision_aspect_ratio=ratio,
    )


def tiny_onevision(ratio: str = "anyres_max_9", seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision with a SigLIP tower and a Qwen2 that interpolates by the rule ``ratio``."""
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=110,
        max_position_embeddings=4096,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        video_token_index=109,
        vision_aspect_ratio=ratio,
        image_grid_pinpoints=MANY_PINPOINTS,
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    scale_up(model)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image of coloured noise, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# height, width: several grids, letterboxes above and below or left and right, smaller and larger than a tile
SIZES = [(40, 48), (30, 90), (24, 24), (100, 31), (17, 60)]


def ask(
    vlm: Vlm, rows: list[int | list[int] | None], questions: list[str] | None = None, seed: int = 0
) -> BatchFeature:
    """Processed rows: each an index into ``SIZES``, several of them, or no image."""
    questions = questions or [f"what{'?' * (i + 1)}" for i in range(len(rows))]
    several = [row if isinstance(row, list) else [] if row is None else [row] for row in rows]
    images = [[noise_image(*SIZES[i], seed=seed + i) for i in row] or None for row in several]
    return vlm.inputs(images, [vlm.prompt(q, len(row)) for q, row in zip(questions, several, strict=True)])


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: Mapping) -> torch.Tensor:
    """Logits of a plain forward over all places."""
    return model(**inputs).logits


def cache_argument(model: torch.nn.Module) -> str:
    """The name of the cache in a model's arguments and outputs; transformers 5.24 gives it a new one."""
    arguments = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in arguments else "past_key_values"


def tiny_selector(width: int = WIDTH) -> TokenSelector:
    """A selector with random weights."""
    torch.manual_seed(1)
    return TokenSelector(SelectorConfig(width=width, heads=4))


def tiny_learned(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What every scorer with a trained model takes, by the name of its option; with random weights."""
    torch.manual_seed(2)
    others = {"diffprune": DiffPrune(DiffPruneConfig(width=WIDTH, heads=4))}
    others["visionselector"] = VisionSelector(VisionSelectorConfig(width=WIDTH))
    return {name: model.to(device) for name, model in ({"selector": tiny_selector()} | others).items()}


class GivenScores:
    """A scorer that returns given scores, whatever the features are."""

    name, needs_cls_attention, scope, adaptive = "given", False, "tile", True

    def __init__(self, scores: torch.Tensor):
        self.scores = scores

    def __call__(self, features: Features) -> torch.Tensor:
        return self.scores
