"""The tiny models of :mod:`tokensel.book.tiny` as tests take them, and some that only tests need."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from tokensel.book import tiny
from tokensel.book.tiny.characters import LANGUAGE, Pair, vocabulary
from tokensel.book.tiny.internvl import INTERN, internvl
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
    | dict(side=448, patch_size=(14, 14)),
}


def save(family: str, folder: Path, wide: bool = False) -> None:
    """Save a checkpoint of ``family`` with its processor, its tower as wide as published ones or tiny."""
    tiny.write(partial(MAKERS[family], **WIDE[family] if wide else {}), folder)


def loaded(family: str, folder: Path) -> Vlm:
    """A tiny model of ``family`` that was saved and loaded as a checkpoint."""
    save(family, folder)
    return load_vlm(folder, device="cpu")
