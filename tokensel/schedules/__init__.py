"""Everything that drops visual tokens inside the language model, behind one signature.

A schedule says which fraction of the prompt's visual tokens enters each layer at each generation step. Which one it is,
nobody downstream asks. A new one is a new file and a new row in :data:`SCHEDULES`.
"""

from typing import Any

from tokensel.schedules.dyrate import DyRate, RatePredictor
from tokensel.schedules.fastv import FastV
from tokensel.schedules.prune import pruned
from tokensel.schedules.schedule import Schedule
from tokensel.schedules.steps import Exponential, Fixed
from tokensel.schedules.vtw import Vtw
from tokensel.utils.errors import TokenselError

__all__ = [
    "SCHEDULES",
    "DyRate",
    "Exponential",
    "FastV",
    "Fixed",
    "RatePredictor",
    "Schedule",
    "Vtw",
    "make_schedule",
    "pruned",
]

SCHEDULES: dict[str, type[Schedule]] = {
    "fastv": FastV,
    "vtw": Vtw,
    "dyrate": DyRate,
    "fixed": Fixed,
    "exponential": Exponential,
}


def make_schedule(name: str, **options: Any) -> Schedule:
    """The schedule called ``name``.

    Raises:
        TokenselError: there is none of this name, or an option is out of range.
    """
    if name not in SCHEDULES:
        raise TokenselError(f"schedule '{name}' is unknown: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](**options)
