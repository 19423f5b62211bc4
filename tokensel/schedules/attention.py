"""The attention that single tokens pay: the rows of the matrix that are needed, never the whole matrix."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokensel.schedules.decoder import Attention

__all__ = ["PADDING", "RESPONSE", "TYPES", "chosen_rows", "last_rows", "token_types", "type_mass"]

TYPES = ("system", "image", "instruction", "response")
PADDING, RESPONSE = -1, TYPES.index("response")


def token_types(
    visual: Bool[Tensor, "rows length"], real: Bool[Tensor, "rows length"]
) -> Int[Tensor, "rows length"]:
    """The type of each of a prompt's tokens, an index into :data:`TYPES`; -1 at padding.

    DyRate's abstract names no border between the two texts of a prompt. Here every text token before the
    first visual token is system, every one after it is instruction.
    """
    # the running count of visual tokens is 0 up to the first of them
    text = torch.where(visual.cumsum(1) == 0, TYPES.index("system"), TYPES.index("instruction"))
    return text.masked_fill(visual, TYPES.index("image")).masked_fill(~real, PADDING)


def type_mass(
    attention: Float[Tensor, "rows heads queries length"], types: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows queries heads types"]:
    """The share of its attention that each query pays to each of :data:`TYPES`, head by head."""
    # one_hot takes no negative index, so padding (-1) becomes class 0, which is cut off again
    members = one_hot(types + 1, len(TYPES) + 1)[..., 1:]  # [rows, length, types]
    return torch.einsum("rhql,rlt->rqht", attention, members.to(attention))


def last_rows(
    attention: Attention,
    hidden: Float[Tensor, "rows length width"],
    rotation: tuple[Tensor, Tensor],
    cache: Cache | None,
    attn_mask: Bool[Tensor, "rows queries keys"],
) -> Float[Tensor, "rows heads queries keys"]:
    """Attention that the last tokens pay in one layer, in float32.

    Args:
        attention: the layer's attention module.
        hidden: its input.
        rotation: cosine and sine of the positions.
        cache: holds the layer's keys, these tokens' included, if they were cached; ``None`` computes them
            again.
        attn_mask: for each of the last tokens, as many as are asked for, True where attention is allowed.
    """
    queries, (cosine, sine) = attn_mask.shape[1], rotation
    query = _heads(attention, "q", hidden[:, -queries:])
    # the stock function rotates a pair; here each of the two is wanted alone
    query, _ = apply_rotary_pos_emb(query, query, cosine[:, -queries:], sine[:, -queries:])
    keys = _cached_keys(cache, attention.layer_idx)  # rotated already
    if keys is None:
        keys = _heads(attention, "k", hidden)
        _, keys = apply_rotary_pos_emb(keys, keys, cosine, sine)
    return _softmax(attention, query, keys, attn_mask)


def chosen_rows(
    attention: Attention,
    hidden: Float[Tensor, "rows length width"],
    rotation: tuple[Tensor, Tensor],
    queries: Int[Tensor, "rows queries"],
    real: Bool[Tensor, "rows length"],
    rotate: bool = True,
) -> Float[Tensor, "rows heads queries length"]:
    """Attention that any tokens of a prompt pay in one layer, in float32; its keys are computed again.

    Args:
        attention: the layer's attention module.
        hidden: its input.
        rotation: cosine and sine of the positions.
        queries: places of the tokens in ``hidden``.
        real: True where a token is none of the padding.
        rotate: whether queries and keys are rotated by their positions, as in the model itself.
    """
    queries, real = queries.to(hidden.device), real.to(hidden.device)
    asking = hidden.gather(1, queries[:, :, None].expand(-1, -1, hidden.shape[2]))
    query, keys = _heads(attention, "q", asking), _heads(attention, "k", hidden)
    if rotate:
        cosine, sine = (part.expand(len(hidden), -1, -1) for part in rotation)
        place = queries[:, :, None].expand(-1, -1, cosine.shape[2])
        query, _ = apply_rotary_pos_emb(query, query, cosine.gather(1, place), sine.gather(1, place))
        _, keys = apply_rotary_pos_emb(keys, keys, cosine, sine)
    column = torch.arange(hidden.shape[1], device=hidden.device)
    # a token sees the real ones up to itself; padding sees itself, as a softmax over nothing would be NaN
    allowed = (column <= queries[:, :, None]) & real[:, None, :] | (column == queries[:, :, None])
    return _softmax(attention, query, keys, allowed)


def _heads(attention: Attention, kind: str, hidden: Float[Tensor, "rows length width"]) -> Tensor:
    """Queries ("q") or keys ("k") before rotation, ``[rows, heads, length, head_dim]``."""
    states = getattr(attention, f"{kind}_proj")(hidden)
    states = states.view(*states.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)  # Qwen3 normalises each head
    return (states if norm is None else norm(states)).transpose(1, 2)


def _softmax(attention: Attention, query: Tensor, keys: Tensor, attn_mask: Tensor) -> Tensor:
    # grouped-query attention: several query heads share one head of keys
    keys = keys.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ keys.transpose(2, 3) * attention.scaling).float()
    return logits.masked_fill(~attn_mask[:, None], -torch.inf).softmax(-1)


def _cached_keys(cache: Cache | None, layer: int | None) -> Float[Tensor, "rows heads keys width"] | None:
    if cache is None or layer is None or len(cache.layers) <= layer:
        return None
    return getattr(cache.layers[layer], "keys", None)  # None before the layer ran
