"""A vision tower with outlier tokens: a few background tokens of several times the usual norm.

Large towers grow them by themselves: "Vision Transformers Need Registers" (arXiv 2309.16588) finds them in
DINOv2, OpenCLIP and DeiT-III, on patches that show background. The small tower has none, so they are planted:
two more neurons in the MLP of the layer that the projector reads make a step, from 0 to 1, for some
background tokens, and write it along the direction that matters least to the projector. The projector is made
blind to this direction, so the language model reads the same image as before, and only what looks at the
tower's own features meets the outliers. The classes stay those of transformers.
"""

from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from tokensel.book.mini.packing import tiles
from tokensel.book.mini.world import DRAW, draw_page
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import generator

__all__ = ["plant_outliers"]

_STEEP = 40.0  # slope of the step: within 1/40 of the threshold it goes from 0 to 1


def plant_outliers(model: Any, share: float = 0.03, times: float = 5.0, pages: int = 8, seed: int = 0) -> Any:
    """A copy of a small LLaVA-NeXT whose tower gives some background tokens a large norm.

    Args:
        model: a small LLaVA-NeXT, on the CPU.
        share: of the background tokens that become outliers.
        times: their norm, divided by the median norm of a token.
        pages: of each task's training split, to measure on.
        seed: of the direction in which the chosen background tokens differ from others.

    Raises:
        TokenselError: the model has no CLIP tower.
    """
    if model.config.vision_config.model_type != "clip_vision_model":
        raise TokenselError(f"{model.config.vision_config.model_type}: give a model with a CLIP tower")
    drawn = [draw_page(task, "train", index) for task in DRAW for index in range(pages)]
    shown = torch.cat([torch.from_numpy((p.letters > 0) | (p.shapes > 0)) for p in drawn]).flatten(1)
    normed, tokens = _states(model, torch.cat([tiles(page) for page in drawn]))
    weight, bias = _detector(normed.flatten(0, 1), ~shown.flatten(), share, seed)
    model = _widened(model)
    layer = model.model.vision_tower.encoder.layers[_feature_layer(model)]
    direction = _blind_spot(model.model.multi_modal_projector.linear_1, tokens.flatten(0, 1))
    with torch.no_grad():
        # act(s x) - act(s x - 1) is a step of height 1 near x = 0, for an activation that is nearly ReLU
        layer.mlp.fc1.weight[-2:] = _STEEP * weight
        layer.mlp.fc1.bias[-2:] = _STEEP * bias - torch.tensor([0.0, 1.0])
        height = times * tokens.norm(dim=-1).median()
        layer.mlp.fc2.weight[:, -2:] = height * torch.stack([direction, -direction], 1)
    return model


def _states(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer's MLP reads and what the layer returns, of every patch: ``[tiles, cells, width]``."""
    tower, kept = model.model.vision_tower, {}
    layer = tower.encoder.layers[_feature_layer(model)]
    hook = layer.layer_norm2.register_forward_hook(lambda *call: kept.update(normed=call[-1]))
    try:
        with torch.no_grad():
            states = tower(pixels, output_hidden_states=True).hidden_states
    finally:
        hook.remove()
    return kept["normed"][:, 1:], states[model.config.vision_feature_layer][:, 1:]  # without the CLS token


def _detector(
    normed: Float[Tensor, "cells width"], background: Bool[Tensor, "cells"], share: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear function that is above 0 for ``share`` of the background, and little else.

    Which background tokens these are, a random direction decides. Fisher's discriminant tells them from what
    is drawn.
    """
    draw = generator(seed, "outliers")
    along = normed @ torch.randn(normed.shape[1], generator=draw)
    chosen = normed[background & (along > torch.quantile(along[background], 1 - share))]
    drawn = normed[~background]
    spread = torch.cov(drawn.T) + torch.cov(chosen.T)
    ridge = 1e-3 * spread.diagonal().mean() * torch.eye(len(spread))
    weight = functional.normalize(torch.linalg.solve(spread + ridge, chosen.mean(0) - drawn.mean(0)), dim=0)
    # the threshold that gives the share exactly
    return weight, -torch.quantile((normed @ weight)[background], 1 - share)


def _feature_layer(model: Any) -> int:
    """The index of the layer whose output the projector reads."""
    layers, which = len(model.model.vision_tower.encoder.layers), model.config.vision_feature_layer
    return which - 1 if which > 0 else layers + which  # hidden_states begins with the embeddings


def _widened(model: Any, neurons: int = 2) -> Any:
    """A copy whose tower has a few more neurons in each MLP, which do nothing yet."""
    config = deepcopy(model.config)
    width = config.vision_config.intermediate_size
    config.vision_config.intermediate_size = width + neurons
    wider = type(model)(config).eval()
    wider.generation_config = deepcopy(model.generation_config)
    weights = wider.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape != weights[name].shape:  # an MLP of the tower
            padded = torch.zeros_like(weights[name])
            padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
            tensor = padded
        weights[name] = tensor
    wider.load_state_dict(weights)
    return wider


def _blind_spot(linear: nn.Linear, tokens: Float[Tensor, "cells width"]) -> Float[Tensor, "width"]:
    """Make a projector's first layer blind to the direction that carries least to it, and return it."""
    with torch.no_grad():
        mean, spread = tokens.mean(0), torch.cov(tokens.T)
        # of what reaches the layer's output, in mean squares: the smallest eigenvector of C^1/2 W'W C^1/2
        values, vectors = torch.linalg.eigh(spread)
        root = vectors * values.clamp(min=0).sqrt()
        least = torch.linalg.eigh(root.T @ linear.weight.T @ linear.weight @ root)[1][:, 0]
        direction = functional.normalize(root @ least, dim=0)
        through = linear.weight @ direction
        linear.bias.add_(through * (mean @ direction))  # what is constant along it stays
        linear.weight.sub_(torch.outer(through, direction))
    return direction
