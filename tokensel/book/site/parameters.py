"""The parameters of a chapter: declared in its parameters cell, given by -p or papermill, checked at once."""

import ast
import difflib
import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokensel.utils.errors import TokenselError

TYPES = {"bool": bool, "float": float, "int": int, "list": list, "str": str}
WORDS = {
    "bool": "True or False",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "str": "a text",
}
INJECTED = "# Parameters\n"  # how papermill starts the cell with the parameters it was given


@dataclass(frozen=True)
class Parameter:
    """A parameter that a chapter declares, such as ``keep: float = 0.3``.

    Attributes:
        kinds: the types it takes, by name: one of :data:`TYPES`, and "None" where the annotation allows it;
            empty, which takes every value, if the annotation is missing or another.
        default: its default value; None if that is computed.
    """

    kinds: tuple[str, ...]
    default: Any


def parse_parameters(pairs: list[str]) -> dict[str, Any]:
    """``["keep=0.3", "model=some/folder"]`` as a dictionary; what is no Python literal stays text.

    Raises:
        TokenselError: a pair without ``=``.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise TokenselError(f"parameter '{pair}': write NAME=VALUE, such as keep=0.3")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def parameters_cell(path: Path) -> str:
    """The source of a chapter's parameters cell; empty for a notebook without one."""
    import nbformat  # slow, and not needed where a chapter is only opened

    cells = nbformat.read(path, as_version=4).cells
    return next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), "")


def declared(code: str) -> dict[str, Parameter]:
    """What the top level of a parameters cell assigns, by name in order."""
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = _literal(node.value) if node.value else None
            found[node.target.id] = Parameter(_kinds(node.annotation), default)
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= {name: Parameter((), _literal(node.value)) for name in names}
    return found


def given_in(cells: list[str]) -> tuple[dict[str, Parameter], dict[str, Any]]:
    """The parameters that a notebook declares and those it was given, from the cells its kernel has run.

    papermill puts its cell right after the one it overrides and starts it with :data:`INJECTED`. In a session
    both may have been run several times: the last run counts. Nothing was given where the parameters cell
    itself ran last.
    """
    given: dict[str, Any] | None = None
    for cell in reversed(cells):
        if given is None and cell.startswith(INJECTED):
            given = {name: parameter.default for name, parameter in declared(cell).items()}
        elif _declares(cell):
            return (declared(cell), given) if given is not None else ({}, {})
    return {}, {}


def check(chapter: str, known: Mapping[str, Parameter], given: Mapping[str, Any]) -> None:
    """Check the names and types of the parameters that a chapter is given.

    A whole number will do where a number is wanted, not the other way round; the items of a list are
    compared with those of the default.

    Raises:
        TokenselError: an unknown name, with the nearest that there is; a value of another type, with how to
            write it.
    """
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known) or 'none'}"
            raise TokenselError(f"{chapter} has no parameter '{name}': {hint}")
        wanted = known[name]
        if wanted.kinds and not any(_fits(value, kind) for kind in wanted.kinds):
            words = " or ".join(WORDS.get(kind, kind) for kind in wanted.kinds)
            raise TokenselError(
                f"{chapter}: {name} = {value!r} is not {words}; {_example(name, value, wanted)}"
            )
        if "list" in wanted.kinds and isinstance(value, list) and isinstance(wanted.default, list):
            kinds = {type(item).__name__ for item in wanted.default} & TYPES.keys()
            for item in value:
                if kinds and not any(_fits(item, kind) for kind in kinds):
                    words = " or ".join(sorted(WORDS[kind] for kind in kinds))
                    example = _example(name, wanted.default, wanted)
                    raise TokenselError(f"{chapter}: {item!r} in {name} is not {words}; {example}")


def from_here(
    known: Mapping[str, Parameter], given: Mapping[str, Any], here: Path, root: Path
) -> dict[str, Any]:
    """The given parameters, with paths that exist where the user stands as the root of the book sees them.

    A text is taken for a path if the default is one, and if something lies there; others, such as a name on
    the hub or a path from the root, stay as they are.
    """
    seen = dict(given)
    for name, value in given.items():
        default = known[name].default if name in known else None
        if here == root or not (
            isinstance(value, str) and value and isinstance(default, str) and "/" in default
        ):
            continue
        place = Path(os.path.normpath(here / value))
        if place.exists() or glob.glob(str(place)):
            seen[name] = str(place.relative_to(root) if place.is_relative_to(root) else place)
    return seen


def _declares(code: str) -> bool:
    """Whether a cell only assigns, and declares the type of at least one name: a parameters cell."""
    try:
        body = ast.parse(code).body
    except SyntaxError:  # a cell with magics
        return False
    return any(isinstance(node, ast.AnnAssign) for node in body) and all(
        isinstance(node, ast.AnnAssign | ast.Assign) for node in body
    )


def _kinds(annotation: ast.expr) -> tuple[str, ...]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        left, right = _kinds(annotation.left), _kinds(annotation.right)
        return (*left, *right) if left and right else ()
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value)
        inner = _kinds(annotation.slice)
        return (*inner, "None") if outer == "Optional" and inner else _kinds(annotation.value)
    name = ast.unparse(annotation)
    return (name,) if name in TYPES or name == "None" else ()


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "float":
        node = node.args[0]  # papermill writes infinities and not-a-number as float('inf')
        return float(ast.literal_eval(node))
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _fits(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, (float, int) if kind == "float" else TYPES[kind])


def _example(name: str, value: Any, wanted: Parameter) -> str:
    """How to write a value of the type that is wanted, as near to the given one as can be guessed."""
    if "list" not in wanted.kinds:
        example = wanted.default
    elif isinstance(value, str):
        example = [item.strip() for item in value.split(",")]
    else:
        example = value if isinstance(value, list) else [value]
    command = f"-p {name}={example}" if not isinstance(example, list | str) else f'-p "{name}={example}"'
    yaml = f""" or, to papermill, -y "{name}: {example}\"""" if isinstance(example, list) else ""
    return f"give {command}{yaml}"
