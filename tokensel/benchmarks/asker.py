"""The model under evaluation with its scorers, and what identifies the answers it gives."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tokensel.benchmarks.config import KEEPS, SHORT_KEEPS, EvalConfig
from tokensel.benchmarks.identity import checkpoint_digest, code_digest
from tokensel.benchmarks.results import Condition
from tokensel.benchmarks.shards import local_device
from tokensel.errors import TokenselError
from tokensel.methods import METHODS
from tokensel.scorers import Scorer, make_scorer
from tokensel.selector import TokenSelector
from tokensel.vlm import Vlm, load_vlm


class Asker:
    """Loads the model once, the selector when it is needed, and each scorer once for all budgets."""

    def __init__(self, config: EvalConfig):
        self.vlm: Vlm = load_vlm(
            config.model, local_device(config.device), None if config.dtype == "auto" else config.dtype
        )
        keeps = config.keeps or (SHORT_KEEPS if self.vlm.native else KEEPS)
        self.config = replace(config, keeps=keeps)
        self.scorers: dict[tuple[str, int], Scorer] = {}

    @cached_property
    def selector(self) -> TokenSelector:
        """The trained selector, loaded once for every keep and seed."""
        return TokenSelector.from_pretrained(self.config.selector)

    @property
    def name(self) -> str:
        """The model in the table: a hub id, or the last part of a folder."""
        path = Path(self.vlm.name)
        return path.resolve().name if path.is_dir() else self.vlm.name

    def scorer(self, condition: Condition) -> Scorer | None:
        """The scorer of a condition: one object for every keep, so that a batch is scored once."""
        name = METHODS[condition.method].scorer
        if name is None:
            return None
        key = (name, condition.seed)
        if key not in self.scorers:
            self.scorers[key] = make_scorer(
                name, seed=condition.seed, selector=self.selector if name == "selector" else None
            )
        return self.scorers[key]

    def check_fit(self) -> None:
        """Raise ``TokenselError`` before any work where a method, or the selector, does not fit the model."""
        methods, model = self.config.methods, self.vlm.model.config
        if "cls" in methods and model.vision_feature_select_strategy != "default":
            raise TokenselError(
                f"method cls: the vision tower of {self.config.model} has no CLS token; leave the method out"
            )
        if "native" in methods and self.vlm.native is None:
            raise TokenselError(f"method native: {self.config.model} has no compression of its own; leave the method out")
        if "selector" not in methods:
            return
        vision, layers = model.vision_config, model.vision_feature_layer
        width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
        if (mine := self.selector.config.width) != width:
            raise TokenselError(
                f"{self.config.selector}: this selector was trained for features of width {mine}, "
                f"the vision tower of {self.config.model} has {width}; give the selector that belongs to it"
            )

    @cached_property
    def model_digest(self) -> str:
        """Stands for the model's files."""
        return checkpoint_digest(self.config.model, getattr(self.vlm.model.config, "_commit_hash", None))

    @cached_property
    def selector_digest(self) -> str:
        """Stands for the selector's files."""
        return checkpoint_digest(self.config.selector, getattr(self.selector.config, "_commit_hash", None))

    def identity(self, method: str) -> dict[str, str]:
        """All that an answer under ``method`` depends on, besides question, keep and seed."""
        found = {"model": self.model_digest, "dtype": str(self.vlm.model.dtype), "code": code_digest()}
        if METHODS[method].uses_keep:
            found |= self.config.choices()
        if METHODS[method].scorer == "selector":
            found["selector"] = self.selector_digest
        return found
