"""What the small model misses when visual tokens are gone: one thing changed at a time, the same questions.

A shortened prompt differs from a whole one in several ways at once: its image is shorter, kept tokens stand
beside others than before, and each gets more attention. Every setting restores one of these.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from tokensel.benchmarks.metrics import METRICS
from tokensel.benchmarks.questions import stable_keys
from tokensel.benchmarks.statistics import bootstrap
from tokensel.book.mini import residual
from tokensel.book.mini.oracle import register_oracles
from tokensel.book.mini.residual import kept_cells
from tokensel.book.mini.suite import BENCHMARKS, asked_page
from tokensel.scorers import Scorer, make_scorer
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import checkpoint_digest, command_line, environment, json_digest
from tokensel.utils.source import code_digest
from tokensel.vlm import Encoded, Reduced, Vlm, encode, load_vlm, reduce
from tokensel.vlm.bias import biased

__all__ = ["REFERENCE", "Setting", "ask", "differences", "points", "record_mechanism", "settings_of"]

REFERENCE = "removed"  # what every setting is compared with
TASKS = ("forms", "charts", "posters", "scene_text")
CHOSEN = (("selector", 0.3), ("drawn", 0.1), ("drawn", 0.3))  # drawn: nothing but blank paper is dropped
_BLANK = {"dropped": "blank"}


@dataclass(frozen=True)
class Setting:
    """One intervention on a shortened prompt.

    Attributes:
        choices: fields of :class:`~tokensel.vlm.choose.Choices`; the thumbnail comes last unless they say
            otherwise.
        change: "" for none; "twice": every kept token counts twice, which is what a copy beside it would
            do to the attention; "hidden": what stands in the place of dropped tokens is not attended to;
            "behind": it stands behind all kept tokens of the image instead.
        layers: where the attention is changed, counted from 0; everywhere by default.
        heads: the same for query heads.
    """

    choices: dict[str, Any] = field(default_factory=dict)
    change: str = ""
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


def settings_of(layers: int, heads: int) -> dict[str, Setting]:
    """All settings for a language model with so many layers and heads, the reference first."""
    density = {"attention": "proportional"}
    whole = {
        REFERENCE: Setting(),
        "all tokens": Setting({"keep": 1.0}),
        "masked": Setting({"dropped": "masked"}),
        "compact positions": Setting({"positions": "compact"}),
        "copied": Setting({"dropped": "copied"}),
        "blank": Setting(_BLANK),
        "blank, behind": Setting(_BLANK, "behind"),
        "twice": Setting(change="twice"),
        "uniform": Setting({"attention": "uniform"}),
        "proportional, 0.5": Setting(density | {"strength": 0.5}),
        "proportional": Setting(density),
        "without newlines": Setting({"newline": "drop"}),
        "newlines of kept rows": Setting({"newline": "row"}),
        "thumbnail first": Setting({"thumbnail": "keep"}),
        "runs": Setting({"neighbours": 2}),
    }
    parts: dict[str, Setting] = {}
    for kind, count in (("layer", layers), ("head", heads)):
        for number in range(count):
            here, others = (number,), tuple(other for other in range(count) if other != number)
            hidden = Setting(_BLANK, "hidden")
            parts[f"proportional, {kind} {number}"] = _within(Setting(density), kind, here)
            parts[f"blank, not in {kind} {number}"] = _within(hidden, kind, here)
            parts[f"blank, only in {kind} {number}"] = _within(hidden, kind, others)
    return whole | parts


def _within(setting: Setting, kind: str, indices: tuple[int, ...]) -> Setting:
    """The same in some layers or heads alone."""
    return replace(setting, layers=indices) if kind == "layer" else replace(setting, heads=indices)


@torch.no_grad()
def ask(
    vlm: Vlm, encoded: Encoded, scorer: Scorer, keep: float, setting: Setting, max_new_tokens: int
) -> list[str]:
    """Answers of a batch under one setting."""
    choices = {"keep": keep, "thumbnail": "last"} | setting.choices
    reduced = reduce(encoded, scorer, **choices)
    bias, plain = reduced.attn_bias, replace(reduced, attn_bias=None)
    if setting.change == "twice":
        bias = math.log(2) * (reduced.visual & ~reduced.newlines).float()
    elif setting.change == "hidden":
        bias = torch.zeros(reduced.visual.shape).masked_fill(_filled(encoded, reduced), -torch.inf)
    elif setting.change == "behind":
        plain = _behind(encoded, plain)
    with biased(vlm.model, bias, layers=setting.layers, heads=setting.heads):
        return vlm.generate(plain, max_new_tokens=max_new_tokens)


def _filled(encoded: Encoded, reduced: Reduced) -> Bool[Tensor, "rows length"]:
    """The columns that hold something in the place of a dropped token."""
    dropped = encoded.layout.cell & ~kept_cells(encoded, reduced)
    return torch.zeros_like(reduced.visual).masked_scatter(reduced.visual, dropped)


def _behind(encoded: Encoded, reduced: Reduced) -> Reduced:
    """The same embeddings in another order: in each image, kept cells before those that fill the gaps."""
    layout, kept = encoded.layout, kept_cells(encoded, reduced)
    visual = reduced["inputs_embeds"][reduced.visual]  # packed
    moved = visual.clone()
    for number in range(len(layout.tiles)):
        own = (layout.image == number) & layout.cell
        moved[own] = torch.cat([visual[own & kept], visual[own & ~kept]])
    return reduced.with_visual(moved)


def points(
    vlm: Vlm,
    scorer: Scorer,
    keep: float,
    task: str,
    settings: dict[str, Setting],
    n: int,
    split: str = "test",
    batch_size: int = 20,
) -> pd.DataFrame:
    """Points (0 to 1) of each question of a task: a row for each question, a column for each setting."""
    bench, found = BENCHMARKS[task], {name: [] for name in settings}
    for start in range(0, n, batch_size):
        rows = [asked_page(task, split, index) for index in range(start, min(n, start + batch_size))]
        prompts = [vlm.prompt(asked.question) for _, asked in rows]
        keys = stable_keys([f"{task}-{split}-{index}" for index in range(start, start + len(rows))])
        encoded = encode(vlm.model, vlm.inputs([page.image for page, _ in rows], prompts), keys)
        for name, setting in settings.items():
            answers = ask(vlm, encoded, scorer, keep, setting, bench.max_new_tokens)
            metric = METRICS[bench.metric]
            found[name] += [metric(text, qa.answers, qa.options) for text, (_, qa) in zip(answers, rows)]
    return pd.DataFrame(found)


def differences(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Score (0 to 100) of each column of :func:`points`, and its paired difference from the reference."""
    against = table.sub(table[REFERENCE], axis=0)
    mean, low, high = (100 * part for part in bootstrap(against.to_numpy(), seed=seed))
    columns = {"score": 100 * table.mean(), "difference": mean, "ci_low": low, "ci_high": high}
    return pd.DataFrame(columns).rename_axis("setting").reset_index().assign(n=len(table))


