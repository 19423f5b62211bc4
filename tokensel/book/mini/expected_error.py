"""A scorer that spends tokens where the reconstruction still needs them, for the budget "threshold".

The selector ranks the tokens of a tile; the reconstructor trained beside it tells how far the tile is from
being reconstructed when only the first of them are kept. A token scores the error that is left before it is
kept, so that one threshold for all tiles is a threshold on the expected error, and a full tile gets more
tokens than an empty one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.budget import measure_thresholds, threshold_at
from tokensel.data.features import Features
from tokensel.model.objective import distance
from tokensel.model.reconstructor import TokenReconstructor
from tokensel.model.selector import TokenSelector
from tokensel.scorers import SCORERS
from tokensel.scorers.ranks import falling_ranks
from tokensel.training.autoencoder import MaskedAutoencoder
from tokensel.training.metrics import Metric

__all__ = ["ExpectedErrorScorer", "as_method"]

_STEPS = 24  # shares of a tile at which its error is computed; between them it is interpolated


class ExpectedErrorScorer:
    """Scores tokens by the error of the reconstruction that is left without them, in units of ``metric``.

    The order inside a tile is the selector's.
    """

    name = "expected-error"
    needs_cls_attention = False
    scope = "tile"
    adaptive = False

    def __init__(self, selector: TokenSelector, reconstructor: TokenReconstructor, metric: Metric):
        """
        Args:
            selector, reconstructor: trained together.
            metric: maps features to the space where they were trained to be close.
        """
        self.selector, self.metric = selector, metric
        self.judge = MaskedAutoencoder.of(selector, reconstructor)
        self.thresholds: list[float] = []

    @torch.no_grad()
    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Errors that fall from the first to the last token of a tile."""
        tokens = features.tokens.float()
        ranks = falling_ranks(self.selector.scores(tokens))
        count = tokens.shape[1]
        shares = sorted({round(count * step / _STEPS) for step in range(_STEPS)})
        errors = torch.stack([self._error(tokens, ranks < kept) for kept in shares], dim=1)
        # more tokens never make an error larger that is allowed for
        errors = errors.cummin(dim=1).values
        return _interpolated(errors, torch.tensor(shares, device=tokens.device), ranks)

    def _error(self, tokens: Tensor, mask: Tensor) -> Float[Tensor, "tiles"]:
        return distance(self.metric(self.judge(tokens, mask)), self.metric(tokens))

    def calibrate(self, features: Features) -> None:
        """Measure the thresholds on tiles: the scores above which 1, 2, ... 99 % of their tokens lie."""
        self.thresholds = measure_thresholds(self(features).flatten())

    def threshold(self, keep: float) -> float:
        """The score above which the fraction ``keep`` of the tokens lies that it was calibrated on."""
        return threshold_at(self.thresholds, keep)


def _interpolated(errors: Tensor, at: Tensor, ranks: Tensor) -> Float[Tensor, "tiles tokens"]:
    """``errors [tiles, shares]``, known where ``at`` tokens are kept, at the rank of each token."""
    right = torch.searchsorted(at, ranks.contiguous(), right=True).clamp(max=len(at) - 1)
    left = (right - 1).clamp(min=0)
    weight = ((ranks - at[left]) / (at[right] - at[left]).clamp(min=1)).clamp(0, 1)
    low, high = errors.gather(1, left), errors.gather(1, right)
    # a token of a higher rank scores lower, however flat the curve is
    return low + (high - low) * weight - 1e-6 * ranks


@contextmanager
def as_method(scorer: ExpectedErrorScorer, digest: str) -> Iterator[str]:
    """Make a method of a scorer, which can be evaluated inside the block; gives the method's name.

    Args:
        scorer: the scorer.
        digest: of its weights. Answers are kept by the name of the class, and another selector's are not its
            own.
    """

    class Given(ExpectedErrorScorer):
        def __init__(self) -> None:  # a method makes its scorer from options, and this one has none
            self.__dict__.update(scorer.__dict__)

    Given.__qualname__ = f"{scorer.name} {digest}"
    SCORERS[scorer.name] = Given
    try:
        yield scorer.name
    finally:
        del SCORERS[scorer.name]
