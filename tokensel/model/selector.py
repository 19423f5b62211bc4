"""The feature selector S of Sec. 4.1.1: three Transformer layers and a Gumbel-Softmax head (Fig. 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from tokensel.budget import threshold_at, top_fraction
from tokensel.model.base import CoreConfig, CoreModel
from tokensel.model.gates import alone, gate_mask, mix_noise
from tokensel.model.gumbel import DROP, KEEP
from tokensel.model.layers import Standardised, Trunk, full_precision
from tokensel.utils.errors import TokenselError


@no_type_check
class SelectorConfig(CoreConfig):
    """Shape and history of a :class:`TokenSelector`: the fields of ``CoreConfig``, and this.

    Attributes:
        thresholds: the scores above which 1, 2, ... 99 % of the tokens lie, on tiles of the training.
    """

    model_type = "tokensel-selector"
    thresholds: list[float] | None = None


@dataclass
class SelectorOutput(ModelOutput):
    """What the selector returns in training (Eq. 4).

    Attributes:
        selected: F^pr, the features with every dropped token replaced by the masked embedding.
        mask: M, 1 where a token is kept; its gradient is that of the relaxed sample. 0 on padding.
        logits: drop and keep logit of each token.
    """

    selected: Float[Tensor, "batch tokens channels"] | None = None
    mask: Float[Tensor, "batch tokens"] | None = None
    logits: Float[Tensor, "batch tokens 2"] | None = None


class MaskedEmbedding(Standardised):
    """E_masked of Sec. 4.1.1: the one learnable vector that replaces every dropped token.

    It is learned in units of each channel's standard deviation, so that one learning rate suits any encoder.
    """

    def __init__(self, width: int):
        super().__init__(width)
        self.vector = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        mask: Float[Tensor, "batch tokens"],
        noise: Float[Tensor, "batch tokens channels"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """``features`` where the mask is 1, the embedding where it is 0; gradients reach all three.

        Args:
            features: the tensor F.
            mask: M, between 0 and 1.
            noise: samples of N(0, 1), for the gate "throttle" (DiffPrune's information throttler): noise
                takes the embedding's place. In units of the standard deviation a token becomes
                ``sqrt(m) x + sqrt(1 - m) noise``: its variance stays the same while its information falls.
        """
        if noise is not None:
            mixed = mix_noise(features - self.mean, self.std, mask, noise)
            return (self.mean + self.std * mixed).to(features.dtype)
        embedding = (self.mean + self.std * self.vector).to(features.dtype)
        return torch.lerp(embedding.expand_as(features), features, mask[..., None].to(features.dtype))


class TokenSelector(CoreModel):
    """S_theta: scores each token by how well the others can be reconstructed from it.

    >>> selector = TokenSelector.from_pretrained("selector")        # a folder or a Hub id
    >>> kept = selector.keep_mask(features, keep=0.3)               # the best 30 % of each row
    >>> kept = selector.keep_mask(features)                         # or as many as each image needs
    """

    config_class = SelectorConfig
    main_input_name = "features"
    role = (
        "Scores the visual tokens of one frozen encoder by how well the others can be reconstructed from "
        "them, so that the least useful can be dropped before a language model reads the image."
    )
    usage = (
        "from tokensel.model.selector import TokenSelector\n\n"
        'selector = TokenSelector.from_pretrained("<this folder or hub id>")\n'
        "mask = selector.keep_mask(features, keep=0.3)  # [batch, tokens], True = kept"
    )

    def __init__(self, config: SelectorConfig):
        super().__init__(config)
        self.trunk = Trunk(config.width, config.layers, config.heads, config.mlp_ratio)
        self.head = nn.Linear(config.width, 2)
        self.masked = MaskedEmbedding(config.width)
        self.post_init()

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        tau: float = 1.0,
        noise: Float[Tensor, "batch tokens 2"] | None = None,
        gate: str = "gumbel",
        keep: float | None = None,
        throttle: Float[Tensor, "batch tokens channels"] | None = None,
        total: Callable[[Tensor], Tensor] = alone,
        grid: Int[Tensor, "batch 2"] | None = None,
    ) -> SelectorOutput:
        """Select as in training: F^pr, M = S(F), Eq. (4).

        Args:
            features: the encoder's tokens, in its own units.
            valid: True where a token is real; ``None`` when all are.
            tau: temperature of the Gumbel-Softmax, above 0.
            noise: Gumbel(0, 1) samples, see :func:`tokensel.model.gumbel.gumbel_noise`; without them the mask
                is that of inference.
            gate: the paper's "gumbel", or another key of :data:`tokensel.model.gates.GATES`.
            keep: the fraction of the batch's tokens that a gate keeps which divides a budget.
            throttle: samples of N(0, 1) for the gate "throttle", see :class:`MaskedEmbedding`.
            total: the sum of a value over all processes, if the batch is divided among several.
            grid: rows and columns of each tile, where they are not squares of one size.

        Raises:
            TokenselError: the width of the features does not fit; an unknown gate, or one without a budget.
        """
        logits = self.logits(features, valid, grid)
        mask = gate_mask(gate, logits, tau, noise, keep, valid, total)
        if valid is not None:
            features = features.masked_fill(~valid[..., None], 0.0)
        return SelectorOutput(selected=self.masked(features, mask, throttle), mask=mask, logits=logits)

    def logits(
        self,
        features: Float[Tensor, "batch tokens channels"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        grid: Int[Tensor, "batch 2"] | None = None,
    ) -> Float[Tensor, "batch tokens 2"]:
        """The drop and the keep logit of every token."""
        tokens = self.trunk(features, valid, grid).float()
        # in single precision, under autocast too: rounded scores would tie, which makes the ranking arbitrary
        with full_precision(tokens.device):
            return nn.functional.linear(tokens, self.head.weight.float(), self.head.bias.float())

    def scores(
        self,
        features: Float[Tensor, "batch tokens channels"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        grid: Int[Tensor, "batch 2"] | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Keep logit minus drop logit, the higher the more useful (end of Sec. 4.1.1); -inf on padding."""
        logits = self.logits(features, valid, grid)
        scores = logits[..., KEEP] - logits[..., DROP]
        return scores if valid is None else scores.masked_fill(~valid, -torch.inf)

    def hard_mask(
        self,
        features: Float[Tensor, "batch tokens channels"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Bool[Tensor, "batch tokens"]:
        """The mask of inference: True where the keep logit wins; the count differs from image to image."""
        return self.scores(features, valid) > 0

    def threshold(self, keep: float) -> float:
        """The score above which the fraction ``keep`` of the tokens lies that it was trained on.

        With it in place of a count, a full image keeps more than an empty one.

        Raises:
            TokenselError: ``keep`` outside (0, 1], or a selector that was saved without thresholds.
        """
        if not self.config.thresholds:
            raise TokenselError("this selector was saved without thresholds: train it again, or give a count")
        return threshold_at(self.config.thresholds, keep)

    def keep_mask(
        self,
        features: Float[Tensor, "batch tokens channels"],
        keep: float | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Bool[Tensor, "batch tokens"]:
        """The hard mask, or with ``keep`` the best-scored such fraction of each row's valid tokens.

        Raises:
            TokenselError: ``keep`` outside (0, 1], or features of another width.
        """
        if keep is None:
            return self.hard_mask(features, valid)
        return top_fraction(self.scores(features, valid), keep, valid)

    def standardise(self, mean: Float[Tensor, "width"], std: Float[Tensor, "width"]) -> None:
        """Fix mean and standard deviation of each channel, measured on the training features."""
        self.trunk.standardise(mean, std)
        self.masked.standardise(mean, std)
