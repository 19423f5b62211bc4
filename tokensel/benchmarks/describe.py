"""What each method is, read from the registry: where it acts, what it needs, where it comes from."""

import re
import sys
from dataclasses import dataclass

from tokensel.methods import check_method, methods
from tokensel.schedules import SCHEDULES, schedule_options
from tokensel.scorers.lowest import LOWEST

__all__ = ["PLACES", "Description", "all_methods", "describe"]

BEFORE, MERGED, INSIDE = "before the model", "merged before the model", "inside the model"
PLACES = (BEFORE, MERGED, INSIDE)
_BRACKET = re.compile(r" ?\([^()]*arXiv[^()]*\)")
_SOURCE = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Description:
    """One method.

    Attributes:
        name: as :func:`~tokensel.methods.check_method` takes it.
        place: one of ``PLACES``; a method that chooses before the model and drops inside it has both.
        trained: whether a part of it is trained.
        needs: what it reads besides the visual tokens: trained parts, attention, the question, a seed.
        idea: the first line of its documentation, without name and source.
        source: the arXiv number of its paper; "" where it is a baseline, or the paper of this book.
    """

    name: str
    place: str
    trained: bool
    needs: tuple[str, ...]
    idea: str
    source: str


def all_methods() -> list[str]:
    """Every method of the registry, schedules last; without the combinations and the ``lowest-`` controls."""
    return [*methods(), *SCHEDULES]


def describe(name: str) -> Description:
    """Describe the method called ``name``.

    Raises:
        TokenselError: there is none of this name.
    """
    row = check_method(name)
    classes = row.classes()
    needs = [f"a trained {row.learned}"] if row.learned is not None else []
    needs += ["a trained rate predictor"] if row.uses_predictor else []
    needs += ["CLS attention"] if row.needs_cls_attention else []
    parts = {"needs_question": "the question", "needs_projection": "the projector's output"}
    needs += [text for part, text in parts.items() if any(getattr(c, part, False) for c in classes)]
    needs += ["the question", "the language model's attention"] if row.uses_question else []
    needs += ["a seed"] if row.uses_seed else []
    # a schedule ranks by what the question attends to, unless it draws lots or takes all
    withdraws = row.schedule is not None and getattr(SCHEDULES[row.schedule], "withdraws", False)
    if row.schedule is not None and not withdraws and "seed" not in schedule_options(row.schedule):
        needs.append("the language model's attention")
    needs += ["a model that compresses"] if row.uses_native else []
    places = []
    if row.chooses:
        merges = name.removeprefix(LOWEST).startswith("pool") or any(hasattr(c, "merge") for c in classes)
        places.append(MERGED if merges else BEFORE)
    places += [INSIDE] if row.schedule is not None else []
    # a method without a class is a function, and says itself what it does
    text = sys.modules[classes[0].__module__].__doc__ if classes else row.run.__doc__
    first = (text or "").split("\n", 1)[0]
    found = _SOURCE.search(first)
    # "Name (source): idea", with a source in brackets at another place perhaps
    before, _, after = _BRACKET.sub("", first).partition(": ")
    return Description(
        name,
        ", then ".join(places),
        trained=row.learned is not None or row.uses_predictor,
        needs=tuple(needs),
        idea=(after or before).strip().rstrip("."),
        source=found[1] if found else "",
    )
