"""The feature reconstructor R of Sec. 4.2: three Transformer layers reconstruct what was dropped (Fig. 3)."""

from typing import no_type_check

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokensel.model.base import CoreConfig, CoreModel
from tokensel.model.layers import Trunk


@no_type_check
class ReconstructorConfig(CoreConfig):
    """Shape and history of a :class:`TokenReconstructor`; the fields are those of ``CoreConfig``."""

    model_type = "tokensel-reconstructor"


class TokenReconstructor(CoreModel):
    """R_psi: F^rec = R(F^pr), Eq. (5)."""

    config_class = ReconstructorConfig
    main_input_name = "selected"
    role = "Reconstructs all visual tokens of one frozen encoder from those that a selector kept."
    usage = (
        "from tokensel.model.reconstructor import TokenReconstructor\n"
        "from tokensel.model.selector import TokenSelector\n\n"
        'selector = TokenSelector.from_pretrained("<its selector>")\n'
        'reconstructor = TokenReconstructor.from_pretrained("<this folder or hub id>")\n'
        "reconstructed = reconstructor(selector(features).selected)  # [batch, tokens, channels]"
    )

    def __init__(self, config: ReconstructorConfig):
        super().__init__(config)
        self.trunk = Trunk(config.width, config.layers, config.heads, config.mlp_ratio)
        self.head = nn.Linear(config.width, config.width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and module is getattr(self, "head", None):
            nn.init.zeros_(module.weight)  # an untrained reconstructor returns F^pr

    def forward(
        self,
        selected: Float[Tensor, "batch tokens channels"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        grid: Int[Tensor, "batch 2"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Reconstruct every token, the kept ones included, in the encoder's own units.

        Like the paper's R it reads F^pr alone: it recognises a dropped token by its embedding. The layers
        predict a correction to F^pr, so that a kept token can be passed on unchanged. ``grid`` holds rows and
        columns of each tile where they are not squares of one size.

        Raises:
            TokenselError: the width of the features does not fit.
        """
        correction = self.head(self.trunk(selected, valid, grid))
        return selected + self.trunk.std * correction

    def standardise(self, mean: Float[Tensor, "width"], std: Float[Tensor, "width"]) -> None:
        """Fix mean and standard deviation of each channel, measured on the training features."""
        self.trunk.standardise(mean, std)
