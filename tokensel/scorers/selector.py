"""The trained selector of the paper as a scorer."""

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from tokensel.data.features import Features, feature_width
from tokensel.model.selector import TokenSelector
from tokensel.utils.errors import TokenselError

__all__ = ["SelectorScorer"]


class SelectorScorer:
    """Scores a token by the selector's keep logit minus its drop logit (paper Sec. 4.1.1, last paragraph).

    Each tile is scored as a whole, letterbox included, as in the training of the shipped selectors, which saw
    the tiles of ``tiles="anyres"``; the budget then chooses among the tokens that reach the language model.
    Above zero means that the selector itself would keep the token.
    """

    name = "selector"
    needs_cls_attention = False
    scope = "tile"
    adaptive = True

    def __init__(self, selector: TokenSelector | str | os.PathLike | None = None):
        """
        Args:
            selector: a :class:`TokenSelector`, or the folder or hub id of one.

        Raises:
            TokenselError: the selector is missing or cannot be loaded.
        """
        if selector is None:
            raise TokenselError(
                "scorer 'selector' needs one: pass selector=, a TokenSelector or the folder or hub id of one"
            )
        if not isinstance(selector, (TokenSelector, str, os.PathLike)):
            raise TokenselError(
                f"selector is {selector!r}: give a TokenSelector, or the folder or hub id of one"
            )
        loaded = selector if isinstance(selector, TokenSelector) else TokenSelector.from_pretrained(selector)
        self.selector = loaded.eval()
        self._fitted: dict[tuple[torch.device, torch.dtype], TokenSelector] = {}

    @torch.no_grad()
    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Logit differences ``[tiles, tokens]``.

        Raises:
            TokenselError: the selector was trained for features of another width.
        """
        tokens, width = features.tokens, self.selector.config.width
        if tokens.shape[-1] != width:
            raise TokenselError(
                f"the selector was trained for features of width {width}, these have {tokens.shape[-1]}: "
                "give the selector that belongs to this vision encoder"
            )
        return self._fit(tokens).scores(tokens, features.valid).float()

    def check_model(self, config: PretrainedConfig) -> None:
        """Check that the selector was trained on the features that a model's projector reads.

        Args:
            config: of the vision-language model.

        Raises:
            TokenselError: width, feature layer or the rule about the CLS token differ.
        """
        own, vision = self.selector.config, config.vision_config
        count = vision.num_hidden_layers + 1
        name = self.selector.name_or_path or "the selector"
        pairs = {
            "width": (own.width, feature_width(vision, config.vision_feature_layer)),
            "feature layer": (_layers(own.feature_layer, count), _layers(config.vision_feature_layer, count)),
            "drop_cls": (own.drop_cls, config.vision_feature_select_strategy == "default"),
        }
        for what, (trained, given) in pairs.items():
            if trained not in (None, given):
                raise TokenselError(
                    f"{name} was trained for features of {what} {trained}, these have {given}: give the "
                    f"selector that belongs to {config.name_or_path or 'this model'}"
                )
        # folders are moved and copied: the last part of their path is what a model is known by
        encoder, model = PurePath(own.encoder).name, PurePath(config.name_or_path or "").name
        if encoder and model and encoder != model:
            warnings.warn(
                f"{name} was trained on the vision tower of {own.encoder}, and is used with "
                f"{config.name_or_path}",
                stacklevel=2,
            )

    def _fit(self, tokens: Float[Tensor, "tiles tokens channels"]) -> TokenSelector:
        """The selector on the features' device and in their precision.

        In single precision next to a 16-bit model it would take several times as long. The statistics of the
        features stay in single precision.
        """
        key = (tokens.device, tokens.dtype)
        if key not in self._fitted:
            if key == (self.selector.device, self.selector.dtype):
                self._fitted[key] = self.selector
            else:
                fitted: Any = deepcopy(self.selector)
                fitted.to(tokens.device)
                for weight in fitted.parameters():  # not .to(dtype), which would round the statistics as well
                    weight.data = weight.data.to(tokens.dtype)
                self._fitted[key] = fitted
        return self._fitted[key]


def _layers(layers: int | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """Feature layers counted from the front, so that -2 of 24 layers equals 23."""
    if layers is None:
        return None
    return tuple(layer % count for layer in ([layers] if isinstance(layers, int) else layers))
