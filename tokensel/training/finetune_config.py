"""Every choice of fine-tuning a model with dropped tokens. Imports no heavy package."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, no_type_check

from tokensel.training.config import MODEL, OBJECTIVE, OPTIMISATION, QuestionsConfig
from tokensel.utils.errors import TokenselError
from tokensel.utils.options import Option

# of LLaVA's own fine-tuning, by whether low-rank matrices are trained or the weights themselves
_LR_LORA, _LR_FULL = 2e-4, 2e-5
_CHOSEN: Any = None


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class FinetuneConfig(QuestionsConfig):
    """How a language model is fine-tuned with dropped visual tokens; see :mod:`tokensel.training.finetune`.

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    scorer: Annotated[
        str, Option("Scorer that ranks the tokens, such as selector, cls or random.", OBJECTIVE)
    ] = "selector"
    selector: Annotated[str | None, Option("Trained selector: folder or Hub id.", MODEL)] = None
    lora: Annotated[
        int | None,
        Option(
            "Rank of low-rank matrices to train in place of the weights, with peft.",
            MODEL,
            least=1,
            example="16",
        ),
    ] = None
    keep: Annotated[
        float,
        Option("Fraction of an image's visual tokens kept in training.", OBJECTIVE, above=0, most=1),
    ] = 0.1
    # one model for several budgets
    keep_most: Annotated[
        float | None,
        Option("Draw the fraction for each step between keep and this.", OBJECTIVE, above=0, most=1),
    ] = None
    # so that the answers with all tokens stay what they were
    whole: Annotated[
        float, Option("Fraction of the steps in which every token is kept.", OBJECTIVE, least=0, most=1)
    ] = 0.25
    # these two are explained in tokensel.vlm.choose.Choices
    thumbnail: Annotated[
        Literal["compete", "keep", "last", "drop"],
        Option("Tokens of the thumbnail tile compete, come first, come last, or are dropped.", OBJECTIVE),
    ] = "compete"
    neighbours: Annotated[
        int,
        Option("Cells to each side in its row that each token brings along.", OBJECTIVE, least=0),
    ] = 0
    # 0 writes the model as it is
    steps: Annotated[int, Option("Optimiser steps.", OPTIMISATION, least=0)] = 100
    lr: Annotated[
        float,
        Option("Peak learning rate; by default 2e-5, with --lora 2e-4.", OPTIMISATION, above=0),
    ] = _CHOSEN

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", _LR_FULL if self.lora is None else _LR_LORA)
        super().__post_init__()
        if self.keep_most is not None and not self.keep < self.keep_most:
            raise TokenselError(
                f"keep_most is {self.keep_most}: give a fraction above keep = {self.keep}, at most 1"
            )
        if self.scorer == "selector" and self.selector is None and self.keep < 1:
            raise TokenselError(
                f"keep is {self.keep} and there is no selector: give --selector, or --keep 1 to drop nothing"
            )
