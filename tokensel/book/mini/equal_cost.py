"""DyRate against schedules that cost the same: the rivals of chapter 8, for one predictor or for several.

For each rival the fraction is found at which DyRate's own answers would have cost as much, once in FLOPs,
once in bytes of cache, and the rival is asked at that fraction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.recorded import RecordedAnswers, joined, recorded_answers
from tokensel.benchmarks.results import Row
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.session import EvalSession
from tokensel.benchmarks.statistics import bootstrap
from tokensel.cost.answers import Work, unrolled, work_cost
from tokensel.cost.equal import keep_at_cost
from tokensel.schedules import RatePredictor, make_schedule
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import command_line

__all__ = [
    "COSTS",
    "RIVALS",
    "Compared",
    "compare",
    "difference_table",
    "predictor_table",
    "record_equal_cost",
]

RIVALS = ("fastv", "fixed", "exponential", "vtw")
COSTS: dict[str, Literal["flops", "kv_bytes"]] = {"FLOPs": "flops", "cache": "kv_bytes"}
_NAMES = tuple(COSTS.values())
_AS_IT_IS = "as it is"  # VTW has a single cost, so that nothing can be made equal


@dataclass(frozen=True)
class Compared:
    """The answers of one predictor and of its rivals.

    Attributes:
        predictor: facts of its training: ``predictor_seed`` and ``weight``.
        layer: the first layer that it shortens.
        model: the language model's name in the tables.
        answers: of all conditions, by benchmark.
        rivals: the condition of each rival at each equal cost.
        costs: for each condition and benchmark the mean FLOPs of an answer and bytes of keys and values.
    """

    predictor: dict[str, Any]
    layer: int
    model: str
    answers: list[RecordedAnswers]
    rivals: dict[tuple[str, str], Condition]
    costs: dict[Condition, Float[np.ndarray, "benchmarks costs"]]

    def condition(self, method: str) -> Condition:
        """The only condition of a method."""
        (condition,) = (c for c in self.answers[0].table.scores if c.method == method)
        return condition

    def spent(self) -> pd.DataFrame:
        """FLOPs and cache of DyRate and its rivals over those of all tokens; benchmarks count the same."""
        full = self.costs[self.condition("full")].mean(0)
        rows = {("dyrate", ""): self.costs[self.condition("dyrate")].mean(0) / full}
        rows |= {name: self.costs[condition].mean(0) / full for name, condition in self.rivals.items()}
        keeps = [float("nan"), *(condition.keep for condition in self.rivals.values())]
        index = pd.MultiIndex.from_tuples(rows, names=["method", "equal"])
        return pd.DataFrame(rows.values(), index=index, columns=list(_NAMES)).assign(keep=keeps)


def compare(config: EvalConfig, rivals: Sequence[str] = RIVALS, progress: bool = True) -> Compared:
    """Ask DyRate, and its rivals at equal cost.

    Args:
        config: model, predictor, layer, benchmarks and questions. The smallest of its keeps is the least that
            a rival keeps: where it costs more than DyRate even so, as rivals that read the whole prompt do at
            equal FLOPs, it is asked at that. Its ``name`` begins the names of the files that are written.
        rivals: some of :data:`RIVALS`.
        progress: whether to show bars.
    """
    least, layer = min(config.keeps), config.layer
    asked_first = ("full", "dyrate", *(rival for rival in rivals if rival == "vtw"))
    first = replace(config, methods=asked_first, keeps=(least,), compare=())
    evaluate(replace(first, name=f"{config.name}_equal"), progress=progress)
    runs, session = [recorded_answers(first)], EvalSession(first)
    shape, itemsize = session.vlm.model.config, session.vlm.model.dtype.itemsize
    dyrate = next(c for c in runs[0][0].work if c.method == "dyrate")
    own = [part.work[dyrate] for part in runs[0]]
    keeps = {
        (rival, equal): keep_at_cost(
            shape, own, lambda keep, rival=rival: make_schedule(rival, layer=layer, keep=keep), cost, least
        )
        for rival in rivals
        if rival != "vtw"
        for equal, cost in COSTS.items()
    }
    for rival in dict.fromkeys(rival for rival, _ in keeps):
        wanted = tuple(sorted({keep for name, keep in keeps.items() if name[0] == rival}))
        asked = replace(first, methods=(rival,), keeps=wanted, name=f"{config.name}_equal_{rival}")
        evaluate(asked, progress=progress)
        runs.append(recorded_answers(asked))
    answers = joined(runs)
    known = {(c.method, c.keep): c for c in answers[0].table.scores}
    matched = {name: known[name[0], keep] for name, keep in keeps.items()}
    if "vtw" in rivals:
        matched["vtw", _AS_IT_IS] = next(c for c in known.values() if c.method == "vtw")

    def mean_costs(works: Sequence[Work]) -> Float[np.ndarray, "costs"]:
        return np.mean([work_cost(shape, work, itemsize) for work in works], axis=0)

    facts = RatePredictor.from_pretrained(str(config.dyrate)).config
    return Compared(
        {"predictor_seed": str(facts.seed), "weight": facts.weight},
        layer,
        session.name,
        answers,
        matched,
        {c: np.stack([mean_costs(part.work[c]) for part in answers]) for c in known.values()},
    )


def difference_table(runs: Sequence[Compared], seed: int = 0) -> pd.DataFrame:
    """A row for each predictor, rival, equal cost and benchmark: DyRate minus the rival, with 95 % intervals.

    Where several predictors differ only in the seed of their training, rows for all of them follow: each
    question's mean over the predictors, so that the interval covers the choice of questions, with the seeds
    in ``predictor_seed``.

    Args:
        runs: one for each predictor.
        seed: of the bootstrap.

    Returns:
        Scores and their difference from 0 to 1. ``flops`` and ``kv_bytes``: what DyRate's answers cost, as
        fractions of the full model's; ``rival_flops`` and ``rival_kv_bytes`` likewise. ``keep`` is the
        rival's, the mean over the predictors.
    """
    rows: list[Row] = []
    for group in _groups(runs):
        for rival, equal in group[0].rivals:
            # of each predictor: the condition of the full model, its own, and the rival's
            asked = [(*map(run.condition, ("full", "dyrate")), run.rivals[rival, equal]) for run in group]
            for number, part in enumerate(group[0].answers):
                columns, costs = [], []
                for run, (full, *pair) in zip(group, asked):
                    scores = run.answers[number].table.scores
                    columns.append(np.stack([scores[condition] for condition in pair], 1))
                    costs.append(
                        [run.costs[condition][number] / run.costs[full][number] for condition in pair]
                    )
                both, spent = np.mean(columns, 0), np.mean(costs, 0)  # over the predictors
                gaps = bootstrap(both[:, :1] - both[:, 1:], seed=seed, strata=part.table.strata)
                mean, low, high = (float(values[0]) for values in gaps)
                rows.append(
                    _facts(group, part)
                    | {"rival": rival, "equal": equal, "keep": float(np.mean([c.keep for *_, c in asked]))}
                    | dict(zip(("score", "rival_score"), both.mean(0)))
                    | {"difference": mean, "ci_low": low, "ci_high": high, "n": len(both)}
                    | dict(zip((*_NAMES, *(f"rival_{name}" for name in _NAMES)), spent.ravel()))
                )
    return pd.DataFrame(rows)


def predictor_table(runs: Sequence[Compared], seed: int = 0) -> pd.DataFrame:
    """A row for each predictor and benchmark: what it leaves of the image, and what that loses.

    Predictors that differ only in their seed have rows for all of them, as in :func:`difference_table`.

    Returns:
        ``prompt``, ``second`` and ``end``: the fraction of the visual tokens that is left after the prompt,
        at the step after it, and at the end of the answer; ``later``, what is dropped after the prompt, and
        ``gradual``, the part of it that is dropped after that second step, with 95 % intervals; ``steps`` and
        ``full_steps``: mean length of an answer, and of the full model's; ``lost``: the score with all tokens
        minus DyRate's, with its interval.
    """
    rows: list[Row] = []
    for group in _groups(runs):
        for number, part in enumerate(group[0].answers):
            full, lost, left = group[0].condition("full"), [], []
            for run in group:
                answers, dyrate = run.answers[number], run.condition("dyrate")
                lost.append(answers.table.scores[full] - answers.table.scores[dyrate])
                left.append([_left(work, run.layer) for work in answers.work[dyrate]])
            shares = np.mean(left, 0)  # over the predictors
            prompt, second, end, _ = shares.T
            columns = {"lost": np.mean(lost, 0), "later": prompt - end, "gradual": second - end}
            mean, low, high = bootstrap(np.stack(list(columns.values()), 1), seed=seed)
            row = _facts(group, part) | dict(zip(("prompt", "second", "end", "steps"), shares.mean(0)))
            row["full_steps"] = float(np.mean([len(unrolled(work["held"])) for work in part.work[full]]))
            for place, name in enumerate(columns):
                row |= {name: mean[place], f"{name}_low": low[place], f"{name}_high": high[place]}
            rows.append(row | {"n": len(part.work[full])})
    return pd.DataFrame(rows)


def _left(work: Work, layer: int) -> tuple[float, float, float, int]:
    """Fractions of the visual tokens left after the prompt, a step later and at the end; and the steps."""
    held = unrolled(work["held"])
    left = (held[:, layer] - (held[0, 0] - work["visual"])) / work["visual"]  # newlines not counted
    return left[0], left[min(1, len(left) - 1)], left[-1], len(left)


def _groups(runs: Sequence[Compared]) -> list[list[Compared]]:
    """Each predictor alone, and those that differ only in their seed together."""
    alike: dict[tuple[float | None, int], list[Compared]] = {}
    for run in runs:
        alike.setdefault((run.predictor["weight"], run.layer), []).append(run)
    return [[run] for run in runs] + [group for group in alike.values() if len(group) > 1]


def _facts(group: Sequence[Compared], part: RecordedAnswers) -> dict[str, Any]:
    """What the rows of both tables begin with."""
    facts, seeds = part.benchmark, " ".join(run.predictor["predictor_seed"] for run in group)
    asked = {"model": group[0].model, "benchmark": facts.name, "group": facts.group, "metric": facts.metric}
    return asked | group[0].predictor | {"predictor_seed": seeds}


def record_equal_cost(
    config: EvalConfig, predictors: Sequence[str], table: Path, rivals: Sequence[str] = RIVALS
) -> Path:
    """Record :func:`difference_table` of several predictors, and :func:`predictor_table` beside it.

    Args:
        config: as for :func:`compare`, of any predictor; its layer is replaced by that of each predictor.
        predictors: their folders.
        table: where the differences go; the other table is ``<table>.predictors.csv``.
        rivals: some of :data:`RIVALS`.
    """
    runs = []
    for number, name in enumerate(predictors):
        layer = RatePredictor.from_pretrained(name).config.layer
        asked = replace(config, dyrate=name, layer=layer, vtw_layer=layer, name=f"{config.name}_{number}")
        runs.append(compare(asked, rivals))
    write_text(table, difference_table(runs, config.seed).to_csv(index=False, float_format="%.6g"))
    beside = predictor_table(runs, config.seed)
    write_text(table.with_suffix(".predictors.csv"), beside.to_csv(index=False, float_format="%.6g"))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    session = EvalSession(replace(config, dyrate=predictors[0]))
    facts = session.provenance() | {"predictors": list(predictors), "date": date, "command": command_line()}
    write_json(table.with_suffix(".provenance.json"), facts | {"config": config.to_dict()})
    return table
