"""Selection together with OneVision's interpolation: ways to spend one budget of visual tokens.

Interpolation makes the joined map of an image coarser, so that a token shows more of the page. Selection
drops tokens. Here the map is made coarser and then some of its cells are kept, all ways with as many visual
tokens. As with ``thumbnail="last"``, the map comes before the thumbnail, for which these budgets leave
nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate
from tqdm.auto import tqdm

from tokensel.benchmarks.metrics import METRICS
from tokensel.benchmarks.statistics import bootstrap
from tokensel.benchmarks.table import Benchmark, load_suite
from tokensel.budget import fraction_count
from tokensel.data.features import Features
from tokensel.scorers import Scorer, make_scorer
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import command_line, environment
from tokensel.vlm import Choices, Vlm, load_vlm, reduce
from tokensel.vlm.choose import choose_cells
from tokensel.vlm.encode import Encoded, encode
from tokensel.vlm.layout import plain_layout
from tokensel.vlm.reduce import Reduced, assemble

__all__ = ["WAYS", "Way", "interpolated", "record_interpolation", "way_scores"]

SUITE = "tokensel.book.mini.suite"


@dataclass(frozen=True)
class Way:
    """One way to spend the budget.

    Attributes:
        first: the coarser map's cells as a power of the budget: 0 leaves the map as it is, 1 spends the whole
            budget on interpolation, 0.5 keeps as large a fraction in either step.
        rank: how a coarser cell is ranked: by what the scorer says of the coarser map ("after"), or by its
            scores of the full map, the best or the mean of those that the cell covers.
        weighted: whether what a coarser cell covers counts by how likely the scorer would keep it.
    """

    first: float
    rank: Literal["after", "best", "mean"] = "best"
    weighted: bool = False


WAYS: dict[str, Way] = {
    "selection alone": Way(0.0),
    "interpolation alone": Way(1.0),
    "interpolation, weighted by scores": Way(1.0, weighted=True),
    "interpolated, then scored": Way(0.5, "after"),
    "scored before, best of a cell": Way(0.5, "best"),
    "scored before, mean of a cell": Way(0.5, "mean"),
    "best of a cell, weighted by scores": Way(0.5, "best", weighted=True),
}


@torch.no_grad()
def interpolated(encoded: Encoded, scorer: Scorer, keep: float, way: Way, neighbours: int = 0) -> Reduced:
    """Shorten the prompts by interpolation and selection together.

    Args:
        encoded: a batch of a LLaVA-OneVision, whose own interpolation is off.
        scorer: ranks the tokens of a tile; for "after" one that reads grids of any shape, as the selector.
        keep: fraction of an image's visual tokens that is left, about; newlines are not counted.
        way: how.
        neighbours: see :class:`~tokensel.vlm.choose.Choices`.
    """
    if way.first == 0:
        return reduce(encoded, scorer, keep, thumbnail="last", neighbours=neighbours)
    layout, core = encoded.layout, encoded.core
    scores, projected = encoded.score(scorer), encoded.projected().flatten(0, 1)
    tokens = encoded.features.tokens.flatten(0, 1)
    stands, kept, cells = (torch.zeros_like(layout.cell) for _ in range(3))
    visual = []
    for image in range(len(layout.tiles)):
        own = layout.image == image
        on_map = own & layout.cell & ~layout.thumbnail
        high = int((own & ~layout.cell).sum())  # every row of the map ends with a newline
        if layout.tiles[image] == 1:  # one tile is its own map, with a single newline behind it
            high = int(on_map.sum() ** 0.5)
        wide = int(on_map.sum()) // high
        total = int((own & layout.cell).sum())
        left = int(fraction_count(torch.tensor([total]), keep))
        rows, columns = _shape(high, wide, max(left, round(total * keep**way.first)))
        source = layout.source[on_map]

        def as_map(values: Float[Tensor, "cells channels"], shape: tuple[int, int] = (high, wide)) -> Tensor:
            return values.float().T.unflatten(1, shape)[None]  # [1, channels, rows, columns]

        score = as_map(scores[on_map][:, None])
        # scores are on the host, where cells are chosen; tokens where the model is
        weight = (score.sigmoid() if way.weighted else torch.ones_like(score)).to(projected.device)
        coarse = _coarser(as_map(projected[source]), weight, rows, columns)
        if way.rank == "after":
            read = _coarser(as_map(tokens[source]), weight, rows, columns)
            ranks = scorer(Features(read[None], grid=torch.tensor([[rows, columns]])))[0].float().cpu()
        else:
            pool = adaptive_max_pool2d if way.rank == "best" else adaptive_avg_pool2d
            ranks = pool(score, (rows, columns)).flatten()
        one = plain_layout(torch.tensor([[rows, columns]]), [1])
        share = min(1.0, left / (rows * columns))
        chosen = choose_cells(one, ranks, share, Choices(neighbours=neighbours)).view(rows, columns)

        # newlines behind every row, or behind the only tile
        newline = core.image_newline.to(coarse)
        ended = torch.cat([coarse.view(rows, columns, -1), newline.expand(rows, 1, -1)], 1)
        stays = torch.cat([chosen, torch.ones(rows, 1, dtype=torch.bool)], 1)
        is_cell = torch.ones_like(stays)
        is_cell[:, -1] = False
        if layout.tiles[image] == 1:
            stays[:-1, -1] = False
        # the coarser map fills its image's placeholders from the front; what is dropped of it leaves a gap
        real = (is_cell | stays).flatten()
        place = own.nonzero()[: int(real.sum()), 0]
        stands[place] = True
        kept[place], cells[place] = stays.flatten()[real], is_cell.flatten()[real]
        visual.append(ended.flatten(0, 1)[real][stays.flatten()[real]])
    # to the prompt the coarser map is all there ever was: positions count its tokens alone
    mask = encoded.attention_mask.clone()
    mask[encoded.places[:, 0], encoded.places[:, 1]] = stands.to(mask)
    shorter = replace(encoded, attention_mask=mask)
    embeds = torch.cat(visual).to(projected) if visual else projected[:0]
    return Reduced(
        *assemble(shorter, kept, embeds, "original", cells),
        n_visual=encoded.per_row(kept & cells),
        n_visual_full=encoded.n_visual,
        n_newline=encoded.per_row(kept & ~cells),
        n_tiles=encoded.n_tiles,
        cells=layout.tokens,
    )


def _shape(high: int, wide: int, cells: int) -> tuple[int, int]:
    """Rows and columns of a map of the same proportions with at most so many cells, or of the map itself."""
    if cells >= high * wide:
        return high, wide
    rows = min(max(1, round(high * sqrt(cells / (high * wide)))), cells)
    return rows, min(wide, max(1, cells // rows))


def _coarser(
    values: Float[Tensor, "1 channels high wide"],
    weight: Float[Tensor, "1 1 high wide"],
    rows: int,
    columns: int,
) -> Float[Tensor, "cells channels"]:
    """The map as the model interpolates it; with weights, each cell is a weighted mean of what it reads."""
    size = (rows, columns)
    sums = interpolate(values * weight, size, mode="bilinear")
    total = interpolate(weight, size, mode="bilinear")
    return (sums / total.clamp(min=1e-6))[0].flatten(1).T


def way_scores(
    vlm: Vlm,
    scorer: Scorer,
    ways: Mapping[str, Way],
    benchmarks: Mapping[str, Benchmark],
    keep: float,
    n: int,
    split: str = "test",
    neighbours: int = 0,
    batch_size: int = 20,
    progress: bool = False,
) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """Ask the first ``n`` questions of each benchmark under each way.

    Args:
        vlm: a LLaVA-OneVision.
        scorer: ranks the tokens.
        ways: by their names.
        benchmarks: whose questions have one image each.
        keep: fraction of an image's visual tokens that is left.
        n: questions a benchmark.
        split: of the benchmarks.
        neighbours: see :class:`~tokensel.vlm.choose.Choices`.
        batch_size: questions at a time; changes the speed, not the answers.
        progress: whether to show a bar.

    Returns:
        For each benchmark a row a question and a column a way, scores 0 to 1; and each way's mean fraction of
        the visual tokens.
    """
    scores: dict[str, pd.DataFrame] = {}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for bench in tqdm(benchmarks.values(), desc="interpolation", disable=not progress):
        asked, columns = list(bench.load(split, n)), {name: [] for name in ways}
        for start in range(0, len(asked), batch_size):
            rows = asked[start : start + batch_size]
            prompts = [vlm.prompt(bench.prompt(row)) for row in rows]
            encoded = encode(vlm.model, vlm.inputs([row["image"] for row in rows], prompts))
            for name, way in ways.items():
                reduced = interpolated(encoded, scorer, keep, way, neighbours)
                spent[name] += (reduced.n_visual / reduced.n_visual_full).tolist()
                answers = vlm.generate(reduced, max_new_tokens=bench.max_new_tokens)
                columns[name] += [
                    METRICS[bench.metric](answer, row["answers"], row.get("options") or [])
                    for answer, row in zip(answers, rows)
                ]
        scores[bench.name] = pd.DataFrame(columns)
    return scores, {name: float(np.mean(shares)) for name, shares in spent.items()}


def summary(
    scores: Mapping[str, pd.DataFrame],
    spent: Mapping[str, float],
    groups: Mapping[str, str],
    against: str,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for each benchmark and way: mean score and paired difference from a way, with 95 % intervals.

    Args:
        scores: of :func:`way_scores`.
        spent: of the same.
        groups: the group of each benchmark.
        against: the way that the others are compared with.
        seed: of the bootstrap.
    """
    rows: list[dict[str, Any]] = []
    for benchmark, table in scores.items():
        for name in table:
            values = np.stack([table[name], table[name] - table[against]], 1)
            (score, gap), low, high = bootstrap(values, seed=seed)
            rows.append(
                {"benchmark": benchmark, "group": groups[benchmark], "way": name, "spent": spent[name]}
                | {"score": score, "ci_low": low[0], "ci_high": high[0]}
                | {"difference": gap, "difference_low": low[1], "difference_high": high[1], "n": len(table)}
            )
    return pd.DataFrame(rows)


def record_interpolation(
    model: Path, selector: Path, table: Path, keep: float, n: int, split: str, neighbours: int
) -> Path:
    """Record :func:`summary` of all :data:`WAYS`, with its provenance as JSON beside it."""
    vlm = load_vlm(model, device="cpu")
    scorer = make_scorer("selector", selector=str(selector))
    tasks = {name: row for name, row in load_suite(SUITE).items() if row.group in ("reading", "general")}
    scores, spent = way_scores(vlm, scorer, WAYS, tasks, keep, n, split, neighbours, progress=True)
    groups = {name: row.group for name, row in tasks.items()}
    rows = summary(scores, spent, groups, next(iter(WAYS))).assign(keep=keep)
    write_text(table, rows.to_csv(index=False, float_format="%.6g"))
    asked = {"n": n, "split": split, "model": str(model), "selector": str(selector), "neighbours": neighbours}
    write_json(
        table.with_suffix(".provenance.json"),
        environment(torch.device("cpu")) | {"questions": asked, "command": command_line()},
    )
    return table
