"""Everything that ranks visual tokens before the language model, with one signature.

A scorer is a callable from :class:`~tokensel.data.features.Features` to scores ``[tiles, tokens]``, higher =
keep first. No caller asks which scorer it holds. A new scorer is one class in a file of its own and one row
in :data:`SCORERS`. What its constructor takes are its options. Two of them reach every scorer from the
command line and the evaluation:

- ``seed``: the scorer is stochastic; the evaluation runs it once for each seed and lists each as a row of its
    own;
- the keys of :data:`LEARNED`: the scorer has a trained model of this kind.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.model.base import CoreModel
from tokensel.model.diffprune import DiffPrune
from tokensel.model.selector import TokenSelector
from tokensel.model.visionselector import VisionSelector
from tokensel.scorers.apet import ApetScorer
from tokensel.scorers.cdpruner import CdprunerScorer
from tokensel.scorers.cls import ClsScorer
from tokensel.scorers.dart import DartScorer
from tokensel.scorers.diffprune import DiffPruneScorer
from tokensel.scorers.diversity import DiversityScorer
from tokensel.scorers.hired import HiredScorer
from tokensel.scorers.lowest import LOWEST, Lowest
from tokensel.scorers.norm import NormScorer
from tokensel.scorers.random import RandomScorer
from tokensel.scorers.scope import ScopeScorer
from tokensel.scorers.selector import SelectorScorer
from tokensel.scorers.uniform import UniformScorer
from tokensel.scorers.visionselector import VisionSelectorScorer
from tokensel.scorers.visionzip import VisionZipScorer
from tokensel.utils.errors import TokenselError, check_names

__all__ = ["LEARNED", "SCORERS", "Scorer", "make_scorer", "scorer_class", "scorer_options"]


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

    A scorer may also have what these are for:

    - ``check_model(config)`` raises ``TokenselError`` for models that it does not fit;
    - ``threshold(keep)`` is the score above which it keeps a fraction of an average image's tokens;
    - ``needs_question = True``: it reads ``Features.relevance``, which is computed only for those that do;
    - ``needs_projection = True``: its ``Features.tokens`` are what the model's projector makes of them;
    - ``merge(features, kept)`` returns the features that kept tokens have when dropped ones are merged into
      them, ``[tiles, tokens, channels]``; others are not read.
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
    "dart": DartScorer,
    "hired": HiredScorer,
    "apet": ApetScorer,
    "visionzip": VisionZipScorer,
    "cdpruner": CdprunerScorer,
    "scope": ScopeScorer,
    "diffprune": DiffPruneScorer,
    "visionselector": VisionSelectorScorer,
}
LEARNED: dict[str, type[CoreModel]] = {
    "selector": TokenSelector,
    "diffprune": DiffPrune,
    "visionselector": VisionSelector,
}


def scorer_class(name: Any) -> Callable[..., Scorer]:
    """The class of the scorer called ``name``; of ``lowest-norm`` that of ``norm``, which is turned around.

    Raises:
        TokenselError: an unknown name.
    """
    plain = name.removeprefix(LOWEST) if isinstance(name, str) else name
    if not isinstance(name, str) or plain not in SCORERS:
        raise TokenselError(f"scorer '{name}' is unknown: choose one of {', '.join(SCORERS)}")
    return SCORERS[plain]


def scorer_options(name: str) -> tuple[str, ...]:
    """The options of the scorer called ``name``: what its constructor takes.

    Raises:
        TokenselError: an unknown name.
    """
    return tuple(inspect.signature(scorer_class(name)).parameters)


def make_scorer(name: str, **options: Any) -> Scorer:
    """Make the scorer called ``name``.

    Args:
        name: a key of :data:`SCORERS`, or one with "lowest-" in front, see
            :class:`~tokensel.scorers.lowest.Lowest`.
        options: for the scorer's constructor, such as ``seed`` (of "random") and ``selector`` (of "selector":
            a :class:`~tokensel.model.selector.TokenSelector`, or the folder or hub id of one). Options of
            other scorers are ignored, so that a caller may pass all it has whichever scorer it makes.

    Raises:
        TokenselError: an unknown name, an option that no scorer has, a selector that is missing or cannot be
            loaded.
    """
    own = scorer_options(name)
    check_names(options, {option for other in SCORERS for option in scorer_options(other)})
    scorer = scorer_class(name)(**{option: value for option, value in options.items() if option in own})
    return Lowest(scorer) if name.startswith(LOWEST) else scorer
