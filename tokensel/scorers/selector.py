"""The trained selector of the paper behind the scorers' signature."""

import os
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.model.selector import TokenSelector
from tokensel.utils.errors import TokenselError


class SelectorScorer:
    """Scores a token by the selector's keep logit minus its drop logit (paper Sec. 4.1.1, last paragraph).

    Each tile is scored as a whole, letterbox included, as in training; the budget then chooses among the
    tokens that reach the language model. Above zero means that the selector itself would keep the token.
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

    def _fit(self, tokens: Float[Tensor, "tiles tokens channels"]) -> TokenSelector:
        """The selector on the features' device and in their precision: single precision beside a model in half would cost
        several times the time. The statistics of the features stay in single precision."""
        key = (tokens.device, tokens.dtype)
        if key not in self._fitted:
            if key == (self.selector.device, self.selector.dtype):
                self._fitted[key] = self.selector
            else:
                self._fitted[key] = deepcopy(self.selector).to(tokens.device)
                for weight in self._fitted[key].parameters():
                    weight.data = weight.data.to(tokens.dtype)
        return self._fitted[key]
