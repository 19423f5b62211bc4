"""The models as they are trained: R(S(F)) together, or R alone for given masks; and their statistics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokensel.data.features import Features
from tokensel.model.reconstructor import ReconstructorConfig, TokenReconstructor
from tokensel.model.selector import MaskedEmbedding, SelectorConfig, TokenSelector
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import generator


class Autoencoder(nn.Module):
    """R(S(F)) of Eq. (2), as one module, so that several processes share the gradients of both."""

    def __init__(self, width: int, layers: int = 3, heads: int | None = None, mlp_ratio: float = 4.0):
        super().__init__()
        shape = {"width": width, "layers": layers, "heads": heads, "mlp_ratio": mlp_ratio}
        self.selector = TokenSelector(SelectorConfig(**shape))
        self.reconstructor = TokenReconstructor(ReconstructorConfig(**shape))

    def forward(
        self, features: Tensor, valid: Tensor | None, tau: float, noise: Tensor | None, **gate: Any
    ) -> tuple[Tensor, Tensor]:
        """F^rec ``[batch, tokens, channels]`` and the mask M ``[batch, tokens]``.

        ``gate`` are further arguments of :meth:`TokenSelector.forward`.
        """
        selection = self.selector(features, valid, tau, noise, **gate)
        return self.reconstructor(selection.selected, valid, gate.get("grid")), selection.mask

    def prepare_for(self, gate: str) -> None:
        """Fix the parameters that have no meaning under a gate, and so no gradient but rounding noise.

        AdamW would make full steps of that noise.
        """
        if gate != "gumbel":  # a common shift of all scores changes no choice that divides a budget
            self.selector.head.bias.requires_grad_(False)
            self.selector.trunk.norm.bias.requires_grad_(False)
        if gate == "throttle":  # noise takes the place of dropped tokens
            self.selector.masked.vector.requires_grad_(False)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Fix mean and standard deviation of each channel in both models."""
        self.selector.standardise(mean, std)
        self.reconstructor.standardise(mean, std)


class MaskedAutoencoder(nn.Module):
    """A reconstructor with a masked embedding of its own, for masks of any policy (Eq. 1).

    Attributes:
        noisy: put noise in the place of dropped tokens, as the gate "throttle" does in training; always the
            same, so that a mask has one error.
    """

    def __init__(self, masked: MaskedEmbedding, reconstructor: TokenReconstructor, noisy: bool = False):
        super().__init__()
        self.masked, self.reconstructor, self.noisy = masked, reconstructor, noisy

    @classmethod
    def new(
        cls, width: int, layers: int = 3, heads: int | None = None, mlp_ratio: float = 4.0
    ) -> "MaskedAutoencoder":
        """An untrained one."""
        shape = ReconstructorConfig(width=width, layers=layers, heads=heads, mlp_ratio=mlp_ratio)
        return cls(MaskedEmbedding(width), TokenReconstructor(shape))

    @classmethod
    def of(cls, selector: TokenSelector, reconstructor: TokenReconstructor) -> "MaskedAutoencoder":
        """A selector's embedding with the reconstructor trained beside it; shared, not copied."""
        return cls(selector.masked, reconstructor, noisy=selector.config.gate == "throttle")

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Reconstruct all tokens from those where ``mask`` is True."""
        if valid is not None:
            features = features.masked_fill(~valid[..., None], 0.0)
        noise = None
        if self.noisy:
            # the same for every tile, so that an error does not depend on the others of its batch
            noise = torch.randn(features.shape[1:], generator=generator(0, "dropped tokens"))
            noise = noise.to(features).expand_as(features)
        return self.reconstructor(self.masked(features, mask.to(features.dtype), noise), valid)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Fix mean and standard deviation of each channel in both models."""
        self.masked.standardise(mean, std)
        self.reconstructor.standardise(mean, std)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, on the CPU, and the distance that counts as 1 in L_rec."""

    mean: Tensor
    std: Tensor
    scale: float

    @classmethod
    def of(
        cls, batches: Iterable[Features], metric: Callable[[Tensor], Tensor] | None = None
    ) -> "Statistics":
        """Measure some batches: ``scale`` is the root mean square over the tiles of ||F - mean||_2.

        Args:
            batches: are read once.
            metric: maps features to the space in which the scale is measured, by default their own.

        Raises:
            TokenselError: no tile in them has a valid token (no image could be read).
        """
        own = measured = _Moments()
        if metric is not None:
            measured = _Moments()
        tiles = 0
        for batch in batches:
            own.add(batch)
            if metric is not None:
                measured.add(replace(batch, tokens=metric(batch.tokens)))
            tiles += len(batch) if batch.valid is None else int(batch.valid.cpu().any(dim=1).sum())
        if not tiles:
            raise TokenselError(
                "none of the first images can be read: give a folder or dataset with whole images"
            )
        scale = float((measured.variance().sum() * measured.tokens / tiles).sqrt()) or 1.0
        return cls(own.mean().float(), own.variance().sqrt().float(), scale)


class _Moments:
    """Sums over the valid tokens of some batches, channel by channel, in double precision on the CPU."""

    def __init__(self) -> None:
        self.total = self.squares = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def add(self, batch: Features) -> None:
        rows = batch.real().double()
        self.total, self.squares = self.total + rows.sum(dim=0), self.squares + rows.square().sum(dim=0)
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        return self.total / self.tokens

    def variance(self) -> Tensor:
        return (self.squares / self.tokens - self.mean().square()).clamp(min=0)
