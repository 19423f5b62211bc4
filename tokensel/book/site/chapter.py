"""What every chapter needs in its first cell: the project's root, a place for results, checked parameters."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokensel.book.site import parameters
from tokensel.utils.errors import TokenselError


@dataclass(frozen=True)
class Chapter:
    """An open chapter.

    Attributes:
        name: file name without its ending, such as ``03_selector``.
        root: the project's root, also the working directory from here on.
        results: where the chapter's table belongs, ``_build/results/<name>.csv``.
        figures: folder for images that pages outside the chapter show, ``_build/figures``.
        progress: whether progress bars are wanted; not where the book runs the chapter.
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
        return "TOKENSEL_UNWATCHED" not in os.environ  # set where the outputs go on a page


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
        f"{start}: no _toc.yml with chapters/ here or above; run this inside a clone of the book, "
        "or give papermill --cwd CLONE"
    )


_started_in: Path | None = None  # where the kernel stood before its first chapter moved it to the root


def open_chapter(name: str) -> Chapter:
    """Prepare a kernel for a chapter: check its parameters, set working directory and plot style.

    The figures that are shown from here on carry their numbers, see :mod:`tokensel.book.site.numbers`. The
    kernel moves to the root of the clone that it was started in, else of the clone that the package was
    installed from, so that ``data/...`` is found from everywhere. Paths that papermill injected are seen
    from where the kernel was started. papermill itself only warns of an unknown parameter, and accepts every
    type.

    Args:
        name: the chapter's file name without its ending.

    Raises:
        TokenselError: no clone, or an injected parameter that the chapter does not have or of another type.
    """
    global _started_in
    shell = _shell()
    known, given = parameters.given_in(list(shell.user_ns.get("In", [])) if shell else [])
    if shell:  # the values themselves, since a cell written by hand may compute them
        given = {key: shell.user_ns.get(key, value) for key, value in given.items()}
    parameters.check(name, known, given)
    _started_in = _started_in or Path.cwd()
    root = _root_of_kernel(_started_in)
    if shell:
        shell.user_ns.update(parameters.from_here(known, given, _started_in, root))
    os.chdir(root)
    _quiet_libraries()
    from tokensel.book.site import numbers
    from tokensel.figures import style

    style.use()
    if shell:
        numbers.record_figures(shell)
    return Chapter(name, root)


def _root_of_kernel(here: Path) -> Path:
    try:
        return find_root(here)
    except TokenselError as error:
        try:
            return find_root(Path(__file__).parent)
        except TokenselError:
            raise error from None


def _shell() -> Any:
    """The IPython shell that runs this code; None in a plain interpreter."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def _quiet_libraries() -> None:
    # their progress bars and remarks are noise on a printed page
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
