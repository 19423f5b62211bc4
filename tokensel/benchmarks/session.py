"""The model under evaluation with its scorers and schedules, and what identifies the answers it gives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import KEEPS, SHORT_KEEPS, EvalConfig
from tokensel.benchmarks.shards import local_device
from tokensel.cost.answers import Work, work_bytes, work_cost
from tokensel.data.encoders import TOWERS
from tokensel.methods import check_method
from tokensel.model.base import CoreModel
from tokensel.schedules import (
    SCHEDULES,
    RatePredictor,
    Schedule,
    cuts_at_depth,
    make_schedule,
    schedule_options,
)
from tokensel.schedules.decoder import decoder_of
from tokensel.scorers import LEARNED, Scorer, make_scorer
from tokensel.utils.errors import TokenselError, check_layers
from tokensel.utils.provenance import checkpoint_digest, environment
from tokensel.utils.source import code_digest
from tokensel.vlm import Vlm, load_vlm
from tokensel.vlm.families import family_of

__all__ = ["ANSWERING", "EvalSession", "Session"]

ANSWERING = ("tokensel.methods", "tokensel.vlm.load")
"""Every answer depends on these and all that they import, and on the classes of its scorer and schedule."""


class Session(ABC):
    """What an evaluation asks: a model in this process, or one behind servers.

    Attributes:
        config: the configuration, with the keeps that suit the model where none were given.
        name: the model's name in the table.
        model_digest: identifies the model; evaluations of the same model wait for each other.
    """

    config: EvalConfig
    name: str
    model_digest: str

    @abstractmethod
    def check_fit(self) -> None:
        """Check before any work that the configuration fits the model.

        Raises:
            TokenselError: it does not.
        """

    @abstractmethod
    def mean_cost(self, condition: Condition, work: Sequence[Work]) -> tuple[float, float] | None:
        """FLOPs and bytes of keys and values of an answer under a condition, averaged over the answers.

        ``None`` where they cannot be counted.
        """

    @abstractmethod
    def identity(self, condition: Condition) -> dict[str, str]:
        """Everything that an answer under a condition depends on, apart from question, seed and keep."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Which model answered, and the machine and packages that were used."""

    @abstractmethod
    def check_answered(self) -> None:
        """Check that every question that was asked has its answer.

        Raises:
            TokenselError: some have none; how many, and why.
        """


