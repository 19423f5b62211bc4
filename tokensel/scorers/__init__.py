"""Everything that ranks visual tokens before the language model, behind one signature.

A scorer is a callable from :class:`~tokensel.features.Features` to scores ``[tiles, tokens]``, higher = keep
first. Which scorer it is, nobody downstream asks. A new one is a new file and a new row in :data:`SCORERS`.
"""

import os
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokensel.errors import TokenselError
from tokensel.features import Features
from tokensel.scorers.cls import ClsScorer
from tokensel.scorers.diversity import DiversityScorer
from tokensel.scorers.norm import NormScorer
from tokensel.scorers.random import RandomScorer
from tokensel.scorers.selector import SelectorScorer
from tokensel.scorers.uniform import UniformScorer
from tokensel.selector import TokenSelector


@runtime_checkable
class Scorer(Protocol):
    """What a scorer is.

    Attributes:
        name: its name in tables and records.
        needs_cls_attention: whether it reads ``Features.cls_attention``.
        scope: "tile" when each row it is given is one tile of the encoder; "image" when each row must be
            all the visual tokens of one image, padded where ``Features.valid`` is False.
        adaptive: whether a score above zero means "keep", so that no budget is needed.
    """

    name: str
    needs_cls_attention: bool
    scope: str
    adaptive: bool

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]: ...


def _selector(selector: TokenSelector | str | os.PathLike | None = None, **options: Any) -> SelectorScorer:
    if selector is None:
        raise TokenselError("scorer 'selector' needs one: pass selector=, a TokenSelector or the folder or hub id of one")
    return SelectorScorer(selector, **options)


# Every factory takes (seed, selector) and its own options, so that a caller need not know which it makes.
SCORERS: dict[str, Callable[..., Scorer]] = {
    "selector": lambda seed, selector, **options: _selector(selector, **options),
    "random": lambda seed, selector, **options: RandomScorer(seed, **options),
    "uniform": lambda seed, selector, **options: UniformScorer(**options),
    "norm": lambda seed, selector, **options: NormScorer(**options),
    "cls": lambda seed, selector, **options: ClsScorer(**options),
    "diversity": lambda seed, selector, **options: DiversityScorer(**options),
}


def make_scorer(
    name: str, *, seed: int = 0, selector: TokenSelector | str | os.PathLike | None = None, **options: Any
) -> Scorer:
    """Make the scorer called ``name``.

    Args:
        name: a key of :data:`SCORERS`.
        seed: drives "random"; the others ignore it.
        selector: for "selector": a :class:`TokenSelector`, or the folder or hub id of one; the others ignore it.
        options: passed on to the scorer's class.

    Raises:
        TokenselError: an unknown name or option, a selector that is missing or cannot be loaded.
    """
    if name not in SCORERS:
        raise TokenselError(f"scorer '{name}' is unknown: choose one of {', '.join(SCORERS)}")
    try:
        return SCORERS[name](seed, selector, **options)
    except TypeError as error:
        raise TokenselError(f"scorer '{name}': {error}") from None
