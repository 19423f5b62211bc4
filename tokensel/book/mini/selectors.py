"""Selectors for the small models, trained in many ways and judged alike: what a chapter draws as tables.

A *trial* is a training of a selector for one tower, an evaluation of it in front of the model, and a few
measures of what it has learned. Everything is below one folder and resumes there: pages, features, trainings,
answers. The table has a row for each trial and budget.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.statistics import average
from tokensel.book.mini.outliers import plant_outliers
from tokensel.book.mini.world import DRAW, draw_page
from tokensel.data.feature_cache import FeatureCache
from tokensel.model.gates import GATES
from tokensel.training.config import TrainConfig
from tokensel.training.metrics import METRICS
from tokensel.training.train import Trained, train
from tokensel.utils.errors import TokenselError, check_names
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import command_line, environment
from tokensel.vlm import load_vlm

__all__ = ["STUDIES", "Trial", "record"]

SUITE = "tokensel.book.mini.suite"
TASKS = ("forms", "charts", "posters", "scene_text", "attributes", "science", "diagrams", "mixed")
KEEPS = (0.1, 0.2, 0.3, 0.5, 0.7)
BASELINES = ("full", "random", "uniform", "norm", "diversity")
PAGES = 150  # of each task's training split
# a tower as the model that holds it, without what is made below the folder of the trials
TRIAL_TOWERS = {"clip": "llava-next", "siglip": "llava-onevision", "outliers": "", "unlabelled": ""}
BUDGET = {"p": 0.05, "p_most": 0.6}
DRAWN = {"gate": "throttle", "tau_start": 2.0, "tau_end": 0.1, **BUDGET}


@dataclass(frozen=True)
class Trial:
    """One training and its evaluation.

    Attributes:
        study: the table it belongs to.
        tower: a key of ``TRIAL_TOWERS``.
        name: tells it from others of its study and tower.
        seed: of the training.
        options: of :class:`~tokensel.training.config.TrainConfig`.
    """

    study: str
    tower: str
    name: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.study}-{self.tower}-{self.name}-{self.seed}"

    def config(self, out: Path, encoder: str) -> TrainConfig:
        """Its training; batches are small, so that 1,500 steps take a few minutes on one core."""
        common: dict[str, Any] = dict(steps=1500, batch_size=16, lr=1e-3, tiles="anyres", save_every=250)
        common |= dict(
            images=str(out / "pages"),
            encoder=encoder,
            cache=str(out / "features" / self.tower),
            out=str(out / self.folder),
            metric_prompts=("transcribe the page.", "describe the scene."),
        )
        return TrainConfig(**(common | self.options), seed=self.seed)


def _gate(gate: str) -> dict[str, Any]:
    """The options of a gate: the paper's has a fixed p, the others divide budgets that are drawn."""
    if gate == "gumbel":
        return {"gate": gate, "p": 0.3, "tau_start": 2.0, "tau_end": 1.0}
    return {**DRAWN, "gate": gate} | ({"tau_end": 1.0} if gate == "topk" else {})


def _one_budget(p: float) -> dict[str, Any]:
    return {**DRAWN, "p": p, "p_most": None}


STUDIES: dict[str, tuple[Trial, ...]] = {
    "metrics": tuple(
        Trial("metrics", tower, metric, options={**DRAWN, "metric": metric})
        for tower in TRIAL_TOWERS
        for metric in METRICS
    ),
    "gates": tuple(
        Trial("gates", "clip", gate, seed, {**_gate(gate), "metric": "reader"})
        for seed in range(3)
        for gate in GATES
    ),
    "budgets": tuple(
        Trial("budgets", "clip", f"{p}", seed, {**_one_budget(p), "metric": "reader"})
        for seed in range(3)
        for p in (0.1, 0.2, 0.3, 0.5)
    ),
    "length": tuple(
        Trial("length", "clip", "5000", seed, {**DRAWN, "metric": "reader", "steps": 5000})
        for seed in range(3)
    ),
}


