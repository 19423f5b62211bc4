"""Run a frozen vision tower of transformers: the features of one layer, and what its CLS token attends to."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.errors import TokenselError


def attention_of(tower: nn.Module, layer: int) -> nn.Module | None:
    """The self-attention that produced ``hidden_states[layer]`` of the tower.

    ``None`` for the embeddings (they come before any attention) and for towers whose attention has no
    ``q_proj`` and ``k_proj``.
    """
    attentions = [module for module in tower.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")]
    states = tower.config.num_hidden_layers + 1  # the embeddings, then one for each layer
    if not -states <= layer < states:
        raise TokenselError(f"feature layer {layer} does not exist: the vision tower has {states - 1} layers")
    position = layer % states
    return attentions[position - 1] if position and len(attentions) == states - 1 else None


@contextmanager
def _hear(attention: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the queries and keys that ``attention`` computes anyway; eager attention is not needed for that."""
    heard: dict[str, Tensor] = {}

    def listener(name: str):
        def listen(_module: nn.Module, _args: tuple, out: Tensor) -> None:
            heard[name] = out

        return listen

    handles = [getattr(attention, name).register_forward_hook(listener(name)) for name in ("q_proj", "k_proj")]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def cls_row(
    queries: Float[Tensor, "tiles all channels"], keys: Float[Tensor, "tiles all channels"], heads: int
) -> Float[Tensor, "tiles patches"]:
    """Attention of token 0 (CLS) to every other token, averaged over the heads.

    The row is softmaxed with CLS itself in it, as the tower does, so it sums to less than 1 without it.
    """
    tiles, count, channels = keys.shape
    query = queries[:, :1].float().view(tiles, 1, heads, channels // heads).transpose(1, 2)  # [tiles, heads, 1, d]
    key = keys.float().view(tiles, count, heads, channels // heads).permute(0, 2, 3, 1)  # [tiles, heads, d, all]
    weights = (query @ key * (channels // heads) ** -0.5).softmax(-1)  # [tiles, heads, 1, all]
    return weights.mean(1)[:, 0, 1:]


@torch.no_grad()
def run_tower(
    tower: PreTrainedModel,
    pixel_values: Float[Tensor, "tiles 3 height width"],
    layer: int | list[int],
    drop_cls: bool,
    interpolate: bool = False,
) -> tuple[Float[Tensor, "tiles tokens channels"], Float[Tensor, "tiles tokens"] | None]:
    """Features of the tiles, chosen from the tower's hidden states exactly as LLaVA does before projecting.

    Args:
        tower: a ``CLIPVisionModel``, ``SiglipVisionModel`` or the like.
        pixel_values: normalised pixels.
        layer: index into ``hidden_states`` (0 = embeddings, -1 = last layer, before any final norm); of a list
            the layers are concatenated along the channels, and the CLS attention is that of the last one.
        drop_cls: the tower's token 0 is a CLS token and is left out.
        interpolate: resample the position embeddings to the size of ``pixel_values``.

    Returns:
        The features, and the CLS attention of the same layer (``None`` where there is no CLS token).

    Raises:
        TokenselError: the tower has no such layer.
    """
    layers = [layer] if isinstance(layer, int) else list(layer)
    attention = attention_of(tower, layers[-1])
    options = {"interpolate_pos_encoding": True} if interpolate else {}
    # transformers that can capture single layers do; to the others any true value means all of them
    wanted = layers if any(layers) else True
    with _hear(attention) if drop_cls and attention is not None else nullcontext({}) as heard:
        states = tower(pixel_values, output_hidden_states=wanted, return_dict=True, **options).hidden_states
    tokens = torch.cat([states[i] for i in layers], dim=-1) if len(layers) > 1 else states[layers[0]]
    tokens = tokens[:, 1:] if drop_cls else tokens
    if not heard:
        return tokens, None
    return tokens, cls_row(heard["q_proj"], heard["k_proj"], attention.num_heads)
