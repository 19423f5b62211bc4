"""Selectors for the small models, trained in many ways and judged alike: what a chapter draws as tables.

A *trial* is a training of a selector for one tower, an evaluation of it in front of the model, and a few
measures of what it has learned. Everything is below one folder and resumes there: pages, features, trainings,
answers. The table has a row for each trial and budget.
"""

from collections.abc import Callable, Iterable
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
from tokensel.book.mini.counts import compare_counts
from tokensel.book.mini.outliers import plant_outliers
from tokensel.book.mini.world import DRAW, draw_page
from tokensel.data.feature_cache import build_cache
from tokensel.data.features import Features
from tokensel.data.image_sources import open_images
from tokensel.model.gates import GATES, threshold
from tokensel.model.objective import distance
from tokensel.model.reconstructor import TokenReconstructor
from tokensel.model.selector import TokenSelector
from tokensel.training.autoencoder import Autoencoder, Statistics
from tokensel.training.config import TrainConfig
from tokensel.training.first_tiles import first_batches
from tokensel.training.metrics import METRICS, Metric, open_metric
from tokensel.training.processes import Processes
from tokensel.training.train import open_loader, train
from tokensel.utils.errors import TokenselError, check_names
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import command_line, environment
from tokensel.utils.seeds import generator
from tokensel.vlm import load_vlm
from tokensel.vlm.family_encoder import load_encoder

__all__ = ["STUDIES", "Trial", "model_of", "record", "record_counts", "what_explains"]

SUITE = "tokensel.book.mini.suite"
TASKS = ("forms", "charts", "posters", "scene_text", "attributes", "science", "diagrams", "mixed")
KEEPS = (0.1, 0.2, 0.3, 0.5, 0.7)
BASELINES = ("full", "random", "uniform", "norm", "diversity")
PAGES = 150  # of each task's training split
HELD_OUT = 20  # of each task's validation split, for the error of the reconstruction
JUDGED_AT = 0.3  # the budget at which it is measured, and at which selectors are compared as training goes on
# a tower as the model that holds it, without what is made below the folder of the trials
TRIAL_TOWERS = {"clip": "llava-next", "siglip": "llava-onevision", "outliers": "", "unlabelled": ""}


@dataclass(frozen=True)
class Trial:
    """One training and its evaluation.

    Attributes:
        study: the table it belongs to.
        tower: a key of ``TRIAL_TOWERS``.
        name: tells it from others of its study and tower.
        seed: of the training.
        options: of :class:`~tokensel.training.config.TrainConfig`.
        each: judge the selector also after each this many steps, at one budget; 0 for the last step alone.
    """

    study: str
    tower: str
    name: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    each: int = 0

    @property
    def folder(self) -> str:
        return f"{self.study}-{self.tower}-{self.name}-{self.seed}"

    def config(self, out: Path, encoder: str) -> TrainConfig:
        """Its training; batches are small, so that 1,500 steps take a few minutes on one core."""
        common: dict[str, Any] = dict(steps=1500, batch_size=16, lr=1e-3, tiles="anyres")
        common["save_every"] = self.each or 250
        common |= dict(
            images=str(out / "pages"),
            encoder=encoder,
            cache=str(out / "features" / self.tower),
            out=str(out / self.folder),
            metric_prompts=("transcribe the page.", "describe the scene."),
        )
        return TrainConfig(**(common | self.options), seed=self.seed)


