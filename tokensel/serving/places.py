"""The place of a kept token in its image, on its way through an engine: M-RoPE positions of the full prompt.

An engine makes the positions of a prompt before it knows which tokens of an image are kept. It knows the
size of the image, though, and with it the position of every word. A kept token is given the first position of
its image on all three axes until it comes, with its row and column in four more channels of its embedding.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

__all__ = ["append_places", "pending_positions", "placed_positions", "split_places"]

_BASE = 128  # every whole number up to it is exact in bfloat16; a place has two digits
_CHANNELS = 4


def append_places(
    embeds: Float[Tensor, "kept width"], places: Int[Tensor, "kept 2"]
) -> Float[Tensor, "kept more"]:
    """Embeddings with row and column of each token in four more channels.

    Args:
        embeds: of the kept tokens.
        places: row and column of each.
    """
    digits = torch.stack([places // _BASE, places % _BASE], 2).flatten(1)
    return torch.cat([embeds, digits.to(embeds)], 1)


def split_places(
    embeds: Float[Tensor, "kept more"],
) -> tuple[Float[Tensor, "kept width"], Int[Tensor, "kept 2"]]:
    """Embeddings, and row and column of each token: what :func:`append_places` was given."""
    digits = embeds[:, -_CHANNELS:].long().unflatten(1, (2, 2))
    return embeds[:, :-_CHANNELS], digits[..., 0] * _BASE + digits[..., 1]


def pending_positions(length: int, images: Sequence[tuple[int, int, int]]) -> Int[Tensor, "3 length"]:
    """Positions of a shortened prompt before the kept tokens of its images are known.

    Words have the positions of the full prompt, and tokens of an image its first one.

    Args:
        length: of the prompt in tokens.
        images: of each image its first token, how many tokens it has left, and the longer side of its grid in
            tokens, in the order of the prompt.
    """
    positions = torch.empty(length, dtype=torch.long)
    done = place = 0  # tokens that have a position, and the next position
    for start, kept, side in images:
        text = start - done
        positions[done:start] = place + torch.arange(text)
        positions[start : start + kept] = place + text
        done, place = start + kept, place + text + side
    positions[done:] = place + torch.arange(length - done)
    return positions.repeat(3, 1)


def placed_positions(
    positions: Int[Tensor, "3 length"], tokens: Shaped[Tensor, "coming"], places: Int[Tensor, "coming 2"]
) -> Int[Tensor, "3 length"]:
    """Positions when some of the kept tokens have come.

    Args:
        positions: from :func:`pending_positions`, or from here. The first axis, time, stays the first
            position of each image.
        tokens: which tokens of the prompt have come.
        places: row and column of each.
    """
    placed = positions.clone()
    placed[1:, tokens] = positions[0, tokens] + places.T.to(positions)
    return placed
