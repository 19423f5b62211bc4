"""What scorers with a trained model share: loading it, its fit to a model, its device and precision."""

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import PurePath
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from tokensel.data.encoders import TOWERS
from tokensel.data.features import Features, feature_width
from tokensel.model.base import CoreModel
from tokensel.utils.errors import TokenselError

__all__ = ["LearnedScorer"]


class LearnedScorer:
    """Scores tokens by the method ``scores`` of a trained model.

    Attributes:
        name: of the scorer, and of its option for the model.
        kind: class of the model.
        model: the model, in evaluation mode.
        any_tower: whether it is trained for all families, not for CLIP and SigLIP towers alone.
    """

    name: ClassVar[str]
    kind: ClassVar[type[CoreModel]]
    needs_cls_attention = False
    scope = "tile"
    adaptive = False
    any_tower = False

    def __init__(self, model: Any):
        """
        Args:
            model: a model of :attr:`kind`, or the folder or hub id of one.

        Raises:
            TokenselError: it is missing or cannot be loaded.
        """
        option, kind = self.name, self.kind.__name__
        if model is None:
            raise TokenselError(
                f"scorer '{option}' needs one: pass {option}=, a {kind} or the folder or hub id of one"
            )
        if not isinstance(model, (self.kind, str, os.PathLike)):
            raise TokenselError(f"{option} is {model!r}: give a {kind}, or the folder or hub id of one")
        named = isinstance(model, (str, os.PathLike))
        self.model: Any = (self.kind.from_pretrained(model) if named else model).eval()
        self._fitted: dict[tuple[torch.device, torch.dtype], Any] = {}

    @torch.no_grad()
    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """The model's scores ``[tiles, tokens]``.

        Raises:
            TokenselError: the model was trained for features of another width.
        """
        tokens, width = features.by_token(), self.model.config.width
        if tokens.shape[-1] != width:
            raise TokenselError(
                f"the {self.name} was trained for features of width {width}, these have {tokens.shape[-1]}: "
                f"give the {self.name} that belongs to this vision encoder"
            )
        return self._scores(self._fit(tokens), features, tokens).float()

    def _scores(
        self, model: Any, features: Features, tokens: Float[Tensor, "tiles tokens channels"]
    ) -> Float[Tensor, "tiles tokens"]:
        return model.scores(tokens, features.valid)

    @classmethod
    def check_tower(cls, config: PretrainedConfig) -> None:
        """Check that such a scorer can have been trained for a model at all.

        Args:
            config: of the vision-language model.

        Raises:
            TokenselError: it reads no layer of a CLIP or SigLIP tower.
        """
        tower = config.vision_config.model_type
        kind = config.model_type if tower in TOWERS else tower
        if not cls.any_tower and not _reads_layer(config):
            raise TokenselError(
                f"scorer '{cls.name}': none is trained for a {kind}; choose another scorer, such as diversity"
            )

    def check_model(self, config: PretrainedConfig) -> None:
        """Check that the scorer was trained on the features that a model reads.

        Args:
            config: of the vision-language model.

        Raises:
            TokenselError: kind of tower, width, feature layer or the rule about the CLS token differ.
        """
        self.check_tower(config)
        own, vision = self.model.config, config.vision_config
        name = self.model.name_or_path or f"the {self.name}"
        pairs: dict[str, tuple[Any, Any]] = {"tower": (own.tower or None, vision.model_type)}
        if _reads_layer(config):
            count, layers = vision.num_hidden_layers + 1, config.vision_feature_layer
            pairs |= {
                "width": (own.width, self.width(config)),
                "feature layer": (_layers(own.feature_layer, count), _layers(layers, count)),
                "drop_cls": (own.drop_cls, config.vision_feature_select_strategy == "default"),
            }
        elif own.feature_layer is not None:  # as only those have that are trained for the towers above
            pairs["tower"] = (" or ".join(TOWERS), vision.model_type)
        for what, (trained, given) in pairs.items():
            if trained not in (None, given):
                raise TokenselError(
                    f"{name} was trained for features of {what} {trained}, these have {given}: give the "
                    f"{self.name} that belongs to {config.name_or_path or 'this model'}"
                )
        # folders are moved and copied: the last part of their path is what a model is known by
        encoder, model = PurePath(own.encoder).name, PurePath(config.name_or_path or "").name
        if encoder and model and encoder != model:
            warnings.warn(
                f"{name} was trained on the vision tower of {own.encoder}, and is used with "
                f"{config.name_or_path}",
                stacklevel=2,
            )

    @staticmethod
    def width(config: PretrainedConfig) -> int:
        """Channels of what the scorer reads in a model of this configuration."""
        return feature_width(config.vision_config, config.vision_feature_layer)

    def _fit(self, tokens: Float[Tensor, "tiles tokens channels"]) -> Any:
        """The model on the features' device and in their precision.

        In single precision next to a 16-bit model it would take several times as long. The statistics of the
        features stay in single precision.
        """
        key = (tokens.device, tokens.dtype)
        if key not in self._fitted:
            if key == (self.model.device, self.model.dtype):
                self._fitted[key] = self.model
            else:
                fitted: Any = deepcopy(self.model)
                fitted.to(tokens.device)
                for weight in fitted.parameters():  # not .to(dtype), which would round the statistics as well
                    weight.data = weight.data.to(tokens.dtype)
                self._fitted[key] = fitted
        return self._fitted[key]


def _reads_layer(config: PretrainedConfig) -> bool:
    """Whether a model reads a layer of a CLIP or SigLIP tower that its configuration names."""
    return config.vision_config.model_type in TOWERS and hasattr(config, "vision_feature_layer")


def _layers(layers: int | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """Feature layers counted from the front, so that -2 of 24 layers equals 23."""
    if layers is None:
        return None
    return tuple(layer % count for layer in ([layers] if isinstance(layers, int) else layers))
