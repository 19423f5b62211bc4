"""The tiny models of :mod:`tokensel.book.tiny` as tests take them, and some that only tests need."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, Qwen3Config

from tokensel.book import tiny
from tokensel.book.tiny.characters import LANGUAGE, Pair, vocabulary
from tokensel.book.tiny.internvl import INTERN, internvl
from tokensel.cost.published import hollow
from tokensel.cost.published_families import PUBLISHED_FAMILIES
from tokensel.vlm import Vlm, load_vlm


def internvl3_5() -> Pair:
    """Its language model is a Qwen3, which normalises queries and keys head by head."""
    return internvl(Qwen3Config(**LANGUAGE, head_dim=8, vocab_size=len(vocabulary(INTERN))))


MAKERS: dict[str, Callable[..., Pair]] = tiny.MAKERS | {"internvl3_5": internvl3_5}

# towers of two layers with the width of the published ones, by family
WIDE: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": dict(hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112)
    | dict(depth=2),
    "internvl": dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=2)
    | dict(side=112, patch_size=(14, 14)),
}


def save(family: str, folder: Path, wide: bool = False) -> None:
    """Save a checkpoint of ``family`` with its processor, its tower as wide as published ones or tiny."""
    tiny.write(partial(MAKERS[family], **WIDE[family] if wide else {}), folder)


def loaded(family: str, folder: Path) -> Vlm:
    """A tiny model of ``family`` that was saved and loaded as a checkpoint."""
    save(family, folder)
    return load_vlm(folder, device="cpu")


TOWER_LAYERS, TEXT_LAYERS = 2, 1  # of a published model that are kept here


def cut_published(name: str) -> PretrainedConfig:
    """The configuration of a published model with the first layers of its two parts, and a small vocabulary.

    Widths, heads, patches, mergers and tiles stay those of the Hub.

    Args:
        name: a key of ``PUBLISHED_FAMILIES``.
    """
    config: Any = PUBLISHED_FAMILIES[name].config()
    small: Any = tiny.MAKERS[config.model_type]()[0].config
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers = TEXT_LAYERS
    text.vocab_size = small.get_text_config().vocab_size
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", TOWER_LAYERS)
    if hasattr(vision, "fullatt_block_indexes"):  # layers without windows
        vision.fullatt_block_indexes = [TOWER_LAYERS - 1]
    if hasattr(vision, "deepstack_visual_indexes"):  # layers with an output of their own
        vision.deepstack_visual_indexes = list(range(TOWER_LAYERS))
    for whole, part in ((config, small), (text, small.get_text_config())):
        for key, value in part.to_dict().items():
            if key.endswith(("_token_id", "_token_index")):
                setattr(whole, key, value)
    return config


def save_published(name: str, folder: Path, seed: int = 0) -> None:
    """Save a model of :func:`cut_published` in bfloat16, with the published image processor.

    Args:
        name: a key of ``PUBLISHED_FAMILIES``.
        folder: where to.
        seed: of the weights.
    """
    config: Any = cut_published(name)
    _, processor = tiny.MAKERS[config.model_type]()
    processor.image_processor = PUBLISHED_FAMILIES[name].image_processor()
    # what the published processor knows of the size of an image in tokens
    sizes = {"internvl": ("image_seq_length", 256), "gemma3": ("image_seq_length", 256)}
    sizes |= {"idefics3": ("image_seq_len", 81), "llava": ("patch_size", 14)}
    if config.model_type in sizes:
        setattr(processor, *sizes[config.model_type])
    # to draw half a billion numbers takes half a minute: these are repeated, at a period that is no width
    noise = torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(seed)).bfloat16()
    model = hollow(config).bfloat16().to_empty(device="cpu")
    model.tie_weights()
    for key, weight in model.named_parameters():
        values = noise.repeat(weight.numel() // len(noise) + 1)[: weight.numel()].view_as(weight)
        if weight.dim() > 1:
            # matrices that keep the size of what they read, embeddings as large as in the tiny models
            weight.data.copy_(values * (0.5 if "embed" in key else weight[0].numel() ** -0.5))
        else:
            weight.data.copy_(1 + 0.3 * values if "norm" in key else 0.1 * values)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
