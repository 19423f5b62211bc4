"""VisionSelector (arXiv 2510.16598): two linear maps rate each token by how it fits the image's mean key."""

import math
from typing import no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokensel.model.answered import AnsweredConfig, AnsweredModel
from tokensel.model.layers import full_precision
from tokensel.utils.errors import TokenselError

__all__ = ["VisionSelector", "VisionSelectorConfig"]


@no_type_check  # the base class assigns whatever a configuration file holds
class VisionSelectorConfig(AnsweredConfig):
    """Shape and history of a :class:`VisionSelector`; ``width`` is that of the projected tokens."""

    model_type = "tokensel-visionselector"
    layers: int = 0  # it has no Transformer layer


class VisionSelector(AnsweredModel):
    """Scores projected tokens: ``s_i = mean over j of q_i k_j / sqrt(h)``, without a softmax.

    The mean moves inside: one product of each query with the mean key, so that the cost is linear in the
    tokens. ``h`` is half of their width. The maps have no shifts, which the description leaves open.
    """

    config_class = VisionSelectorConfig
    main_input_name = "tokens"
    role = (
        "Scores the projected visual tokens of one model by how much its language model needs them to answer "
        "questions, whatever is asked."
    )
    usage = (
        "from tokensel.scorers import make_scorer\n\n"
        'scorer = make_scorer("visionselector", visionselector="<this folder or hub id>")\n'
        "vlm.answer(image, question, scorer=scorer, keep=0.2)"
    )
    method = "*VisionSelector*, arXiv 2510.16598"

    def __init__(self, config: VisionSelectorConfig):
        super().__init__(config)
        inner = max(1, config.width // 2)
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1e-4)

    def scores(
        self,
        tokens: Float[Tensor, "images tokens width"],
        valid: Bool[Tensor, "images tokens"] | None = None,
    ) -> Float[Tensor, "images tokens"]:
        """The scores, higher = keep first; -inf on padding.

        Args:
            tokens: all projected tokens of each image.
            valid: True where a token is real; ``None`` when all are.

        Raises:
            TokenselError: the tokens have another width.
        """
        if tokens.shape[-1] != self.config.width:
            raise TokenselError(
                f"tokens have {tokens.shape[-1]} channels but this model was made for {self.config.width}: "
                "use the model it was trained on"
            )
        with full_precision(tokens.device):  # rounded scores would tie
            real = torch.ones_like(tokens[..., 0]) if valid is None else valid.float()
            weight = real / real.sum(1, keepdim=True).clamp(min=1)
            mean = torch.einsum("nt,ntw->nw", weight.float(), tokens.float())
            key = nn.functional.linear(mean, self.key.weight.float())
            query = nn.functional.linear(tokens.float(), self.query.weight.float())
            scores = torch.einsum("nth,nh->nt", query, key) / math.sqrt(key.shape[1])
        return scores if valid is None else scores.masked_fill(~valid, -torch.inf)

    forward = scores
