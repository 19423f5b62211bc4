"""The model under evaluation with its scorers, and what identifies the answers it gives."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import KEEPS, SHORT_KEEPS, EvalConfig
from tokensel.benchmarks.shards import local_device
from tokensel.methods import check_method
from tokensel.model.selector import TokenSelector
from tokensel.schedules import DyRate, RatePredictor, Schedule, Vtw, make_schedule
from tokensel.scorers import Scorer, make_scorer
from tokensel.utils.errors import TokenselError, check_layers
from tokensel.utils.provenance import checkpoint_digest, code_digest
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
        name = check_method(condition.method).scorer
        if name is None:
            return None
        key = (name, condition.seed)
        if key not in self.scorers:
            options = {"selector": self.selector} if check_method(condition.method).uses_selector else {}
            self.scorers[key] = make_scorer(name, seed=condition.seed, **options)
        return self.scorers[key]

    @cached_property
    def predictor(self) -> RatePredictor:
        """DyRate's trained predictor, loaded once."""
        return RatePredictor.from_pretrained(self.config.dyrate).to(self.vlm.model.device)

    def schedule(self, condition: Condition) -> Schedule | None:
        """What drops tokens inside the language model under a condition."""
        row, config = check_method(condition.method), self.config
        if row.schedule is None:
            return None
        if row.schedule == "dyrate":
            return DyRate(self.predictor)
        if row.schedule == "vtw":
            return Vtw(config.vtw_layer or self.vlm.model.config.text_config.num_hidden_layers // 2)
        keep = config.inside if row.chooses else condition.keep
        return make_schedule(row.schedule, layer=config.layer, keep=keep)

    def check_fit(self) -> None:
        """Raise ``TokenselError`` before any work where a method, selector, predictor or a schedule's layers do not fit."""
        rows, model = [check_method(method) for method in self.config.methods], self.vlm.model.config
        if any(row.needs_cls_attention for row in rows) and model.vision_feature_select_strategy != "default":
            raise TokenselError(
                f"method cls: the vision tower of {self.config.model} has no CLS token; leave the method out"
            )
        if "native" in self.config.methods and self.vlm.native is None:
            raise TokenselError(
                f"method native: {self.config.model} has no compression of its own; leave the method out"
            )
        shape = model.text_config
        for schedule in filter(None, map(self.schedule, self.config.conditions())):
            check_layers(schedule.name, schedule.layers(), shape.num_hidden_layers)
            if isinstance(schedule, DyRate):
                schedule.predictor.check_heads(shape.num_attention_heads)
        for condition in self.config.conditions():
            if (check := getattr(self.scorer(condition), "check_model", None)) is not None:
                check(model)

    @cached_property
    def model_digest(self) -> str:
        """Stands for the model's files."""
        return checkpoint_digest(self.config.model, getattr(self.vlm.model.config, "_commit_hash", None))

    @cached_property
    def selector_digest(self) -> str:
        """Stands for the selector's files."""
        return checkpoint_digest(self.config.selector, getattr(self.selector.config, "_commit_hash", None))

    @cached_property
    def predictor_digest(self) -> str:
        """Stands for the rate predictor's files."""
        return checkpoint_digest(self.config.dyrate, getattr(self.predictor.config, "_commit_hash", None))

    def identity(self, condition: Condition) -> dict[str, str]:
        """All that an answer under a condition depends on, besides question and seed and a scorer's keep."""
        row, schedule = check_method(condition.method), self.schedule(condition)
        found = {"model": self.model_digest, "dtype": str(self.vlm.model.dtype), "code": code_digest()}
        if row.chooses:
            found |= self.config.choices()
        if row.uses_selector:
            found["selector"] = self.selector_digest
        if schedule is not None:
            found["schedule"] = self.predictor_digest if isinstance(schedule, DyRate) else repr(schedule)
        return found
