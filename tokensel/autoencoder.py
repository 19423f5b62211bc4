"""The models as they are trained: R(S(F)) together, or R alone for masks from elsewhere; and their units."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokensel.errors import TokenselError
from tokensel.features import Features
from tokensel.reconstructor import ReconstructorConfig, TokenReconstructor
from tokensel.selector import MaskedEmbedding, SelectorConfig, TokenSelector
from tokensel.train_config import TrainConfig


class Autoencoder(nn.Module):
    """R(S(F)) of Eq. (2), as one module, so that several processes share the gradients of both."""

    def __init__(self, width: int, config: TrainConfig):
        super().__init__()
        self.selector = TokenSelector(SelectorConfig(**shape(width, config)))
        self.reconstructor = TokenReconstructor(ReconstructorConfig(**shape(width, config)))

    def forward(
        self, features: Tensor, valid: Tensor | None, tau: float, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """F^rec ``[batch, tokens, channels]`` and the mask M ``[batch, tokens]``."""
        chosen = self.selector(features, valid, tau, noise)
        return self.reconstructor(chosen.selected, valid), chosen.mask

    def standardise(self, center: Tensor, spread: Tensor) -> None:
        self.selector.standardise(center, spread)
        self.reconstructor.standardise(center, spread)


class MaskedAutoencoder(nn.Module):
    """A reconstructor with a masked embedding of its own, for masks that come from elsewhere (Eq. 1)."""

    def __init__(self, masked: MaskedEmbedding, reconstructor: TokenReconstructor):
        super().__init__()
        self.masked, self.reconstructor = masked, reconstructor

    @classmethod
    def new(cls, width: int, config: TrainConfig) -> "MaskedAutoencoder":
        """An untrained one."""
        return cls(MaskedEmbedding(width), TokenReconstructor(ReconstructorConfig(**shape(width, config))))

    @classmethod
    def of(cls, selector: TokenSelector, reconstructor: TokenReconstructor) -> "MaskedAutoencoder":
        """A selector's embedding with the reconstructor trained beside it; shared, not copied."""
        return cls(selector.masked, reconstructor)

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Reconstruct all tokens from those where ``mask`` is True."""
        if valid is not None:
            features = features.masked_fill(~valid[..., None], 0.0)
        return self.reconstructor(self.masked(features, mask.to(features.dtype)), valid)

    def standardise(self, center: Tensor, spread: Tensor) -> None:
        self.masked.standardise(center, spread)
        self.reconstructor.standardise(center, spread)


def shape(width: int, config: TrainConfig) -> dict[str, Any]:
    """The part of a training's choices that shapes the models."""
    return {"width": width, "layers": config.layers, "heads": config.heads, "mlp_ratio": config.mlp_ratio}


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, and the distance that counts as 1 in L_rec."""

    center: Tensor
    spread: Tensor
    scale: float

    @classmethod
    def of(cls, batches: Iterable[Features]) -> "Statistics":
        """Measure over some batches: ``scale`` is the root mean square over the tiles of ||F - mean||_2.

        Raises:
            TokenselError: no tile in them has a valid token (no picture could be read).
        """
        total = squares = torch.zeros((), dtype=torch.float64)
        tokens = tiles = 0
        for batch in batches:
            valid = (
                batch.tokens.new_ones(batch.tokens.shape[:2], dtype=torch.bool)
                if batch.valid is None
                else batch.valid
            )
            rows = batch.tokens[valid].double().cpu()
            total, squares = total + rows.sum(dim=0), squares + rows.square().sum(dim=0)
            tokens, tiles = tokens + len(rows), tiles + int(valid.any(dim=1).sum())
        if not tiles:
            raise TokenselError(
                "none of the first pictures can be read: give a folder or dataset with whole images"
            )
        center = total / tokens
        variance = (squares / tokens - center.square()).clamp(min=0)
        scale = float((variance.sum() * tokens / tiles).sqrt()) or 1.0
        return cls(center.float(), variance.sqrt().float(), scale)
