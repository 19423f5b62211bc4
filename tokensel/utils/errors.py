"""The errors of the project, each a line that names the value and the fix; and checks used everywhere."""

import difflib
import operator
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any


class TokenselError(ValueError):
    """Bad input or a missing resource, reported in one clear line.

    The command line prints the line and exits with status 1; library users may catch it as a ``ValueError``.
    The subclasses are for callers who would decide differently.
    """


class HubError(TokenselError):
    """Could not be downloaded from the Hugging Face Hub and is not in its cache: try again online."""


class DiskError(TokenselError):
    """A file could not be written: the disk is full or the folder is not writable. Choose another folder."""


class CheckpointError(TokenselError):
    """A saved file is cut short, damaged, or holds something else: restore it or make it again."""


class MissingPackageError(TokenselError):
    """An optional dependency is not installed; the line has the command that installs it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import inside this what ``pip install "tokensel[extra]"`` brings.

    Raises:
        MissingPackageError: a package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise MissingPackageError(
            f"{package} is not installed: run `pip install 'tokensel[{extra}]'`"
        ) from None


def check_keep(keep: float) -> float:
    """Return ``keep`` if it is a fraction in (0, 1], else raise.

    Raises:
        TokenselError: ``keep`` is no number, NaN, 0, negative or above 1.
    """
    # NaN fails every comparison and lands here too; True is a number only to Python
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0.0 < keep <= 1.0:
        shown = repr(keep) if isinstance(keep, str) else keep
        raise TokenselError(f"keep is {shown}: give a fraction in (0, 1], such as 0.3")
    return float(keep)


def check_type(name: str, value: Any, kind: type | tuple[type, ...], give: str) -> None:
    """Raise unless ``value`` is of a type, which for numbers is none that Python counts as one by accident.

    Raises:
        TokenselError: one line with ``name``, the value and ``give``, what to give.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise TokenselError(f"{name} is {' '.join(repr(value).split())[:100]}: give {give}")


def check_count(name: str, value: Any, example: int, least: int = 1) -> int:
    """Return ``value`` as an ``int`` if it is a whole number of at least ``least``, of any library.

    Raises:
        TokenselError: it is not.
    """
    try:
        count = least - 1 if isinstance(value, bool) else operator.index(value)  # refuses 2.5 and "5"
    except TypeError:
        count = least - 1
    if count < least:
        raise TokenselError(
            f"{name} is {value!r}: give a whole number of at least {least}, such as {example}"
        )
    return count


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise on unknown options.

    Raises:
        TokenselError: one of ``names`` is not among ``known``; the line names the nearest that is.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise TokenselError(f"unknown option {name!r}: did you mean {near[0]!r}?")


def check_layers(name: str, layers: Iterable[int], count: int) -> None:
    """Refuse layers to drop tokens at that a model of ``count`` layers does not have.

    Raises:
        TokenselError: one of ``layers`` is the first, before which nothing was read, or beyond the last.
    """
    for layer in layers:
        if not 0 < layer < count:
            raise TokenselError(f"{name}: layer {layer} is not inside the {count} layers of this model")


def reason(error: Exception) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
