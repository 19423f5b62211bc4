"""Everything that drops visual tokens inside the language model, behind one signature.

A schedule returns which fraction of the prompt's visual cells enters each layer at each generation step. No
caller asks which one it holds. A new schedule is a new file and a new row in :data:`SCHEDULES`.
"""

import inspect
from typing import Any

from tokensel.schedules.dyrate import DyRate, RatePredictor
from tokensel.schedules.fastv import FastV
from tokensel.schedules.prompt import Prompt
from tokensel.schedules.prune import Pruning, pruned
from tokensel.schedules.rates import Exponential, Fixed
from tokensel.schedules.schedule import Schedule
from tokensel.schedules.vtw import Vtw
from tokensel.utils.errors import TokenselError

__all__ = [
    "SCHEDULES",
    "DyRate",
    "Exponential",
    "FastV",
    "Fixed",
    "Prompt",
    "Pruning",
    "RatePredictor",
    "Schedule",
    "Vtw",
    "make_schedule",
    "pruned",
    "schedule_options",
]

SCHEDULES: dict[str, type[Schedule]] = {
    "fastv": FastV,
    "vtw": Vtw,
    "dyrate": DyRate,
    "fixed": Fixed,
    "exponential": Exponential,
}


def schedule_options(name: str) -> tuple[str, ...]:
    """Names of the options that the schedule called ``name`` takes, read from its class.

    Raises:
        TokenselError: there is none of this name.
    """
    return tuple(_parameters(name))


def make_schedule(name: str, **options: Any) -> Schedule:
    """Make the schedule called ``name``.

    >>> make_schedule("fastv", layer=2, keep=0.5)
    FastV(layer=2, keep=0.5, newline='keep')

    Raises:
        TokenselError: there is none of this name, it has no such option, an option is missing or of another
            type, or out of range.
    """
    parameters = _parameters(name)
    for option in options:
        if option not in parameters:
            raise TokenselError(
                f"schedule '{name}' has no option '{option}': it takes {', '.join(parameters) or 'none'}"
            )
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise TokenselError(f"schedule '{name}' needs its option '{option}': give {option}=")
    return SCHEDULES[name](**options)


def _parameters(name: Any) -> dict[str, inspect.Parameter]:
    if not isinstance(name, str) or name not in SCHEDULES:
        raise TokenselError(f"schedule {name!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    return dict(inspect.signature(SCHEDULES[name]).parameters)
