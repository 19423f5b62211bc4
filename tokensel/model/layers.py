"""The trunk that selector and reconstructor share: standardise, add the places, a few Transformer layers."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from tokensel.model.positions import codes
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
        self, x: Float[Tensor, "batch tokens width"], attend: Bool[Tensor, "batch 1 1 tokens"] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """One layer; ``attend`` is False where nobody may look."""
        batch, tokens, width = x.shape
        qkv = self.queries_keys_values(self.norm_attention(x))
        # [batch, tokens, 3*width] -> three of [batch, heads, tokens, width/heads]
        q, k, v = qkv.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        heard = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        x = x + self.attention_out(heard.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


class Trunk(nn.Module):
    """Standardised features plus position codes of learned scale, through Transformer layers and a norm.

    ``center`` and ``spread`` are the mean and the standard deviation of each channel over the training
    features (the paper is silent on scaling). CLIP's features have a few channels tens of times larger than
    the rest; unscaled, these would drown the others at the learning rates that suit the layers.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, width: int, layers: int, heads: int | None = None, mlp_ratio: float = 4.0):
        super().__init__()
        heads = heads or default_heads(width)
        if width % heads:
            raise TokenselError(f"heads is {heads}: give a divisor of the width {width}, or leave it out")
        self.width = width
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.position_scale = nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList(TransformerLayer(width, heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    @torch.no_grad()
    def standardise(self, center: Float[Tensor, "width"], spread: Float[Tensor, "width"]) -> None:
        """Fix the statistics of the training features; a channel that never varies keeps its scale."""
        self.center.copy_(center)
        self.spread.copy_(torch.where(spread > 0, spread, 1.0))

    def forward(
        self,
        features: Float[Tensor, "batch tokens channels"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Context of every token, about unit scale. Padding (``valid`` False) is neither read nor meaningful.

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
        # the statistics are single precision also where the weights are not
        x = ((features - self.center) / self.spread).to(self.position_scale.dtype)
        attend = None
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)  # padding may hold anything, NaN included
            # a row without any valid token looks at itself, so that its softmax is not over nothing
            attend = (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
        x = x + self.position_scale * codes(x.shape[1], self.width, valid, x.device).to(x.dtype)
        for layer in self.layers:
            x = layer(x, attend)
        return self.norm(x)


def default_heads(width: int) -> int:
    """Heads of 64 channels, of 32 below width 256, or wider ones if that does not divide (paper silent)."""
    heads = max(1, width // (64 if width >= 256 else 32))
    return next(n for n in range(heads, 0, -1) if width % n == 0)