def record_mechanism(
    model: Path, selector: Path, table: Path, out: Path, n: int = 200, split: str = "test"
) -> Path:
    """Record :func:`differences` and the probes of :mod:`tokensel.book.mini.residual`; resumes after a kill.

    Args:
        model: the small model.
        selector: one for it.
        table: CSV file to write; ``table`` with ``.residual.csv`` and the provenance beside it.
        out: folder of what is done already.
        n: questions a task.
        split: of the small world.
    """
    register_oracles()
    vlm, config = load_vlm(model, device="cpu"), {"n": n, "split": split, "tasks": TASKS}
    decoder = vlm.model.config.text_config
    every = settings_of(decoder.num_hidden_layers, decoder.num_attention_heads)
    identity = [*map(checkpoint_digest, map(str, (model, selector))), code_digest(__name__), n, split]

    def kept(name: str, compute: Callable[[], pd.DataFrame], *more: Any) -> pd.DataFrame:
        path = out / f"{name}-{json_digest([*identity, *more])}.csv"
        if not path.is_file():
            write_text(path, compute().to_csv(index=False))
        return pd.read_csv(path)

    tables, jobs = [], [(*chosen, task) for chosen in CHOSEN for task in TASKS]
    found: dict[tuple[str, float], list[pd.DataFrame]] = {chosen: [] for chosen in CHOSEN}
    for name, keep, task in tqdm(jobs, desc="mechanism"):
        scorer = make_scorer(name, selector=str(selector) if name == "selector" else None)
        # layers and heads one by one for the selector alone, which is what the book is about
        whole = {key: s for key, s in every.items() if s.layers is s.heads is None}
        settings = every if name == "selector" else whole
        more = [name, keep, task, {key: asdict(setting) for key, setting in settings.items()}]
        answered = partial(points, vlm, scorer, keep, task, settings, n, split)
        found[name, keep].append(kept("points", answered, *more))
    for (name, keep), parts in found.items():
        tables.append(differences(pd.concat(parts)).assign(scorer=name, keep=keep))
    write_text(table, pd.concat(tables).to_csv(index=False, float_format="%.6g"))
    ranks = make_scorer("selector", selector=str(selector))
    probed = kept("residual", partial(residual.probed, vlm, ranks, CHOSEN[0][1], n, split), "residual")
    write_text(table.with_suffix(".residual.csv"), probed.to_csv(index=False, float_format="%.6g"))
    config |= {"model": str(model), "selector": str(selector)}
    facts = environment(torch.device("cpu")) | {"questions": config, "command": command_line()}
    write_json(table.with_suffix(".provenance.json"), facts)
    return table