def record(
    studies: Iterable[str],
    out: Path,
    table: Path,
    n: int = 100,
    split: str = "validation",
    towers: Iterable[str] = tuple(TRIAL_TOWERS),
    unlabelled: Path | None = None,
) -> Path:
    """Run the trials of some studies and write their table; what exists already is not done again.

    Args:
        studies: keys of ``STUDIES``.
        out: folder of all that is made on the way.
        table: the CSV file to write; beside it goes its provenance, as JSON.
        n: questions a task.
        split: of the questions.
        towers: only trials on these.
        unlabelled: folder of a model whose tower has learned without labels, see ``Recipe.hidden``; without
            it there are no trials on that tower.

    Raises:
        TokenselError: an unknown study or tower.
    """
    studies, towers = list(studies), list(towers)
    for name, known in [(s, STUDIES) for s in studies] + [(t, TRIAL_TOWERS) for t in towers]:
        check_names([name], list(known))
    trials = [trial for study in studies for trial in STUDIES[study] if trial.tower in towers]
    trials = [trial for trial in trials if trial.tower != "unlabelled" or unlabelled]
    if not trials:
        raise TokenselError(f"no trial of {', '.join(studies)} is on {', '.join(towers)}: give other towers")
    _draw_pages(out / "pages")
    parts = []
    for trial in tqdm(trials, desc="trials"):
        model = _model_of(trial.tower, out, unlabelled)
        parts.append(_run(trial, model, out, n, split))
        rows = pd.concat(parts, ignore_index=True)
        write_text(table, rows.to_csv(index=False, float_format="%.6g"))
    provenance = environment(torch.device("cpu")) | {
        "studies": {study: len([t for t in trials if t.study == study]) for study in studies},
        "questions": {"n": n, "split": split, "suite": SUITE, "tasks": TASKS},
        "command": command_line(),
    }
    write_json(table.with_suffix(".provenance.json"), provenance)
    return table


def _draw_pages(folder: Path) -> None:
    """The images that selectors are trained on; drawn once."""
    for task in DRAW:
        for index in range(PAGES):
            path = folder / f"{task}-train-{index}.png"
            if not path.exists():
                draw_page(task, "train", index).save(path)


def _model_of(tower: str, out: Path, unlabelled: Path | None) -> str:
    """The folder of the model that holds a tower; that with outliers is made on first use."""
    if tower == "unlabelled":
        return str(unlabelled)
    if tower != "outliers":
        return str(Path("data") / "mini" / TRIAL_TOWERS[tower])
    folder = out / "outliers"
    if not (folder / "model.safetensors").exists():
        vlm = load_vlm(Path("data") / "mini" / TRIAL_TOWERS["clip"], device="cpu")
        vlm.processor.save_pretrained(folder)
        plant_outliers(vlm.model).save_pretrained(folder)
    return str(folder)


def _run(trial: Trial, model: str, out: Path, n: int, split: str) -> pd.DataFrame:
    """Train and judge: a row for each budget and group of tasks, for the selector and for the baselines."""
    trained = train(trial.config(out, model))
    learned = _learned(trained, FeatureCache(out / "features" / trial.tower))
    config = EvalConfig(
        model=model,
        suite=SUITE,
        benchmarks=TASKS,
        methods=(*BASELINES, "selector"),
        keeps=KEEPS,
        n=n,
        split=split,
        seeds=(0, 1, 2),
        selector=str(out / trial.folder / "selector"),
        thumbnail="last",
        out=str(out / "answers"),
        name=f"{trial.folder}-{split}-{n}",
    )
    scores = pd.read_csv(str(evaluate(config).table))
    rows = average(scores, ["method", "keep", "group"]).reset_index()  # of random selection, over its seeds
    trial_columns = {"study": trial.study, "tower": trial.tower, "name": trial.name, "seed": trial.seed}
    return rows.assign(**trial_columns, n=n, split=split, **learned)


@torch.no_grad()
def _learned(trained: Trained, features: FeatureCache, most: int = 512) -> dict[str, float]:
    """How the loss ended, and what explains the selector's scores of ``most`` tiles that it was trained on.

    ``place`` is the share of the scores' variance that the place in the tile explains; ``norm`` is Spearman's
    correlation with the length of a token.
    """
    tiles = torch.arange(0, len(features), -(-len(features) // most))
    tokens = features[tiles].tokens.float()
    scores = trained.selector.scores(tokens)
    history = torch.tensor([step["l_rec"] for step in trained.history])
    losses = history.unfold(0, min(100, len(history)), 1).mean(1)  # of 100 steps each
    return {
        "l_rec": float(losses[-1]),
        "l_rec_best": float(losses.min()),
        "place": float(scores.mean(0).var(correction=0) / scores.var(correction=0)),
        "norm": _spearman(scores, tokens.norm(dim=-1)),
    }


def _spearman(one: Tensor, other: Tensor) -> float:
    ranks = [value.flatten().argsort().argsort().float() for value in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
