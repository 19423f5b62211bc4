"""What selector and reconstructor share: standardised features, position codes, a few Transformer layers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tokensel.model.positions import position_codes
from tokensel.utils.errors import TokenselError


class TransformerLayer(nn.Module):
    """A pre-norm Transformer layer: every token attends to every valid token of its own row."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, int(width * mlp_ratio))
        self.mlp_out = nn.Linear(int(width * mlp_ratio), width)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        attn_mask: Bool[Tensor, "batch 1 1 tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """One layer; ``attn_mask`` is True where attention is allowed."""
        batch, tokens, width = x.shape
        qkv = self.queries_keys_values(self.norm_attention(x))
        # [batch, tokens, 3*width] -> three of [batch, heads, tokens, width/heads]
        q, k, v = qkv.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attn_out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        # [batch, heads, tokens, width/heads] -> [batch, tokens, width]
        x = x + self.attention_out(attn_out.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


class Standardised(nn.Module):
    """Mean and standard deviation of each channel over the training features, as buffers in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # .to(dtype), .half() and the like reach this method; statistics of features whose channels differ by
        # orders of magnitude lose too much in half precision, so they only change their device
        exact = self.mean, self.std
        super()._apply(fn, recurse)
        if self.mean.dtype != exact[0].dtype:
            self.mean, self.std = (statistic.to(self.mean.device) for statistic in exact)
        return self

    @torch.no_grad()
    def standardise(self, mean: Float[Tensor, "width"], std: Float[Tensor, "width"]) -> None:
        """Fix the statistics; measured on the training features."""
        self.mean.copy_(mean)
        self.std.copy_(std)


class Trunk(Standardised):
    """Standardised features plus position codes of learned scale, through Transformer layers and a norm.

    The paper is silent on scaling. CLIP's features have a few channels tens of times larger than the rest;
    unscaled, these would dominate the others at the learning rates that suit the layers.
    """

    def __init__(self, width: int, layers: int, heads: int | None = None, mlp_ratio: float = 4.0):
        super().__init__(width)
        heads = heads or default_heads(width)
        if width % heads:
            raise TokenselError(f"heads is {heads}: give a divisor of the width {width}, or leave it out")
        self.width = width
        self.position_scale = nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList(TransformerLayer(width, heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def standardise(self, mean: Float[Tensor, "width"], std: Float[Tensor, "width"]) -> None:
        """Fix the statistics; a channel that never varies keeps its scale, as it cannot be divided by 0."""
        super().standardise(mean, torch.where(std > 0, std, 1.0))

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        grid: Int[Tensor, "batch 2"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Context of every token, about unit scale. Padding (``valid`` False) is neither read nor meaningful.

        ``grid`` holds rows and columns of each tile where they are not squares of one size.

        Raises:
            TokenselError: the features have another width than this model.
        """
        if features.shape[-1] != self.width:
            raise TokenselError(
                f"features have {features.shape[-1]} channels but this model was made for {self.width}: "
                "use the encoder it was trained on, or train one for this encoder"
            )
        if valid is not None and valid.all():
            valid = None  # the same computation, bit for bit, as for rows without padding
        # the statistics are single precision even where the weights are not
        x = ((features - self.mean) / self.std).to(self.position_scale.dtype)
        attn_mask = None
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)  # padding may hold anything, NaN included
            # every token may attend to the valid tokens of its row; in a row without any, to all tokens, as a
            # softmax over nothing is NaN. [batch, tokens] -> [batch, 1, 1, tokens]: same for heads and
            # queries
            attn_mask = (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
        codes = position_codes(x.shape[1], self.width, valid, x.device, grid)
        x = x + self.position_scale * codes.to(x.dtype)
        for layer in self.layers:
            x = layer(x, attn_mask)
        return self.norm(x)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Switches autocast off; there is none on devices that only stand in, such as "meta"."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def default_heads(width: int) -> int:
    """Heads of 64 channels, of 32 below width 256, or wider ones if that does not divide (paper silent)."""
    heads = max(1, width // (64 if width >= 256 else 32))
    return next(n for n in range(heads, 0, -1) if width % n == 0)
