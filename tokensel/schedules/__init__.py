"""Everything that drops visual tokens inside the language model, behind one signature.

A schedule returns which fraction of the prompt's visual cells enters each layer at each generation step. No
caller asks which one it holds. A new schedule is a new file and a new row in :data:`SCHEDULES`.
"""

import inspect
from typing import Any

from tokensel.schedules.clse import Clse
from tokensel.schedules.dyrate import DyRate, RatePredictor
from tokensel.schedules.fastocr import FastOcr
from tokensel.schedules.fastv import FastV
from tokensel.schedules.feather import Feather
from tokensel.schedules.priortr import PriorTR
from tokensel.schedules.prompt import Prompt
from tokensel.schedules.prune import Pruning, pruned
from tokensel.schedules.pyramiddrop import PyramidDrop
from tokensel.schedules.random_cut import RandomCut
from tokensel.schedules.rates import Exponential, Fixed
from tokensel.schedules.schedule import Schedule
from tokensel.schedules.sparsevlm import SparseVLM
from tokensel.schedules.staged import scaled_cuts
from tokensel.schedules.view import View
from tokensel.schedules.vtw import Vtw
from tokensel.utils.errors import TokenselError

__all__ = [
    "SCHEDULES",
    "Clse",
    "DyRate",
    "Exponential",
    "FastOcr",
    "FastV",
    "Feather",
    "Fixed",
    "PriorTR",
    "Prompt",
    "Pruning",
    "PyramidDrop",
    "RandomCut",
    "RatePredictor",
    "Schedule",
    "SparseVLM",
    "View",
    "Vtw",
    "cuts_at_depth",
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
    "pyramiddrop": PyramidDrop,
    "feather": Feather,
    "sparsevlm": SparseVLM,
    "priortr": PriorTR,
    "clse": Clse,
    "random-cut": RandomCut,
    "fastocr": FastOcr,
}


def schedule_options(name: str) -> tuple[str, ...]:
    """Names of the options that the schedule called ``name`` takes, read from its class.

    Raises:
        TokenselError: there is none of this name.
    """
    return tuple(_parameters(name))


def cuts_at_depth(name: str, depth: int) -> dict[str, Any]:
    """The option ``cuts`` of the schedule called ``name`` for a model of ``depth`` layers; else nothing.

    Cuts are published for 32 layers and move to the same relative depth.

    Raises:
        TokenselError: there is no schedule of this name.
    """
    cuts = _parameters(name).get("cuts")
    return {} if cuts is None else {"cuts": scaled_cuts(cuts.default, depth)}


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
