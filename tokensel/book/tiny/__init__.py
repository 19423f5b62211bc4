"""A tiny checkpoint of every family, in the stock classes of transformers, with random weights.

Nothing is downloaded, and each takes less than a second. Such a model knows nothing: it shows shapes,
equality and cost, never how good an answer is. A family is a function that makes a model and its processor,
and a row of :data:`MAKERS`.
"""

import os
from collections.abc import Callable

import torch

from tokensel.book.tiny.characters import Pair
from tokensel.book.tiny.gemma import gemma3, paligemma
from tokensel.book.tiny.idefics3 import idefics3, smolvlm
from tokensel.book.tiny.internvl import internvl
from tokensel.book.tiny.llava import llava
from tokensel.book.tiny.mistral3 import mistral3
from tokensel.book.tiny.pixtral import pixtral
from tokensel.book.tiny.qwen import qwen2_5_vl, qwen2_vl, qwen3_vl
from tokensel.utils.errors import check_names

__all__ = ["MAKERS", "save_tiny", "scale_up", "write"]

# by the keys of tokensel.vlm.families.FAMILIES
MAKERS: dict[str, Callable[[], Pair]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "llava": llava,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "mistral3": mistral3,
    "pixtral": pixtral,
}


def scale_up(model: torch.nn.Module) -> None:
    """Make every matrix an approximate isometry, so that images and positions show in the logits.

    With the usual initialisation every logit is near zero, and every comparison of two models would hold.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        elif "embed" in name or "newline" in name:
            torch.nn.init.normal_(weight, std=0.5)


def write(maker: Callable[[], Pair], folder: str | os.PathLike, seed: int = 0) -> None:
    """Save what ``maker`` makes as a checkpoint.

    Args:
        maker: makes a model and its processor.
        folder: where to.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = maker()
        scale_up(model)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_tiny(family: str, folder: str | os.PathLike, seed: int = 0) -> None:
    """Save a tiny checkpoint of a family with its processor, for :func:`~tokensel.vlm.load_vlm`.

    Args:
        family: a key of :data:`MAKERS`.
        folder: where to.
        seed: of the weights.

    Raises:
        TokenselError: another family.
    """
    check_names([family], MAKERS)
    write(MAKERS[family], folder, seed)
