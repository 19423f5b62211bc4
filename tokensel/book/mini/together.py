"""Fine-tuned models beside the model that they come from: every question under every model, paired."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.recorded import recorded_answers
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


def compared(configs: Mapping[str, EvalConfig], seed: int = 0) -> pd.DataFrame:
    """The scores of finished evaluations of several models, and their paired differences from the first.

    Args:
        configs: of each model's evaluation, by the name that the model has in the table.
        seed: of the bootstrap.

    Returns:
        A row for each model, benchmark and condition, with 95 % intervals; scores and differences 0 to 1.

    Raises:
        TokenselError: an answer is missing.
    """
    answers = {name: recorded_answers(config) for name, config in configs.items()}
    first = next(iter(answers.values()))
    rows = []
    for name, parts in answers.items():
        for part, reference in zip(parts, first, strict=True):
            table, base = part.table.scores, reference.table.scores
            gaps = np.stack([table[condition] - base[condition] for condition in table], 1)
            mean, low, high = bootstrap(gaps, seed=seed)
            for i, row in enumerate(score_rows(name, part.benchmark, table, seed=seed)):
                gap = {"difference": mean[i], "difference_low": low[i], "difference_high": high[i]}
                rows.append(row | {"neighbours": configs[name].neighbours} | gap)
    return pd.DataFrame(rows)


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
    models: Mapping[str, str], table: Path, config: EvalConfig, progress: bool = True
) -> Path:
    """Evaluate each model, and record :func:`compared` with its provenance as JSON beside it.

    Killed at any moment, the same call goes on with the answers that there are.

    Args:
        models: their folders, by the name in the table; the first is what the others are compared with.
        table: the CSV file.
        config: how each of them is asked; its model is replaced.
        progress: whether to show bars.
    """
    configs = {name: replace(config, model=folder, name=name) for name, folder in models.items()}
    for each in configs.values():
        evaluate(each, progress=progress)
    rows = compared(configs, config.seed)
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
