"""Everything that ranks visual tokens before the language model, behind one signature.

A scorer is a callable from :class:`~tokensel.data.features.Features` to scores ``[tiles, tokens]``, higher = keep
first. Which scorer it is, nobody downstream asks. A new one is a new file and a new row in :data:`SCORERS`.
"""

import os
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.model.selector import TokenSelector
from tokensel.scorers.cls import ClsScorer
from tokensel.scorers.diversity import DiversityScorer
from tokensel.scorers.norm import NormScorer
from tokensel.scorers.random import RandomScorer
from tokensel.scorers.selector import SelectorScorer
from tokensel.scorers.uniform import UniformScorer
from tokensel.utils.errors import TokenselError


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


def _selector(selector: TokenSelector | str | os.PathLike | None) -> SelectorScorer:
    if selector is None:
        raise TokenselError(
            "scorer 'selector' needs one: pass selector=, a TokenSelector or the folder or hub id of one"
        )
    return SelectorScorer(selector)


# Every factory takes (seed, selector), so that a caller need not know which of them it uses.
SCORERS: dict[str, Callable[..., Scorer]] = {
    "selector": lambda seed, selector: _selector(selector),
    "random": lambda seed, selector: RandomScorer(seed),
    "uniform": lambda seed, selector: UniformScorer(),
    "norm": lambda seed, selector: NormScorer(),
    "cls": lambda seed, selector: ClsScorer(),
    "diversity": lambda seed, selector: DiversityScorer(),
}


def make_scorer(
    name: str, *, seed: int = 0, selector: TokenSelector | str | os.PathLike | None = None
) -> Scorer:
    """Make the scorer called ``name``.

    Args:
        name: a key of :data:`SCORERS`.
        seed: drives "random"; the others ignore it.
        selector: for "selector": a :class:`TokenSelector`, or the folder or hub id of one; the others
            ignore it.

    Raises:
        TokenselError: an unknown name, a selector that is missing or cannot be loaded.
    """
    if name not in SCORERS:
        raise TokenselError(f"scorer '{name}' is unknown: choose one of {', '.join(SCORERS)}")
    return SCORERS[name](seed, selector)
