"""DiffPrune (arXiv 2605.28051): a scorer that is trained through noise, and the denoiser of its training.

In training no token is dropped. Noise takes the place of what a token's weight does not cover, so that the
frozen model reads as many tokens as ever and every weight has a gradient.
"""

from typing import no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokensel.model.answered import AnsweredConfig, AnsweredModel
from tokensel.model.gates import mix_noise
from tokensel.model.layers import Standardised, TransformerLayer, Trunk, default_heads, full_precision

__all__ = ["Denoiser", "DiffPrune", "DiffPruneConfig"]


@no_type_check  # the base class assigns whatever a configuration file holds
class DiffPruneConfig(AnsweredConfig):
    """Shape and history of a :class:`DiffPrune`."""

    model_type = "tokensel-diffprune"
    layers: int = 2


class DiffPrune(AnsweredModel):
    """One logit a token, from two Transformer layers over the tokens of a tile.

    What we chose: the layers are those of the selector, with its standardised features and position codes. A
    common shift of all logits changes no choice, so the last norm's shift is fixed and the head has none.
    """

    config_class = DiffPruneConfig
    main_input_name = "features"
    role = (
        "Scores the visual tokens of one frozen encoder by how much a language model needs them to answer "
        "questions, whatever is asked."
    )
    usage = (
        "from tokensel.scorers import make_scorer\n\n"
        'scorer = make_scorer("diffprune", diffprune="<this folder or hub id>")\n'
        "vlm.answer(image, question, scorer=scorer, keep=0.2)"
    )
    method = "*DiffPrune*, arXiv 2605.28051"

    def __init__(self, config: DiffPruneConfig):
        super().__init__(config)
        self.trunk = Trunk(config.width, config.layers, config.heads, config.mlp_ratio)
        self.head = nn.Linear(config.width, 1, bias=False)
        self.trunk.norm.bias.requires_grad_(False)
        self.post_init()

    def scores(
        self,
        features: Float[Tensor, "tiles tokens channels"],
        valid: Bool[Tensor, "tiles tokens"] | None = None,
    ) -> Float[Tensor, "tiles tokens"]:
        """The logits, higher = keep first; -inf on padding.

        Args:
            features: the encoder's tokens, in its own units.
            valid: True where a token is real; ``None`` when all are.

        Raises:
            TokenselError: the width of the features does not fit.
        """
        tokens = self.trunk(features, valid).float()
        with full_precision(tokens.device):  # rounded logits would tie
            logits = nn.functional.linear(tokens, self.head.weight.float())[..., 0]
        return logits if valid is None else logits.masked_fill(~valid, -torch.inf)

    forward = scores


class Denoiser(Standardised):
    """What stands between a noisy token and the projector in training: one Transformer layer, token by token.

    What we chose: tokens are standardised channel by channel over the training features, not each token by
    itself. The scale of a single token would tell of it what the noise is there to hide.
    """

    def __init__(self, width: int, heads: int | None = None, mlp_ratio: float = 4.0):
        super().__init__(width)
        self.layer = TransformerLayer(width, heads or default_heads(width), mlp_ratio)

    def forward(
        self,
        features: Float[Tensor, "tiles tokens channels"],
        weight: Float[Tensor, "tiles tokens"],
        noise: Float[Tensor, "tiles tokens channels"],
    ) -> Float[Tensor, "tiles tokens channels"]:
        """The tokens with noise for what their weight does not cover, denoised, in the encoder's own units.

        Args:
            features: the encoder's tokens.
            weight: between 0 and 1.
            noise: samples of N(0, 1).
        """
        noisy = mix_noise(features - self.mean, self.std, weight, noise)
        # rows of one token each: attention with an identity mask, where no token sees another
        alone = self.layer(noisy.flatten(0, 1)[:, None])[:, 0].view_as(noisy)
        return (self.mean + self.std * alone).to(features.dtype)
