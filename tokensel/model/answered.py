"""What the models share that are trained by the answers of a frozen language model."""

from typing import Any, no_type_check

from tokensel.model.base import CoreConfig, CoreModel

__all__ = ["AnsweredConfig", "AnsweredModel"]


@no_type_check  # the base class assigns whatever a configuration file holds
class AnsweredConfig(CoreConfig):
    """Shape and history: the fields of ``CoreConfig``, and these.

    Attributes:
        accuracy_loss: cross entropy of the answers in nats per token, averaged over the last tenth.
    """

    accuracy_loss: float | None = None


class AnsweredModel(CoreModel):
    """A model whose card tells of answers, not of reconstruction."""

    def facts(self) -> dict[str, Any]:
        """Rows of the model card."""
        c, facts = self.config, super().facts()
        own = ("encoder", "feature layer", "width", "training data", "steps", "seed")
        return {name: facts[name] for name in own} | {
            "visual tokens kept in training": facts["p of Eq. (3)"],
            "cross entropy of the answers (nats a token)": c.accuracy_loss and round(c.accuracy_loss, 4),
        }
