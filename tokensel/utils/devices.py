"""Where tensors live, and in which precision: checks of what a user names, and the device of a module.

One rule holds in the whole library. Tensors that a model computes with are on that model's device; where a
model is spread over several, each tensor is on the device of the module that it enters. Whole numbers that
only decide what is kept (layouts, counts, masks of cells) stay on the host.
"""

import torch
from torch import nn

from tokensel.utils.errors import TokenselError

__all__ = ["check_device", "check_dtype", "device_of"]

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
}


def check_device(device: torch.device | str | None = None) -> torch.device:
    """The device of this name; ``None`` and "auto" mean a GPU if there is one, else the CPU.

    Raises:
        TokenselError: an unknown name, or a device that this machine does not have.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise TokenselError(f"device is {device!r}: give cpu, cuda, cuda:1 or auto") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise TokenselError(
            f"device is '{found}', but PyTorch finds {torch.cuda.device_count()} CUDA GPUs here: "
            "give cpu or auto"
        )
    if found.type not in ("cpu", "cuda", "meta"):
        backend = getattr(torch, found.type, None)  # such as torch.mps or torch.xpu
        if backend is None or not getattr(backend, "is_available", lambda: False)():
            raise TokenselError(f"device is '{found}', which PyTorch cannot use here: give cpu or auto")
    return found


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating-point type of this name; ``None`` and "auto" give ``None``.

    Raises:
        TokenselError: no name of a type that models are run in.
    """
    if dtype is None or dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise TokenselError(f"dtype is {dtype!r}: give auto, float32, bfloat16 or float16")
    return found


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes: where its inputs have to be.

    With ``device_map`` accelerate notes on each module where it runs; offloaded weights are elsewhere until
    then.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
