"""Identify the code behind a result: the files that a module reaches by its imports, by their meaning."""

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["code_digest", "reached_modules", "syntax_digest"]

PACKAGE = Path(__file__).parents[1]

# They only select a class by name. The class counts, so that a new row discards no answers.
REGISTRIES = frozenset({"tokensel.schedules", "tokensel.scorers"})
# They load, check and report; no answer depends on them.
_UNCOUNTED = ("tokensel.model.base", "tokensel.utils")


def code_digest(*modules: str, package: Path = PACKAGE) -> str:
    """Twelve hexadecimal digits that identify the code of ``modules`` and of all that they import.

    Comments, docstrings and layout do not count, nor does the version of Python that computes the digest.

    Args:
        modules: dotted names, such as ``tokensel.methods``; modules of other packages must have been
            imported.
        package: folder of the package tokensel.
    """
    return _files_digest(tuple(sorted(reached_modules(modules, package))), package)


def reached_modules(modules: Iterable[str], package: Path = PACKAGE) -> set[str]:
    """``modules`` and the modules of the package that they import, directly or through others.

    A name that a package only passes on counts as imported from the file that defines it. Registries are not
    entered: which of their classes is used is for the caller to say.
    """
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in reached or module in REGISTRIES or module.startswith(_UNCOUNTED):
            continue
        reached.add(module)
        waiting += [_defined_in(source, name, package) for source, name in _imports(module, package)]
    return reached


def syntax_digest(source: str) -> str:
    """Sixteen hexadecimal digits that identify what ``source`` does, the same under every Python.

    ``ast.dump`` differs between versions of Python: fields are added, such as the ``type_params`` of a
    function in 3.12, since 3.13 empty fields are left out, and f-strings are cut into different pieces. Here
    empty fields are always left out, and the pieces of f-strings are joined.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return hashlib.sha256(json.dumps(_structure(tree)).encode()).hexdigest()[:16]


def _is_docstring(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return False
    return isinstance(node.value.value, str)


def _structure(node: Any) -> Any:
    """A syntax tree as nested lists: the name of each node, then its fields that are not empty."""
    if isinstance(node, list):
        return [_structure(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)  # a name, a constant, a number of dots
    if isinstance(
        node, ast.Constant
    ):  # without ``kind``, which tells u"" from ""; None is a constant like others
        return ["Constant", repr(node.value)]
    if isinstance(node, ast.JoinedStr):  # versions cut the text between the braces into different pieces
        return ["JoinedStr", *_joined(node.values)]
    values = ast.iter_fields(node)
    return [
        type(node).__name__,
        *([name, _structure(value)] for name, value in values if value is not None and value != []),
    ]


def _joined(values: list[Any]) -> list[Any]:
    """The parts of an f-string, adjacent pieces of text joined."""
    parts: list[Any] = []
    for value in values:
        if not isinstance(value, ast.Constant):
            parts.append(_structure(value))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += str(value.value)
        elif value.value:
            parts.append(str(value.value))
    return parts


@cache
def _files_digest(modules: tuple[str, ...], package: Path) -> str:
    parts = [[module, syntax_digest(_read(module, package))] for module in modules]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _file(module: str, package: Path) -> Path | None:
    """The file of a module; ``None`` for no such module, or for one outside the package without a file."""
    if module.split(".")[0] != "tokensel":
        outside = getattr(sys.modules.get(module), "__file__", None)
        return Path(outside) if outside else None
    path = package.joinpath(*module.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


@cache
def _read(module: str, package: Path) -> str:
    file = _file(module, package)
    return "" if file is None else file.read_text(encoding="utf-8")  # what is typed in a notebook has no file


@cache
def _imports(module: str, package: Path) -> tuple[tuple[str, str], ...]:
    """Every name that a module imports from the package: the module it is imported from, and the name."""
    return tuple(_walk_imports(ast.parse(_read(module, package))))


def _walk_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokensel."):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("tokensel."))


def _defined_in(source: str, name: str, package: Path) -> str:
    """The module that defines ``name``, where ``source`` is the module it is imported from."""
    if name and _file(f"{source}.{name}", package) is not None:
        return f"{source}.{name}"
    file = _file(source, package)
    if file is not None and file.name == "__init__.py":
        for origin, passed_on in _imports(source, package):
            if passed_on == name:
                return _defined_in(origin, name, package)
    return source
