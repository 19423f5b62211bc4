"""Everything that ranks visual tokens before the language model, with one signature.

A scorer is a callable from :class:`~tokensel.data.features.Features` to scores ``[tiles, tokens]``, higher =
keep first. No caller asks which scorer it holds. A new scorer is one class in a file of its own and one row
in :data:`SCORERS`. What its constructor takes are its options. Two of them reach every scorer from the
command line and the evaluation:

- ``seed``: the scorer is stochastic; the evaluation runs it once for each seed and lists each as a row of its
    own;
- ``selector``: the scorer has a learned part, the :class:`~tokensel.model.selector.TokenSelector` under this
    name.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.scorers.cls import ClsScorer
from tokensel.scorers.diversity import DiversityScorer
from tokensel.scorers.norm import NormScorer
from tokensel.scorers.random import RandomScorer
from tokensel.scorers.selector import SelectorScorer
from tokensel.scorers.uniform import UniformScorer
from tokensel.utils.errors import TokenselError, check_names

__all__ = ["SCORERS", "Scorer", "make_scorer", "scorer_options"]


@runtime_checkable
class Scorer(Protocol):
    """What a scorer is.

    Attributes:
        name: its name in tables and records.
        needs_cls_attention: whether it reads ``Features.cls_attention``, which is computed only for those
            that do.
        scope: "tile" when each row it is given is one tile of the encoder; "image" when each row must be
            all the visual tokens of one image, padded where ``Features.valid`` is False.
        adaptive: whether a score above zero means "keep", so that no budget is needed.

    A scorer that fits only some models may also have ``check_model(config)``, which raises ``TokenselError``
    for others.
    """

    name: str
    needs_cls_attention: bool
    scope: str
    adaptive: bool

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]: ...


SCORERS: dict[str, Callable[..., Scorer]] = {
    "selector": SelectorScorer,
    "random": RandomScorer,
    "uniform": UniformScorer,
    "norm": NormScorer,
    "cls": ClsScorer,
    "diversity": DiversityScorer,
}


def scorer_options(name: str) -> tuple[str, ...]:
    """The options of the scorer called ``name``: what its constructor takes.

    Raises:
        TokenselError: an unknown name.
    """
    if not isinstance(name, str) or name not in SCORERS:
        raise TokenselError(f"scorer '{name}' is unknown: choose one of {', '.join(SCORERS)}")
    return tuple(inspect.signature(SCORERS[name]).parameters)


def make_scorer(name: str, **options: Any) -> Scorer:
    """Make the scorer called ``name``.

    Args:
        name: a key of :data:`SCORERS`.
        options: for the scorer's constructor, such as ``seed`` (of "random") and ``selector`` (of "selector":
            a :class:`~tokensel.model.selector.TokenSelector`, or the folder or hub id of one). Options of
            other scorers are ignored, so that a caller may pass all it has whichever scorer it makes.

    Raises:
        TokenselError: an unknown name, an option that no scorer has, a selector that is missing or cannot be
            loaded.
    """
    own = scorer_options(name)
    check_names(options, {option for other in SCORERS for option in scorer_options(other)})
    return SCORERS[name](**{option: value for option, value in options.items() if option in own})
