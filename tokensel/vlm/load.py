"""Load a vision-language model with its processor from a folder or the Hugging Face Hub."""

import os
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tokensel.utils.devices import check_device, check_dtype
from tokensel.utils.errors import CheckpointError, MissingPackageError, TokenselError, reason
from tokensel.utils.loading import hub_options
from tokensel.vlm.families import family_of
from tokensel.vlm.model import Vlm
from tokensel.vlm.native import switch_off

__all__ = ["Vlm", "load_vlm"]


def load_vlm(
    name: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attn: str | None = None,
    *,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
    token: str | bool | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> Vlm:
    """Load a vision-language model and its processor from a local folder or the Hugging Face Hub.

    The families are those of :data:`tokensel.vlm.families.FAMILIES`.

    OneVision's interpolation of visual tokens is switched off (Sec. 5.2 of the paper), see
    :mod:`tokensel.vlm.native`.

    Args:
        name: folder or hub id, such as ``llava-hf/llava-v1.6-mistral-7b-hf``.
        device: a GPU if there is one, else the CPU; not together with ``device_map``.
        dtype: by default that of the checkpoint on a GPU and float32 on a CPU.
        attn: attention implementation of transformers, such as "sdpa" or "eager".
        device_map: spread the model over several devices, "auto" or a map as accelerate takes it.
        quantization_config: load quantised weights, such as a ``BitsAndBytesConfig``.
        token, revision, local_files_only, cache_dir: for the Hub, see
            :func:`~tokensel.utils.loading.hub_options`.

    Raises:
        TokenselError: nothing there under this name (or the Hub is out of reach), weights cut short or
            missing, a model of another family, an unknown device or dtype, or a missing package.
    """
    if device is not None and device_map is not None:
        raise TokenselError(f"device is {device!r} and device_map {device_map!r}: give one of them")
    place = check_device(device)
    dtype = check_dtype(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    hub = hub_options(
        name, token=token, revision=revision, local_files_only=local_files_only, cache_dir=cache_dir
    )
    given = {"device_map": device_map, "quantization_config": quantization_config}
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        family = family_of(config, str(name))
        processor: Any = family.processor(str(name), config, **hub)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attn,
            output_loading_info=True,
            **{key: value for key, value in given.items() if value is not None},
            **hub,
        )
        model, report = loaded
        if report["missing_keys"]:
            raise CheckpointError(
                f"{name}: lacks the weights {sorted(report['missing_keys'])[:3]}; fetch or save it again"
            )
        family.check(model)
        if device_map is None and getattr(model, "hf_quantizer", None) is None:
            model = model.to(place)
    except TokenselError:
        raise
    except (SafetensorError, EOFError) as error:
        raise CheckpointError(
            f"{name}: its weights are cut short or damaged ({error}); fetch or save it again"
        ) from None
    except torch.OutOfMemoryError as error:
        raise TokenselError(
            f"{name} does not fit on {place} ({reason(error)}); give device_map='auto'"
        ) from None
    except ImportError as error:  # of a quantiser or an attention implementation
        raise MissingPackageError(
            f"{name}: loading it this way needs a package that is not installed ({reason(error)})"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TokenselError(
            f"{name} holds no vision-language model with its processor ({reason(error)}); give a folder or "
            "hub id that does"
        ) from None
    _complete_tokenizer(model, processor.tokenizer)
    return Vlm(model.eval(), processor, str(name), switch_off(model, processor))


def _complete_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let the end token pad where a tokenizer has no padding token: padding is masked, any token will do."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    generation: Any = model.generation_config
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
