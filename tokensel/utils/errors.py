"""The one exception of the project, a line that names the value and the fix; and the checks that several rooms need."""

import difflib
from collections.abc import Collection, Iterable


class TokenselError(ValueError):
    """Bad input or a missing resource, told in one clear line.

    The command line prints the line and exits with status 1; library users may
    catch it as a ``ValueError``.
    """


def check_keep(keep: float) -> float:
    """Return ``keep`` if it is a fraction in (0, 1], else raise.

    Raises:
        TokenselError: ``keep`` is NaN, 0, negative or above 1.
    """
    if not 0.0 < keep <= 1.0:  # NaN fails every comparison and lands here too
        raise TokenselError(f"keep is {keep}: give a fraction in (0, 1], such as 0.3")
    return float(keep)


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse what is no option.

    Raises:
        TokenselError: one of ``names`` is not among ``known``; the nearest that is, is told.
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
