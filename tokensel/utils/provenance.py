"""What a record depends on, so that results of different code, checkpoints or machines never mix."""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tokensel

# The code that generates answers and counts their cost. Training, figures and tables change no record.
CODE = (
    "budget.py",
    "cost",
    "data/features.py",
    "data/images.py",
    "data/tower.py",
    "methods.py",
    "model/gumbel.py",
    "model/layers.py",
    "model/positions.py",
    "model/selector.py",
    "schedules",
    "scorers",
    "vlm",
)
_WHOLE = 64 * 2**20  # larger files are identified by their size, their first and their last mebibyte
_END = 2**20


def json_digest(value: Any) -> str:
    """Twelve hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@cache
def code_digest() -> str:
    """Identifies the code that generates answers; comments, docstrings and layout do not count."""
    root = Path(tokensel.__file__).parent
    files = [
        path
        for name in CODE
        for path in ((root / name).rglob("*.py") if (root / name).is_dir() else [root / name])
    ]
    return json_digest(
        [[path.relative_to(root).as_posix(), _meaning(path.read_text())] for path in sorted(files)]
    )


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""  # a docstring
    return ast.dump(tree)


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
    packages = ("torch", "transformers", "datasets", "numpy", "rapidfuzz", "pillow")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"{device.type} ({_processor()}, {torch.get_num_threads()} threads)",
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"tokensel": tokensel.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
    }


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
