"""Files that are complete or absent: atomic writes, and safetensors whose damage is reported."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tokensel.utils.errors import CheckpointError, DiskError


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary neighbour of ``path``, then move it into place.

    A reader sees the old file or the new one, never a part of one, even after SIGKILL.

    Raises:
        DiskError: no space left on the device, or nothing can be written there; the old file stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        if _is_full(error):
            raise no_space(error, path) from None
        raise DiskError(f"{path}: cannot write here ({error.strerror}); give another folder") from None
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if _is_full(error):
            raise no_space(error, path) from None
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` atomically."""
    return write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON to ``path`` atomically."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(
    path: str | Path, tensors: dict[str, torch.Tensor], meta: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file atomically; ``meta`` is its string-to-string header."""
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return write_atomic(path, lambda part: save_file(flat, part, metadata=meta))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its header.

    Raises:
        CheckpointError: the file is missing, cut short or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())  # a method of the file, which is no dictionary
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); delete it or restore it"
        ) from None


def no_space(error: BaseException, path: str | Path) -> DiskError:
    """The error to raise where the disk is full."""
    return DiskError(f"{path}: no space left on the device; free some, or choose another folder ({error})")


def _is_full(error: BaseException) -> bool:
    # safetensors reports a full disk as an error of its own that contains the system's message
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
