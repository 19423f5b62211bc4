"""What a record depends on, so that results of different code, checkpoints or machines never mix."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tokensel

_WHOLE = 64 * 2**20  # larger files are identified by their size, their first and their last mebibyte
_END = 2**20
_PACKAGES = ("torch", "transformers", "datasets", "numpy", "rapidfuzz", "pillow")


def json_digest(value: Any) -> str:
    """Twelve hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def checkpoint_digest(name: str, commit: str | None = None) -> str:
    """Identifies a checkpoint: by the files of a folder, or by id and commit on the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        return json_digest([name, commit])
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja")
    )
    return json_digest([[path.relative_to(folder).as_posix(), _content(path)] for path in files])


def _content(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        head = file.read(_END)
        file.seek(-_END, os.SEEK_END)
        return hashlib.sha256(str(size).encode() + head + file.read()).hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and package versions, for the provenance."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return {
        "device": device_name(device, threads),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"tokensel": tokensel.__version__} | package_versions(_PACKAGES),
    }


def device_name(device: torch.device, more: str = "") -> str:
    """What a GPU is called; of other devices the type and the processor, with ``more`` behind it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({_processor()}{more})"


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; ``None`` where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_line() -> str | None:
    """The command line of this process, or ``None`` where it is not tokensel's."""
    program = Path(sys.argv[0])
    is_tokensel = "tokensel" in (program.name, program.parent.name)  # the script, or python -m tokensel
    return shlex.join(["python", "-m", "tokensel", *sys.argv[1:]]) if is_tokensel else None
