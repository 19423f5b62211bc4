"""The attention that single tokens pay: the rows of the matrix that are needed, never the whole matrix."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokensel.schedules.decoder import Attention

__all__ = ["PADDING", "RESPONSE", "TYPES", "last_rows", "token_types", "type_mass"]

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
    rows, queries = attn_mask.shape[:2]
    cosine, sine = rotation

    def split_heads(states: Tensor) -> Tensor:
        # [rows, length, heads * head_dim] -> [rows, heads, length, head_dim]
        return states.view(rows, states.shape[1], -1, attention.head_dim).transpose(1, 2)

    query = split_heads(attention.q_proj(hidden[:, -queries:]))
    # the stock function rotates a pair; here each of the two is wanted alone
    query, _ = apply_rotary_pos_emb(query, query, cosine[:, -queries:], sine[:, -queries:])
    keys = _cached_keys(cache, attention.layer_idx)  # rotated already
    if keys is None:
        keys = split_heads(attention.k_proj(hidden))
        _, keys = apply_rotary_pos_emb(keys, keys, cosine, sine)
    # grouped-query attention: several query heads share one head of keys
    keys = keys.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ keys.transpose(2, 3) * attention.scaling).float()
    return logits.masked_fill(~attn_mask[:, None], -torch.inf).softmax(-1)


def _cached_keys(cache: Cache | None, layer: int) -> Float[Tensor, "rows heads keys width"] | None:
    if cache is None or len(cache.layers) <= layer:
        return None
    return getattr(cache.layers[layer], "keys", None)  # None before the layer ran