class EvalSession(Session):
    """Loads the model and trained parts when they are needed, and each scorer once for all keeps.

    Attributes:
        config: the configuration, with the keeps that suit the model where none were given.
        vlm: the model with its processor.
    """

    def __init__(self, config: EvalConfig):
        """
        Args:
            config: what to evaluate.

        Raises:
            TokenselError: the model cannot be loaded.
        """
        if config.model is None:
            raise TokenselError("the model is needed in this process: give model, a folder or Hub id")
        self._model, dtype = config.model, None if config.dtype == "auto" else config.dtype
        self.vlm: Vlm = load_vlm(self._model, local_device(config.device), dtype, revision=config.revision)
        keeps = config.keeps or (SHORT_KEEPS if self.vlm.native else KEEPS)
        self.config = replace(config, keeps=keeps)
        self._scorers: dict[tuple[str, int], Scorer] = {}
        self._learned: dict[str, CoreModel] = {}

    def learned(self, option: str, seed: int) -> CoreModel:
        """The trained model of a scorer, which the configuration names under ``option``, for a seed."""
        name = self.config.learned(option, seed)
        if name not in self._learned:
            self._learned[name] = LEARNED[option].from_pretrained(name)
        return self._learned[name]

    @cached_property
    def predictor(self) -> RatePredictor:
        """DyRate's trained predictor, on the model's device."""
        predictor = RatePredictor.from_pretrained(self._predictor_name)
        nn.Module.to(predictor, self.vlm.model.device)
        return predictor

    @property
    def _predictor_name(self) -> str:
        assert self.config.dyrate is not None, "EvalConfig refuses the method without it"
        return self.config.dyrate

    @property
    def name(self) -> str:
        """The model's name in the table: a hub id, or the last part of a folder."""
        path = Path(self.vlm.name)
        return path.resolve().name if path.is_dir() else self.vlm.name

    def scorer(self, condition: Condition) -> Scorer | None:
        """The scorer of a condition: one object for every keep, so that a batch is scored once."""
        name = check_method(condition.method).scorer
        if name is None:
            return None
        key = (name, condition.seed)
        if key not in self._scorers:
            learned = check_method(condition.method).learned
            options: dict[str, Any] = (
                {} if learned is None else {learned: self.learned(learned, condition.seed)}
            )
            self._scorers[key] = make_scorer(name, seed=condition.seed, **options)
        return self._scorers[key]

    def schedule(self, condition: Condition) -> Schedule | None:
        """What drops tokens inside the language model under a condition."""
        row, config = check_method(condition.method), self.config
        if row.schedule is None:
            return None
        depth = self.vlm.model.config.text_config.num_hidden_layers
        withdraws = getattr(SCHEDULES[row.schedule], "withdraws", False)
        given: dict[str, Any] = {
            "layer": (config.vtw_layer or depth // 2) if withdraws else config.layer,
            "keep": config.inside if row.chooses else condition.keep,
            "seed": condition.seed,
            "newline": config.newline,
            "scale": config.sparsevlm_scale,
            "recycling": config.sparsevlm_recycling,
            "lowest": config.clse_lowest,
            "prior": config.priortr_prior,
        }
        given |= cuts_at_depth(row.schedule, depth)
        if row.uses_predictor:  # it is loaded only for a schedule that takes it
            given["predictor"] = self.predictor
        known = schedule_options(row.schedule)
        return make_schedule(row.schedule, **{name: value for name, value in given.items() if name in known})

    def check_fit(self) -> None:
        """Check before any work that methods, attention, trained parts and layers of schedules fit the model.

        Raises:
            TokenselError: one of them does not.
        """
        model = self.vlm.model.config
        if self.config.attention != "plain" or self.config.dropped == "masked":
            decoder_of(self.vlm.model)
        for method in self.config.methods:
            row = check_method(method)
            reads_cls = getattr(model, "vision_feature_select_strategy", None) == "default"
            if row.needs_cls_attention and not (reads_cls and model.vision_config.model_type in TOWERS):
                raise TokenselError(
                    f"method {method}: the vision tower of {self.config.model} has no CLS token; leave the "
                    "method out"
                )
            if row.uses_native and self.vlm.native is None:
                raise TokenselError(
                    f"method {method}: {self.config.model} has no compression of its own; leave the method "
                    "out"
                )
        for condition in self.config.conditions():
            scorer, schedule = self.scorer(condition), self.schedule(condition)
            if schedule is not None:
                check_layers(schedule.name, schedule.layers(), model.text_config.num_hidden_layers)
            for part in (scorer, schedule):
                if (check := getattr(part, "check_model", None)) is not None:
                    check(model)

    def mean_cost(self, condition: Condition, work: Sequence[Work]) -> tuple[float, float]:
        """FLOPs and bytes of keys and values of an answer under a condition, averaged over the answers.

        FLOPs are NaN for answers that were recorded before the tower of their family could be counted.
        """
        model = self.vlm.model
        if not family_of(model.config).tiled and not all("grids" in answer for answer in work):
            kept = [work_bytes(model.config, answer, model.dtype.itemsize) for answer in work]
            return float("nan"), sum(kept) / len(kept)
        learned = check_method(condition.method).learned
        selector = None if learned is None else self.learned(learned, condition.seed).config
        costs = [work_cost(model.config, answer, model.dtype.itemsize, selector) for answer in work]
        return sum(flops for flops, _ in costs) / len(costs), sum(kept for _, kept in costs) / len(costs)

    @cached_property
    def model_digest(self) -> str:
        """Identifies the model's files."""
        return checkpoint_digest(self._model, getattr(self.vlm.model.config, "_commit_hash", None))

    @cached_property
    def predictor_digest(self) -> str:
        """Identifies the rate predictor's files."""
        return checkpoint_digest(self._predictor_name, getattr(self.predictor.config, "_commit_hash", None))

    def identity(self, condition: Condition) -> dict[str, str]:
        """Everything that an answer under a condition depends on, apart from question, seed and keep."""
        row, schedule = check_method(condition.method), self.schedule(condition)
        classes = row.classes()
        identity = {
            "model": self.model_digest,
            "dtype": str(self.vlm.model.dtype),
            "code": code_digest(*ANSWERING, *(part.__module__ for part in classes)),
            "classes": " ".join(f"{part.__module__}.{part.__qualname__}" for part in classes),
        }
        if row.chooses:
            identity |= self.config.choices()
        if row.learned is not None:  # the files of its trained model
            revision = getattr(self.learned(row.learned, condition.seed).config, "_commit_hash", None)
            name = self.config.learned(row.learned, condition.seed)
            identity[row.learned] = checkpoint_digest(name, revision)
        if schedule is not None:
            learned = f"{self.predictor_digest} {schedule.newline}" if row.uses_predictor else None
            identity["schedule"] = learned or repr(schedule)
        return identity

    def provenance(self) -> dict[str, Any]:
        model = self.vlm.model
        facts = {"name": self._model, "digest": self.model_digest, "dtype": str(model.dtype)}
        return {"model": facts, **environment(model.device)}

    def check_answered(self) -> None:
        """Here nothing can be left without an answer: what goes wrong ends the evaluation."""
