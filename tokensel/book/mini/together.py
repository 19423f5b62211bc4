"""Fine-tuned models beside the model that they come from: every question under every model, paired."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.recorded import RecordedAnswers, recorded_answers
from tokensel.benchmarks.results import score_rows
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.statistics import bootstrap
from tokensel.benchmarks.table import load_suite
from tokensel.utils.devices import check_device
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import command_line, environment

__all__ = ["compared", "parse_models", "record_together", "together_config"]

SUITE = "tokensel.book.mini.suite"


def together_config(
    model: str | Path, selector: str | Path, out: str | Path, keeps: Sequence[float], n: int, **others: object
) -> EvalConfig:
    """How each of the models is asked: reading and general tasks, with all tokens and with the selector's."""
    tasks = tuple(name for name, row in load_suite(SUITE).items() if row.group in ("reading", "general"))
    asked = EvalConfig(
        model=str(model),
        selector=str(selector),
        suite=SUITE,
        benchmarks=tasks,
        methods=("full", "selector"),
        keeps=tuple(keeps),
        n=n,
        thumbnail="last",
        compare=(),
        batch_size=40,
        out=str(out),
    )
    return replace(asked, **others)


def compared(
    configs: Mapping[str, EvalConfig], seed: int = 0, controls: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """The scores of finished evaluations of several models, and their paired differences from the first.

    Args:
        configs: of each model's evaluation, by the name that the model has in the table.
        seed: of the bootstrap.
        controls: the model that is the control of another, by the name of the other.

    Returns:
        A row for each model, benchmark and condition, with 95 % intervals; scores and differences 0 to 1.
        With ``controls`` also the paired difference of a model from its control, empty where there is none.

    Raises:
        TokenselError: an answer is missing.
    """
    answers = {name: recorded_answers(config) for name, config in configs.items()}
    first, controls = next(iter(configs)), controls or {}
    rows = []
    for name, parts in answers.items():
        control = controls.get(name)
        for i, part in enumerate(parts):
            kept = list(score_rows(name, part.benchmark, part.table.scores, seed=seed))
            columns = _differences(part, answers[first][i], "difference", seed)
            if control is not None:
                columns |= {"control": [control] * len(kept)}
                columns |= _differences(part, answers[control][i], "control_difference", seed)
            for j, row in enumerate(kept):
                gap = {column: values[j] for column, values in columns.items()}
                rows.append(row | {"neighbours": configs[name].neighbours} | gap)
    return pd.DataFrame(rows)


def _differences(
    part: RecordedAnswers, reference: RecordedAnswers, column: str, seed: int
) -> dict[str, Sequence[Any]]:
    """A model's paired differences from another in each condition of a benchmark, with intervals."""
    table, base = part.table.scores, reference.table.scores
    mean, low, high = bootstrap(
        np.stack([table[condition] - base[condition] for condition in table], 1), seed=seed
    )
    return {column: list(mean), f"{column}_low": list(low), f"{column}_high": list(high)}


def parse_models(entries: Sequence[str]) -> dict[str, str]:
    """``["stock=data/mini/llava-next"]`` -> ``{"stock": "data/mini/llava-next"}``.

    Raises:
        TokenselError: an entry without a name or a folder.
    """
    models = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise TokenselError(f"model is {entry!r}: give name=folder, such as stock=data/mini/llava-next")
        models[name] = folder
    return models


def record_together(
    models: Mapping[str, str],
    table: Path,
    config: EvalConfig,
    progress: bool = True,
    controls: Mapping[str, str] | None = None,
) -> Path:
    """Evaluate each model, and record :func:`compared` with its provenance as JSON beside it.

    Killed at any moment, the same call goes on with the answers that there are.

    Args:
        models: their folders, by the name in the table; the first is what the others are compared with.
        table: the CSV file.
        config: how each of them is asked; its model is replaced.
        progress: whether to show bars.
        controls: the name of a model's control, by the model's name.

    Raises:
        TokenselError: ``controls`` names a model that is not in ``models``.
    """
    for name in [name for pair in (controls or {}).items() for name in pair]:
        if name not in models:
            raise TokenselError(f"control names {name!r}: give one of {', '.join(models)}")
    configs = {name: replace(config, model=folder, name=name) for name, folder in models.items()}
    for each in configs.values():
        evaluate(each, progress=progress)
    rows = compared(configs, config.seed, controls)
    write_text(table, rows.to_csv(index=False, float_format="%.6g"))
    trained = {
        name: json.loads((Path(folder).parent / "train.json").read_text(encoding="utf-8"))
        for name, folder in models.items()
        if (Path(folder).parent / "train.json").is_file()
    }
    write_json(
        table.with_suffix(".provenance.json"),
        environment(check_device(config.device))
        | {"command": command_line(), "models": dict(models), "config": asdict(config), "training": trained},
    )
    return table