STUDIES: dict[str, tuple[Trial, ...]] = {
    "metrics": tuple(
        Trial("metrics", tower, metric, options={"metric": metric})
        for tower in TRIAL_TOWERS
        for metric in METRICS
    ),
    "gates": tuple(Trial("gates", "clip", gate, seed, {"gate": gate}) for seed in range(3) for gate in GATES),
    "budgets": tuple(
        Trial("budgets", "clip", f"{p}", seed, {"p": p}) for seed in range(3) for p in (0.1, 0.2, 0.3, 0.5)
    ),
    "length": tuple(
        Trial("length", tower, "5000", seed, {"steps": 5000, "lr": 3e-4}, each=1000)
        for tower in ("clip", "siglip")
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
        unlabelled: folder of a model whose tower has learned without labels, as
            :func:`~tokensel.book.mini.imitate.imitate` makes one; without it there are no trials on it.

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
    _draw_pages(out / "pages", "train", PAGES)
    parts = []
    for trial in tqdm(trials, desc="trials"):
        model = model_of(trial.tower, out, unlabelled)
        parts.append(_run(trial, model, out, n, split))
        rows = _once(pd.concat(parts, ignore_index=True))
        write_text(table, rows.to_csv(index=False, float_format="%.6g"))
    _write_provenance(table, n, split)
    return table


def _once(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows without what the baselines have said before: they are the same for all trials on a tower."""
    again = rows.duplicated(["tower", "method", "keep", "group"]) & (rows["method"] != "selector")
    return rows.loc[~again]


def _write_provenance(table: Path, n: int, split: str) -> None:
    questions = {"n": n, "split": split, "suite": SUITE, "tasks": TASKS}
    provenance = environment(torch.device("cpu")) | {"questions": questions, "command": command_line()}
    write_json(table.with_suffix(".provenance.json"), provenance)


def _choices(model: str, n: int, split: str) -> dict[str, Any]:
    """What all evaluations here have in common."""
    return {"model": model, "suite": SUITE, "benchmarks": TASKS, "n": n, "split": split}


def _draw_pages(folder: Path, split: str, count: int) -> None:
    """The first images of each task; drawn once."""
    for task in DRAW:
        for index in range(count):
            path = folder / f"{task}-{split}-{index}.png"
            if not path.exists():
                draw_page(task, split, index).save(path)


def model_of(tower: str, out: Path, unlabelled: Path | None = None) -> str:
    """The folder of the model that holds a tower; that with outliers is made on first use, below ``out``."""
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
    config, folder = trial.config(out, model), out / trial.folder

    def save(step: int, autoencoder: Autoencoder) -> None:
        if trial.each and step < config.steps:
            autoencoder.selector.save_pretrained(folder / f"selector-{step}")
            autoencoder.reconstructor.save_pretrained(folder / f"reconstructor-{step}")

    train(config, at_save=save)
    held_out = _held_out(trial.tower, model, out)
    loss = _held_out_loss(config, held_out)
    parts = []
    for step in [*range(trial.each or config.steps, config.steps, trial.each or 1), config.steps]:
        last = step == config.steps
        ending = "" if last else f"-{step}"
        selector = TokenSelector.from_pretrained(folder / f"selector{ending}")
        reconstructor = TokenReconstructor.from_pretrained(folder / f"reconstructor{ending}")
        rows = _answers(trial, model, out, n, split, f"selector{ending}", KEEPS if last else (JUDGED_AT,))
        learned = {"l_rec": loss(selector, reconstructor)} | what_explains(selector, held_out)
        parts.append(rows.assign(steps=step, **learned))
    rows = pd.concat(parts, ignore_index=True)
    trial_columns = {"study": trial.study, "tower": trial.tower, "name": trial.name, "seed": trial.seed}
    return rows.assign(**trial_columns, n=n, split=split)


def _answers(
    trial: Trial, model: str, out: Path, n: int, split: str, selector: str, keeps: tuple[float, ...]
) -> pd.DataFrame:
    """The model's scores behind a selector of the trial; at all budgets, behind the baselines too."""
    folder = out / trial.folder
    own = {
        "methods": (*BASELINES, "selector") if keeps == KEEPS else ("selector",),
        "keeps": keeps,
        "seeds": (0, 1, 2),
        "selector": str(folder / selector),
        "thumbnail": "last",
        "out": str(out / "answers"),
        "name": f"{trial.folder}-{selector}-{split}-{n}",
    }
    config = EvalConfig.from_dict(_choices(model, n, split) | own)
    scores = pd.read_csv(str(evaluate(config).table))
    return average(scores, ["method", "keep", "group"]).reset_index()  # of random selection, over its seeds


def _held_out(tower: str, model: str, out: Path) -> Features:
    """Features of tiles that no selector is trained on, in memory."""
    pages = out / "pages-validation"
    _draw_pages(pages, "validation", HELD_OUT)
    folder = out / "features" / f"{tower}-validation"
    cache = build_cache(
        folder, open_images(str(pages)), load_encoder(model, "cpu", torch.float32), "anyres", progress=False
    )
    return cache[torch.arange(len(cache))]


def record_counts(out: Path, table: Path, n: int = 400, split: str = "test") -> Path:
    """A count for each image against an equal share of every image, behind the first trial of "length".

    Args:
        out, table, n, split: as for :func:`record`.
    """
    _draw_pages(out / "pages", "train", PAGES)
    trial = STUDIES["length"][0]
    model = model_of(trial.tower, out)
    config = trial.config(out, model)
    train(config)
    choices = _choices(model, n, split) | {"thumbnail": "drop"}  # a threshold knows no order of tiles
    held_out = _held_out(trial.tower, model, out)
    rows = compare_counts(choices, out / trial.folder, held_out, _metric(config))
    write_text(table, rows.to_csv(index=False, float_format="%.6g"))
    _write_provenance(table, n, split)
    return table


def _held_out_loss(
    config: TrainConfig, held_out: Features
) -> Callable[[TokenSelector, TokenReconstructor], float]:
    """L_rec on held-out tiles, where the best tokens are kept and no others, measured as in the training."""
    metric = _metric(config)
    with torch.no_grad():
        scale = Statistics.of([held_out], metric).scale
    noise = torch.randn(held_out.tokens.shape, generator=generator(0, "held out"))

    @torch.no_grad()
    def loss(selector: TokenSelector, reconstructor: TokenReconstructor) -> float:
        errors = []
        for start in range(0, len(held_out), 128):
            rows = slice(start, start + 128)
            tokens = held_out.tokens[rows].float()
            scores = selector.scores(tokens)
            mask = (scores > threshold(scores, JUDGED_AT)).float()
            instead = noise[rows] if config.gate == "throttle" else None
            reconstructed = reconstructor(selector.masked(tokens, mask, instead))
            errors.append(distance(metric(reconstructed), metric(tokens)))
        return float(torch.cat(errors).mean() / scale)

    return loss


def _metric(config: TrainConfig) -> Metric:
    """The metric of a training."""
    processes = Processes(torch.device("cpu"))
    loader = open_loader(config, processes, None, None, None)
    return open_metric(config, processes, loader, None, lambda: first_batches(loader, config))[1]


@torch.no_grad()
def what_explains(selector: TokenSelector, tiles: Features) -> dict[str, float]:
    """What explains a selector's scores of some tiles.

    ``place`` is the share of their variance that the place in the tile explains; ``norm`` is Spearman's
    correlation with the length of a token.
    """
    tokens = tiles.tokens.float()
    scores = selector.scores(tokens)
    return {
        "place": float(scores.mean(0).var(correction=0) / scores.var(correction=0)),
        "norm": _spearman(scores, tokens.norm(dim=-1)),
    }


def _spearman(one: Tensor, other: Tensor) -> float:
    ranks = [value.flatten().argsort().argsort().float() for value in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
