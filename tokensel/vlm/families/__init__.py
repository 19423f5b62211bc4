"""The model families whose visual tokens can be dropped: a file and a row each."""

from typing import Any

from tokensel.utils.errors import TokenselError
from tokensel.vlm.families.base import Family, Located
from tokensel.vlm.families.gemma import Gemma3, PaliGemma
from tokensel.vlm.families.idefics3 import Idefics3
from tokensel.vlm.families.internvl import InternVl
from tokensel.vlm.families.llava import Llava
from tokensel.vlm.families.llava_next import LlavaNext
from tokensel.vlm.families.llava_onevision import LlavaOnevision
from tokensel.vlm.families.mistral3 import Mistral3
from tokensel.vlm.families.pixtral import Pixtral
from tokensel.vlm.families.qwen3_vl import Qwen3Vl
from tokensel.vlm.families.qwen_vl import QwenVl

__all__ = ["FAMILIES", "Family", "Located", "check_tiled", "family_key", "family_of"]

# by family_key(), which is the model_type of the configuration but for Pixtral
FAMILIES: dict[str, Family] = {
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "qwen2_vl": QwenVl(),
    "qwen2_5_vl": QwenVl(),
    "qwen3_vl": Qwen3Vl(),
    "internvl": InternVl(),
    "llava": Llava(),
    "idefics3": Idefics3(),
    "smolvlm": Idefics3(),
    "gemma3": Gemma3(),
    "paligemma": PaliGemma(),
    "mistral3": Mistral3(),
    "pixtral": Pixtral(),
}

_LINEAR = (
    "most of its language layers are linear attention, which folds all tokens into one state, so that to "
    "drop a token is not to hide it"
)
# models that would take a shortened prompt, and why it would not be what is promised here
UNFIT = {"qwen3_5": _LINEAR, "qwen3_5_moe": _LINEAR}


def family_key(config: Any) -> str:
    """Under which key a configuration has its row in :data:`FAMILIES`, if it has one.

    That is its ``model_type``. Only Pixtral shares its own with LLaVA-1.5, and goes by that of its tower.
    """
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return "pixtral" if (config.model_type, tower) == ("llava", "pixtral") else config.model_type


def family_of(config: Any, name: str = "the model") -> Family:
    """The family of a model, by its configuration.

    Args:
        config: the model's configuration.
        name: what to call the model in an error.

    Raises:
        TokenselError: a model of another family.
    """
    if config.model_type in UNFIT:
        raise TokenselError(
            f"{name} is a {config.model_type}: {UNFIT[config.model_type]}; give another, such as a Qwen3-VL"
        )
    if family_key(config) not in FAMILIES:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise TokenselError(
            f"{name} is a {config.model_type}, which is none of the families known here: give one of {known}"
        )
    return FAMILIES[family_key(config)]


def check_tiled(config: Any, what: str) -> None:
    """Raise where a command is for LLaVA-NeXT and LLaVA-OneVision alone.

    Args:
        config: the model's configuration.
        what: the command, to name in the error.

    Raises:
        TokenselError: a model of another family.
    """
    if not family_of(config).tiled:
        raise TokenselError(
            f"{what} is for LLaVA-NeXT and LLaVA-OneVision alone, and this is a {family_key(config)}: give "
            "one of them"
        )
