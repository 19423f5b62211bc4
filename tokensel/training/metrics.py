"""Metrics of the reconstruction: in which space an error of F_rec is measured.

The paper's loss is ``||F_rec - F||_2`` and names no unit. In raw features a token counts as much as it is
long, and length means something else in each tower: content in one, background in another (large towers give
a few background tokens several times the usual norm). So both sides may first be mapped to a space in which
an error counts as much as the language model would notice it. Selector and reconstructor read and write
features of the tower whatever the metric is; only the distance changes.

A new metric is one function and one row of :data:`METRICS`.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tokensel.data.features import Features
from tokensel.data.image_sources import open_images
from tokensel.data.loader import FeatureLoader
from tokensel.schedules.decoder import decoder_of
from tokensel.training.autoencoder import Statistics
from tokensel.training.config import TrainConfig
from tokensel.training.optim import use_bf16
from tokensel.training.processes import Processes
from tokensel.training.reader import stored_sensitivity
from tokensel.utils.errors import TokenselError
from tokensel.vlm.load import load_vlm
from tokensel.vlm.model import Vlm

__all__ = ["METRICS", "Metric", "MetricSource", "in_features", "make_metric", "open_metric"]

Metric = Callable[[Tensor], Tensor]


@dataclass
class MetricSource:
    """What a metric is made from.

    Attributes:
        batches: gives the first features that are trained on, as often as it is called.
        vlm: loads the model that reads the features.
        sensitivity: gives the matrix of :func:`tokensel.training.reader.reader_sensitivity` for it.
    """

    batches: Callable[[], Iterable[Features]]
    vlm: Callable[[], Vlm]
    sensitivity: Callable[[], Float[Tensor, "width width"]]


def in_features(tokens: Tensor) -> Tensor:
    """The tower's own units: the literal reading of Eq. (7)."""
    return tokens


def channel(source: MetricSource, device: torch.device) -> Metric:
    """Each channel divided by its standard deviation."""
    std = Statistics.of(source.batches()).std.clamp(min=1e-12)
    return _linear(std.reciprocal().diag(), device)


def token(source: MetricSource, device: torch.device) -> Metric:
    """Each token layer-normalised, without scale and shift: all tokens are equally long."""
    return lambda tokens: functional.layer_norm(tokens, tokens.shape[-1:])


def whitened(source: MetricSource, device: torch.device) -> Metric:
    """Channels decorrelated and of unit variance, but for directions that hardly vary."""
    values, vectors = torch.linalg.eigh(_covariance(source))
    floor = 1e-3 * values.mean()  # the smallest ones are noise of the sample
    return _linear(vectors * (values.clamp(min=0) + floor).rsqrt(), device)


def projector(source: MetricSource, device: torch.device) -> Metric:
    """The projector's output, which is what the language model is given."""
    return _projector(source.vlm(), device)


def keys_values(source: MetricSource, device: torch.device) -> Metric:
    """Keys and values that the language model's first layer makes of a token."""
    vlm = source.vlm()
    project, layer = _projector(vlm, device), cast(Any, decoder_of(vlm.model).layers[0])
    norm = deepcopy(layer.input_layernorm).requires_grad_(False).to(device, torch.float32)
    weight = torch.cat([layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]).detach()
    to_keys_values = _linear(weight.T, device)
    return lambda tokens: to_keys_values(norm(project(tokens)))


def reader(source: MetricSource, device: torch.device) -> Metric:
    """By how much the language model's answers move, to first order."""
    return _linear(source.sensitivity(), device)


METRICS: dict[str, Callable[[MetricSource, torch.device], Metric]] = {
    "features": lambda source, device: in_features,
    "channel": channel,
    "token": token,
    "whitened": whitened,
    "projector": projector,
    "keys-values": keys_values,
    "reader": reader,
}


def open_metric(
    config: TrainConfig,
    processes: Processes,
    loader: FeatureLoader,
    images: Any,
    batches: Callable[[], Iterable[Features]],
) -> tuple[TrainConfig, Metric]:
    """The metric of a training, and the configuration with its name where that was left open.

    Args:
        config: the training's choices.
        processes: those that train.
        loader: where the features come from.
        images: what :func:`tokensel.training.train.train` was given.
        batches: gives the first features.

    Raises:
        TokenselError: the metric needs the model that reads the features, or images, and there are none.
    """
    encoder, images = loader.encoder, config.images if images is None else images
    reads = encoder.read_by if encoder else ""
    name = config.metric or ("projector" if reads else "features")
    bf16 = use_bf16(processes.device, config)

    def vlm() -> Vlm:
        if not reads:
            raise TokenselError(
                f"metric '{name}' needs the language model that reads the features: give a LLaVA "
                "checkpoint as encoder, or another metric, such as token"
            )
        return load_vlm(reads, processes.device, torch.bfloat16 if bf16 else torch.float32)

    def sensitivity() -> Tensor:
        if not images:
            raise TokenselError("metric 'reader' is measured on images: give images, or metric features")
        source = open_images(images, config.column, config.streaming, config.metric_images)
        return stored_sensitivity(config, processes, source, vlm, reads)

    metric = make_metric(name, MetricSource(batches, vlm, sensitivity), processes.device)
    return replace(config, metric=name), metric


def make_metric(name: str, source: MetricSource, device: torch.device) -> Metric:
    """The metric called ``name``: maps features ``[..., width]`` to the space where errors are measured.

    Raises:
        TokenselError: an unknown name, or a source that lacks what the metric is made from.
    """
    if name not in METRICS:
        raise TokenselError(f"metric is '{name}': choose one of {', '.join(METRICS)}")
    return METRICS[name](source, device)


def _projector(vlm: Vlm, device: torch.device) -> Metric:
    """A copy of the model's projector, so that the model itself need not be kept."""
    module = getattr(vlm.model.base_model, "multi_modal_projector", None)
    if module is None:
        raise TokenselError(
            f"a {vlm.model.config.model_type} has no projector apart from its tower; choose another metric"
        )
    return deepcopy(module).eval().requires_grad_(False).to(device, torch.float32)


def _linear(weight: Float[Tensor, "width out"], device: torch.device) -> Metric:
    matrix = weight.float().to(device)
    return lambda tokens: tokens @ matrix


def _covariance(source: MetricSource) -> Float[Tensor, "width width"]:
    """Of the tokens of the first batches, in double precision."""
    total: Any = 0.0
    squares: Any = 0.0
    count = 0
    for batch in source.batches():
        tokens = batch.real().double()
        total, squares, count = total + tokens.sum(0), squares + tokens.T @ tokens, count + len(tokens)
    if not count:
        raise TokenselError(
            "none of the first images can be read: give a folder or dataset with whole images"
        )
    mean = total / count
    return squares / count - torch.outer(mean, mean)
