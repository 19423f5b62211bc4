"""The one exception of the project: a line that names the value and the fix."""


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
