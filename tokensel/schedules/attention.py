"""The attention that single tokens pay: the rows of the matrix that are needed, never the matrix."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

TYPES = ("system", "image", "instruction", "response")
PADDING, RESPONSE = -1, TYPES.index("response")


def token_types(
    visual: Bool[Tensor, "rows length"], real: Bool[Tensor, "rows length"]
) -> Int[Tensor, "rows length"]:
    """The type of each of a prompt's tokens, an index into :data:`TYPES`; -1 at padding.

    DyRate's abstract names no border between the two texts of a prompt. Here what stands before the first visual token is
    system, everything behind it that is not visual is instruction.
    """
    text = torch.where(visual.cumsum(1) == 0, TYPES.index("system"), TYPES.index("instruction"))
    return text.masked_fill(visual, TYPES.index("image")).masked_fill(~real, PADDING)


def type_mass(
    attention: Float[Tensor, "rows heads queries length"], types: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows queries heads types"]:
    """How much of its attention each query spends on each of :data:`TYPES`, head by head; it sums to 1 over the types."""
    return torch.einsum(
        "rhql,rlt->rqht", attention, one_hot(types + 1, len(TYPES) + 1)[..., 1:].to(attention)
    )


def last_rows(
    attention: nn.Module,
    hidden: Float[Tensor, "rows length width"],
    rotation: tuple[Tensor, Tensor],
    cache: Cache | None,
    seen: Bool[Tensor, "rows queries keys"],
) -> Float[Tensor, "rows heads queries keys"]:
    """Attention that the last tokens pay in one layer.

    Args:
        attention: the layer's attention, of a Llama, Mistral or Qwen2.
        hidden: what it was given.
        rotation: cosine and sine of the positions.
        cache: where its keys are, if they were kept.
        seen: for each of the last tokens, as many as are asked for, the keys that it may look at.
    """
    rows, queries = seen.shape[:2]
    cosine, sine = rotation

    def heads(states: Tensor) -> Tensor:
        return states.view(rows, states.shape[1], -1, attention.head_dim).transpose(1, 2)

    query = heads(attention.q_proj(hidden[:, -queries:]))
    query, _ = apply_rotary_pos_emb(query, query, cosine[:, -queries:], sine[:, -queries:])
    if (
        cache is not None
        and len(cache.layers) > attention.layer_idx
        and cache.layers[attention.layer_idx].is_initialized
    ):
        keys = cache.layers[attention.layer_idx].keys
    else:
        keys = heads(attention.k_proj(hidden))
        _, keys = apply_rotary_pos_emb(keys, keys, cosine, sine)
    keys = keys.repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = (query @ keys.transpose(2, 3) * attention.scaling).float()
    return logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
