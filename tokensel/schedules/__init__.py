"""Everything that drops visual tokens inside the language model, behind one signature.

A schedule says which fraction of the prompt's visual tokens enters each layer. Which one it is, nobody downstream asks. A
new one is a new file and a new row in :data:`SCHEDULES`.
"""

from collections.abc import Callable

from tokensel.errors import TokenselError
from tokensel.schedules.fastv import FastV
from tokensel.schedules.prune import Schedule, pruned
from tokensel.schedules.vtw import Vtw

__all__ = ["SCHEDULES", "FastV", "Schedule", "Vtw", "make_schedule", "pruned"]

SCHEDULES: dict[str, Callable[..., Schedule]] = {"fastv": FastV, "vtw": Vtw}


def make_schedule(name: str, **options: float | int) -> Schedule:
    """The schedule called ``name``.

    Raises:
        TokenselError: there is none of this name, or an option is out of range.
    """
    if name not in SCHEDULES:
        raise TokenselError(f"schedule '{name}' is unknown: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](**options)
