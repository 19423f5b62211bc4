"""DyRate (Liang et al. 2025, arXiv 2501.14204): a predictor picks the fraction to keep at each step.

The abstract leaves much open. Our choices: the predictor reads the attention of the newest token in the layer
before the drop; from that layer on, tokens are ranked by the same attention and the rate holds for all
layers; a rate is a fraction of all visual cells of the prompt; an evicted token does not come back, so a
rate that rises again changes nothing; and the first rate is picked in the prefill, as in FastV.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig

from tokensel.model.base import CoreModel
from tokensel.schedules.attention import TYPES
from tokensel.schedules.schedule import Mass, check_newline
from tokensel.utils.errors import TokenselError

__all__ = ["DyRate", "RateConfig", "RatePredictor"]


@no_type_check  # the base class assigns whatever a configuration file holds
class RateConfig(PretrainedConfig):
    """Shape and history of a :class:`RatePredictor`.

    Attributes:
        heads: attention heads of the language model it was trained on.
        layer: the first layer that is shortened; the attention of the one before is read.
        rates: how many rates there are to pick from, the k of the paper.
        model: name of the model it was trained on.
        weight, gradient: of the compute in its loss, and how that was trained on, see
            ``tokensel.training.dyrate``.
        training_data, steps, seed: what it was trained on, and how long.
        accuracy_loss, kept: the two terms of its loss, averaged over the last tenth of the training.
    """

    model_type = "tokensel-dyrate"
    heads: int = 32
    layer: int = 2
    rates: int = 10
    model: str = ""
    weight: float | None = None
    gradient: str = ""
    training_data: str = ""
    steps: int = 0
    seed: int | None = None
    accuracy_loss: float | None = None
    kept: float | None = None


class RatePredictor(CoreModel):
    """One linear layer from attention masses to the logits of k rates.

    >>> schedule = DyRate(RatePredictor.from_pretrained("folder or hub id"))
    >>> vlm.generate(reduced, schedule=schedule)
    """

    config_class = RateConfig
    main_input_name = "mass"
    role = (
        "Picks at every generation step which fraction of the visual tokens one frozen language model keeps, "
        "from how the newest token's attention is shared among system, image, instruction and response "
        "tokens."
    )
    usage = (
        "from tokensel.schedules import DyRate, RatePredictor\n\n"
        'schedule = DyRate(RatePredictor.from_pretrained("<this folder or hub id>"))\n'
        "vlm.generate(reduced, schedule=schedule)"
    )
    method = "*Dynamic Token Reduction during Generation for Vision Language Models*, arXiv 2501.14204"

    def __init__(self, config: RateConfig):
        super().__init__(config)
        if config.rates < 2:
            raise TokenselError(f"rates is {config.rates}: give at least 2 to pick from, such as 10")
        if config.layer < 1:
            raise TokenselError(
                f"layer is {config.layer}: give at least 1, the attention of the layer before is read"
            )
        self.linear = nn.Linear(config.heads * len(TYPES), config.rates)
        self.post_init()

    def forward(self, mass: Float[Tensor, "*batch heads types"]) -> Float[Tensor, "*batch rates"]:
        """Logits of the rates.

        Args:
            mass: share of each head's attention that falls on each of
                :data:`~tokensel.schedules.attention.TYPES`.

        Raises:
            TokenselError: another number of heads than it was made for.
        """
        self.check_heads(mass.shape[-2])
        # heads and types become one axis; in the predictor's own type and device, whatever the model's are
        return self.linear(mass.flatten(-2).to(self.linear.weight))

    def check_heads(self, heads: int) -> None:
        """Check that the predictor was made for a model with ``heads`` attention heads.

        Raises:
            TokenselError: it was made for another number.
        """
        if heads != self.config.heads:
            raise TokenselError(
                f"the model has {heads} attention heads but this rate predictor was made for "
                f"{self.config.heads}: use the model it was trained on, or train one with "
                "`python -m tokensel dyrate`"
            )

    @property
    def keeps(self) -> Float[Tensor, "rates"]:
        """The fractions kept under each rate, 1 - (i - 1)/k for i from 1 to k."""
        return 1 - torch.arange(self.config.rates, device=self.device) / self.config.rates

    def keep(self, mass: Float[Tensor, "rows heads types"]) -> Float[Tensor, "rows"]:
        """The fraction of the likeliest rate, row by row, on the device of ``mass``."""
        return self.keeps[self(mass).argmax(-1)].to(mass.device)

    def facts(self) -> dict[str, Any]:
        """Rows of the model card."""
        c = self.config
        return {
            "language model": c.model and f"`{c.model}`",
            "attention heads": c.heads,
            "first layer shortened": c.layer,
            "rates": c.rates,
            "weight of compute": c.weight,
            "gradient": c.gradient or None,
            "training data": c.training_data,
            "steps": c.steps or None,
            "seed": c.seed,
            "cross entropy of the answers (nats a token)": c.accuracy_loss and round(c.accuracy_loss, 4),
            "visual tokens kept, mean over steps": c.kept and round(c.kept, 4),
        }


@no_type_check  # __post_init__ checks the options, with one line for the user
@dataclass(frozen=True)
class DyRate:
    """The schedule of a trained predictor.

    Attributes:
        predictor: picks the rates.
        newline: "keep", "drop" or "row", see :class:`~tokensel.schedules.Schedule`; it was trained with
            "keep".

    Raises:
        TokenselError: ``predictor`` is not a :class:`RatePredictor`, or ``newline`` unknown.
    """

    predictor: RatePredictor
    newline: str = "keep"
    name: ClassVar[str] = "dyrate"
    uses_keep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, RatePredictor):
            raise TokenselError(
                f"predictor is a {type(self.predictor).__name__}: give a RatePredictor, such as "
                "RatePredictor.from_pretrained(folder or hub id)"
            )
        check_newline(self.newline)

    @torch.no_grad()
    def entering(self, layer: int, step: int = 0, mass: Mass | None = None) -> float | Float[Tensor, "rows"]:
        """The predictor's rate for each row, from the newest token's attention.

        Raises:
            TokenselError: ``mass`` is missing at a layer where tokens are dropped.
        """
        if layer < self.predictor.config.layer:
            return 1.0
        if mass is None:
            raise TokenselError(
                "dyrate reads the newest token's attention: give mass=, as tokensel.schedules.pruned does"
            )
        return self.predictor.keep(mass())

    def layers(self) -> tuple[int, ...]:
        """Layers at whose entrance tokens are dropped."""
        return (self.predictor.config.layer,)

    def check_model(self, config: PretrainedConfig) -> None:
        """Check that the predictor was made for a model of this configuration.

        Raises:
            TokenselError: it was made for another number of attention heads.
        """
        self.predictor.check_heads(config.text_config.num_attention_heads)
