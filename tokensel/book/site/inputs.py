"""What decides a chapter's outputs: its code, the package, the lock, ``data/``, and the files it is given."""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

from tokensel.book.site.parameters import Parameter, declared, parameters_cell

WHOLE = 2**28  # bytes up to which a given file is read; a larger one is known by its size and time of change


def digest(root: Path, path: Path, parameters: dict[str, Any]) -> str:
    """A hash over all that decides the outputs of the chapter ``path``.

    Prose is left out: a mended sentence needs no new run. Files and folders that a parameter names are
    hashed, wherever they lie, and so is the module given as a suite.
    """
    total = hashlib.sha256()
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    total.update(json.dumps([code, parameters], sort_keys=True, default=str).encode())
    for file in _always(root):
        total.update(str(file.relative_to(root)).encode() + b"\0" + _file_hash(file))
    for file in behind(root, declared(parameters_cell(path)), parameters):
        total.update(str(file).encode() + b"\0" + _file_hash(file, whole=WHOLE))
    return total.hexdigest()


def behind(root: Path, known: Mapping[str, Parameter], given: Mapping[str, Any]) -> list[Path]:
    """The files that given parameters name: files, folders, patterns, modules where the default is one."""
    found: list[Path] = []
    for name, value in sorted(given.items()):
        if not isinstance(value, str) or not value:
            continue
        default = known[name].default if name in known else None
        if isinstance(default, str) and default.startswith("tokensel."):
            found += _module_files(root, value)
        elif isinstance(default, str) and "/" in default:
            for place in sorted(glob.glob(str(root / value))):
                found += _files_in(Path(place))
    return found


def _module_files(root: Path, module: str) -> list[Path]:
    """The source of a module as a kernel in ``root`` would import it; of a package, all that it holds."""
    for base in (root, *map(Path, sys.path)):
        place = base.joinpath(*module.split("."))
        if (place / "__init__.py").is_file():
            return sorted(place.rglob("*.py"))
        if place.with_suffix(".py").is_file():
            return [place.with_suffix(".py")]
    return []


def _files_in(place: Path) -> Iterator[Path]:
    yield from sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]


def _always(root: Path) -> Iterable[Path]:
    yield root / "requirements.lock"
    for folder, pattern in (("tokensel", "*.py"), ("tokensel", "*.js"), ("data", "*")):
        yield from sorted(file for file in (root / folder).rglob(pattern) if file.is_file())


_HASHES: dict[tuple[str, int, int], bytes] = {}


def _file_hash(file: Path, whole: int | None = None) -> bytes:
    # the same checkpoint is asked for once a chapter: read it once a run
    info = os.stat(file)
    key = (str(file), info.st_mtime_ns, info.st_size)
    if whole is not None and info.st_size > whole:
        return hashlib.sha256(repr(key).encode()).digest()
    if key not in _HASHES:
        _HASHES[key] = hashlib.sha256(file.read_bytes()).digest()
    return _HASHES[key]
