"""What every chapter needs in its first cell: the project's root, a place for its results, and checked parameters."""

import ast
import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokensel.utils.errors import TokenselError


@dataclass(frozen=True)
class Chapter:
    """An open chapter.

    Attributes:
        name: file name without its ending, such as ``03_selector``.
        root: the project's root, also the working directory from here on.
        results: where the chapter's table belongs, ``_build/results/<name>.csv``.
        figures: folder for pictures that pages outside the chapter show, ``_build/figures``.
        progress: whether somebody watches, so that long work shows its progress; not where the book runs the chapter.
    """

    name: str
    root: Path

    @property
    def results(self) -> Path:
        return _folder(self.root / "_build" / "results") / f"{self.name}.csv"

    @property
    def figures(self) -> Path:
        return _folder(self.root / "_build" / "figures")

    @property
    def progress(self) -> bool:
        return UNWATCHED not in os.environ


# in the environment of a kernel whose outputs go on a page: progress bars are no part of it
UNWATCHED = "TOKENSEL_UNWATCHED"


@contextmanager
def unwatched() -> Iterator[None]:
    """Kernels started meanwhile show no progress bars, and show their figures whatever MPLBACKEND says here."""
    settings = {UNWATCHED: "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def find_root(start: str | Path = ".") -> Path:
    """The folder above ``start`` (or ``start`` itself) that holds the book's table of contents.

    Raises:
        TokenselError: there is none.
    """
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "_toc.yml").is_file() and (folder / "chapters").is_dir():
            return folder
    raise TokenselError(
        f"{start}: no _toc.yml with chapters/ here or above; run this inside a clone of the book"
    )


def open_chapter(name: str) -> Chapter:
    """Go to the project's root, so that ``data/...`` works wherever the kernel was started, and set the plot style.

    Also refuses parameters that the chapter does not know: papermill on its own only prints a remark about
    them and goes on with the defaults.

    Args:
        name: the chapter's file name without its ending.

    Raises:
        TokenselError: outside a clone of the book, or a parameter was injected that the chapter does not have.
    """
    refuse_unknown(name, *given_parameters(_cells_of_kernel()))
    root = find_root()
    os.chdir(root)
    _quiet_libraries()
    from tokensel.book.site import numbers
    from tokensel.figures import style

    style.use()
    if shell := _shell():
        numbers.record_figures(shell)
    return Chapter(name, root)


def refuse_unknown(chapter: str, known: list[str], given: list[str]) -> None:
    """Raise if a name in ``given`` is not in ``known``.

    Raises:
        TokenselError: with the nearest name the chapter does know.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known) or 'none'}"
            raise TokenselError(f"{chapter} has no parameter '{name}': {hint}")


def assigned_names(code: str) -> list[str]:
    """Names that the top level of ``code`` assigns, in order: what a parameters cell defines."""
    names = []
    for node in ast.parse(code).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def given_parameters(cells: list[str]) -> tuple[list[str], list[str]]:
    """The parameters a notebook knows and those it was given, from the cells that its kernel has run so far.

    papermill puts its cell right behind the one it overrides and starts it with the comment ``# Parameters``.
    Without such a cell nothing was given.
    """
    for before, cell in zip(cells, cells[1:]):
        if cell.startswith("# Parameters\n"):
            return assigned_names(before), assigned_names(cell)
    return [], []


def _shell() -> Any:
    """The IPython shell that runs this code; None in a plain interpreter."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def _cells_of_kernel() -> list[str]:
    shell = _shell()
    return list(shell.user_ns.get("In", [])) if shell else []


def _quiet_libraries() -> None:
    # their progress bars and remarks are noise on a printed page
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
