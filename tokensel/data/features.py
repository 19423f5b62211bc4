"""The features of a batch of tiles, and what is known about them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PretrainedConfig


@dataclass
class Features:
    """Token features of a batch of tiles, as one frozen encoder returns them.

    A *tile* is one square image of the encoder's input size: the whole image resized, or a part of it.

    Attributes:
        tokens: the feature tensor F of the paper (Sec. 3.1), one row per tile.
        valid: True where a token is real; ``None`` when all are. Rows of different length are padded.
        cls_attention: attention that the CLS token pays to each token, averaged over heads; ``None``
            where it was not requested or the encoder has no CLS token.
        keys: a stable identity of each tile. Seeded randomness depends on it, so that what is drawn for a
            tile does not depend on the batch that it is in.
        tile: the number of the tile that each token is from, in its image: 0 is the thumbnail, or the only
            tile; ``None`` where it is not known.
        centre: where the middle of each token lies in its image, as fractions of its height and width, the
            letterbox cut off; ``None`` where it is not known.
        relevance: how well each token fits the question; ``None`` where it was not requested.
        grid: rows and columns of each tile, where tiles differ in size or are not square; ``None`` where all
            are squares.
        patches: how many patches of the encoder become one token; their channels are side by side.
    """

    tokens: Float[Tensor, "tiles tokens channels"]
    valid: Bool[Tensor, "tiles tokens"] | None = None
    cls_attention: Float[Tensor, "tiles tokens"] | None = None
    keys: Int[Tensor, "tiles"] | None = None
    tile: Int[Tensor, "tiles tokens"] | None = None
    centre: Float[Tensor, "tiles tokens 2"] | None = None
    relevance: Float[Tensor, "tiles tokens"] | None = None
    grid: Int[Tensor, "tiles 2"] | None = None
    patches: int = 1

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def real(self) -> Float[Tensor, "tokens channels"]:
        """The valid tokens of all tiles, one after the other, on the host."""
        tokens = self.tokens.cpu()
        return tokens.flatten(0, 1) if self.valid is None else tokens[self.valid.cpu()]

    def by_token(self) -> Float[Tensor, "tiles tokens channels"]:
        """The mean patch of each token, which a selector reads: its size is quadratic in the channels."""
        return self.tokens.unflatten(-1, (self.patches, -1)).mean(-2) if self.patches > 1 else self.tokens

    def __getitem__(self, rows: slice | Tensor) -> "Features":
        """The tiles named by a slice, an index tensor or a boolean tensor."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Features":
        """Move every tensor to ``device``; ``dtype`` applies to the floating-point ones only."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


def feature_width(vision: PretrainedConfig, layers: int | list[int]) -> int:
    """Channels of a token: those of one layer of the tower, or of several side by side.

    Args:
        vision: configuration of the tower.
        layers: the layers that are read, as ``vision_feature_layer`` of a LLaVA names them.
    """
    return vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
