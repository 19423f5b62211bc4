"""What schedules with a ranking of their own are compared with: nothing is removed or cached, only masked.

Each ranking is written down a second time here, row by row and from the attentions and hidden states that the
eager model reports.
"""

from functools import partial

import numpy as np
import torch

from tokensel.schedules import Clse, Feather, PriorTR, PyramidDrop, RandomCut, SparseVLM
from tokensel.utils.hashing import uniform
from tokensel.vlm import Vlm

STEPS = 16
STAGED = {
    "pyramiddrop": PyramidDrop(0.6, (1, 2, 3)),
    "feather": Feather(0.5, (1, 3)),
    "sparsevlm": SparseVLM(0.4, (1, 2, 3)),
    "sparsevlm-recycling": SparseVLM(0.8, (1, 2, 3), recycling=0.5),
    "priortr": PriorTR(2, 0.3),
    "priortr-forward": PriorTR(2, 0.3, prior="forward"),
    "priortr-question": PriorTR(1, 0.4, newline="row", queries="question"),
    "clse": Clse(0.5, (1, 2, 3)),
    "clse-lowest": Clse(0.3, (1, 2, 3), "drop", lowest=True),
    "random-cut": RandomCut(3, 0.4, seed=1),
}


class Row:
    """One row of a batch of prompts: what its columns hold, and what the eager model did with them."""

    def __init__(self, reduced, row: int, grids: list[tuple[int, int]] | None = None):
        real = reduced["attention_mask"][row].bool()
        self.columns = real.nonzero()[:, 0].tolist()
        self.visual = reduced.visual[row].tolist()
        self.newline = reduced.newlines[row].tolist()
        self.small = reduced.thumbnail[row].tolist()
        self.cells = [c for c in self.columns if self.visual[c] and not self.newline[c]]
        last_visual = max((c for c in self.columns if self.visual[c]), default=-1)
        self.question = [c for c in self.columns if c > last_visual]
        self.left = list(self.columns)
        self.grids = grids

    def maps(self) -> list[list[list[int]]]:
        """Grids of the images: a thumbnail is square, a map has the rows that newlines end.

        Without newlines the rows and columns of each grid are given, and their cells follow one another.
        """
        if self.grids is not None:
            cells = iter(self.cells)
            return [[[next(cells) for _ in range(wide)] for _ in range(high)] for high, wide in self.grids]
        small = [c for c in self.cells if self.small[c]]
        side = int(len(small) ** 0.5)
        grids = [[small[i * side : (i + 1) * side] for i in range(side)]] if small else []
        rows: list[list[int]] = [[]]
        for column in self.columns:
            if self.newline[column]:
                rows.append([])
            elif column in self.cells and not self.small[column]:
                rows[-1].append(column)
        rows = [row for row in rows if row]
        if rows and not small:  # an image of one tile
            side = int(len(rows[0]) ** 0.5)
            rows = [rows[0][i * side : (i + 1) * side] for i in range(side)]
        return [*grids, rows] if rows else grids


def detail(grid: np.ndarray, radius: float) -> np.ndarray:
    """The high-pass magnitude, frequency by frequency with NumPy's own numbering of them."""
    high, wide, _ = grid.shape
    v, u = np.fft.fftfreq(high)[:, None] * high, np.fft.fftfreq(wide)[None] * wide
    spread = radius * max(1, min(high // 2, wide // 2))
    damp = 1 - np.exp(-(v**2 + u**2) / (2 * spread**2))
    wave = np.fft.fft2(grid.astype(np.float64), axes=(0, 1)) * damp[:, :, None]
    return np.abs(np.fft.ifft2(wave, axes=(0, 1))).mean(-1)


def scores_by_hand(schedule, layer: int, row: Row, eager: dict) -> tuple[dict[int, float], int | None]:
    """Scores of a row's cells by column, and how many stay where the schedule counts by itself.

    Args:
        schedule: of the row.
        layer: at whose entrance cells are dropped.
        row: what is left of it.
        eager: of this row, ``attention`` [layers, heads, queries, keys] and without rotation ``plain``
            [heads, keys] of the last token in the layer before, and what enters each layer,
            ``hidden`` [length, width] by layer.
    """
    paid = eager["attention"][layer - 1].mean(0)
    last, cells = paid[-1], [c for c in row.left if c in row.cells]
    if isinstance(schedule, RandomCut):
        number = {c: row.cells.index(c) for c in cells}
        return {c: float(uniform(torch.tensor(schedule.seed), torch.tensor(number[c]))) for c in cells}, None
    if isinstance(schedule, Feather):
        grid = {c for g in row.maps() for line in g[:: schedule.stride] for c in line[:: schedule.stride]}
        first = layer == schedule.cuts[0]
        plain = eager["plain"].mean(0)
        return {c: float(plain[c]) + (first and c in grid) for c in cells}, None
    if isinstance(schedule, PriorTR):
        if schedule.prior == "forward":
            prior, after = ({c: float(source[c]) for c in cells} for source in (eager["blind"], last))
            q, p = ({c: paid[c] / sum(paid.values()) for c in cells} for paid in (prior, after))
            return {c: p[c] * np.log((p[c] + 1e-10) / (q[c] + 1e-10)) for c in cells}, None
        null, asked = row.question[0], row.question if schedule.queries == "question" else row.question[-1:]
        prior = {c: float(paid[null, c]) for c in cells}
        after = {c: float(np.mean([float(paid[t, c]) for t in asked])) for c in cells}
        q = {c: prior[c] / sum(prior.values()) for c in cells}
        p = {c: after[c] / sum(after.values()) for c in cells}
        return {c: p[c] * np.log((p[c] + 1e-10) / (q[c] + 1e-10)) for c in cells}, None
    if isinstance(schedule, Clse) and layer == schedule.cuts[0]:
        score = {}
        for grid in row.maps():
            index = np.array(grid)
            one, two = (
                detail(eager["hidden"][at].numpy()[index], schedule.radius) for at in (layer - 1, layer)
            )
            change = np.clip(np.abs(two - one) / (one + one.mean() + 1e-6), 0, 1) * (-1) ** schedule.lowest
            z = (change - change.mean()) / (change.std() + 1e-6)
            for c, gate in zip(index.flatten(), (1 / (1 + np.exp(-z / schedule.tau))).flatten()):
                score[int(c)] = float(gate * last[c])
        return score, None
    if isinstance(schedule, SparseVLM):
        embedded = eager["hidden"][0].double()
        words = row.question
        fit = np.mean([(embedded[words] @ embedded[c]).softmax(0).numpy() for c in row.cells], 0)
        chosen = [word for word, value in zip(words, fit) if value >= fit.mean()]
        rated = np.stack([[float(paid[r, c]) for c in cells] for r in chosen])
        rank = np.linalg.matrix_rank(rated.astype(np.float32))
        count = max(1, len(cells) - int(schedule.scale * (len(cells) - rank)))
        return dict(zip(cells, rated.mean(0))), count
    return {c: float(last[c]) for c in cells}, None


@torch.no_grad()
def unrotated(lm, layer: int, hidden: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Attention of each row's last token in ``layer`` as if all positions were 0, ``[rows, heads, keys]``."""
    attention = lm.layers[layer].self_attn
    states = lm.layers[layer].input_layernorm(hidden)
    heads = (*states.shape[:2], -1, attention.head_dim)
    query, keys = attention.q_proj(states).view(heads), attention.k_proj(states).view(heads)
    if hasattr(attention, "q_norm"):
        query, keys = attention.q_norm(query), attention.k_norm(keys)
    query = query[:, -1]  # [rows, heads, width]
    keys = keys.repeat_interleave(attention.num_key_value_groups, 2)
    logits = torch.einsum("rhw,rkhw->rhk", query, keys) * attention.head_dim**-0.5
    return logits.masked_fill(~allowed[:, -1, None], -1e30).softmax(-1)


@torch.no_grad()
def staged_reference(
    vlm: Vlm,
    reduced,
    schedule,
    steps: int = STEPS,
    grids: list[list[tuple[int, int]]] | None = None,
    written: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding where dropped columns are hidden from the later layers; tokens and logits.

    The prompt is read once more for every cut. Where a schedule evicts, the tokens of the answer do not see
    what was dropped in any layer. ``grids`` are rows and columns of each row's tiles, for a model without
    newlines. With ``written`` [rows, steps] these tokens are read instead of the likeliest ones.
    """
    lm = vlm.model.get_decoder()
    more = reduced.for_decoder  # embeddings, and with Qwen3-VL what it adds after its first layers
    embeds, mask, logits, tokens = more.pop("inputs_embeds"), reduced["attention_mask"], [], []
    batch, prompt = mask.shape
    rows = [Row(reduced, row, None if grids is None else grids[row]) for row in range(batch)]
    positions = reduced.get("position_ids", (mask.cumsum(1) - 1).clamp(min=0))  # [(axes,) rows, length]
    gone_from = torch.full((batch, prompt), len(lm.layers))  # the first layer that does not see a column
    unread = torch.zeros(batch, prompt, dtype=torch.bool)  # in a pass without the question

    def allowed(index: int) -> torch.Tensor:
        length = mask.shape[1]
        hidden = torch.zeros(batch, length, length, dtype=torch.bool)
        hidden[:, :, :prompt] = (gone_from <= index)[:, None] | unread[:, None]
        if getattr(schedule, "evicts", False):
            hidden[:, prompt:, :prompt] = (gone_from < len(lm.layers))[:, None]
        seen = mask.bool()[:, None] & ~hidden & torch.ones(length, length, dtype=torch.bool).tril()
        return seen | torch.eye(length, dtype=torch.bool)

    recycled: dict[int, list[tuple[int, int, torch.Tensor]]] = {}  # by layer: row, column and what it becomes

    entered: dict[int, torch.Tensor] = {}  # hidden states at the entrance of each layer, in the last run

    def hide(index, _layer, args, kwargs):
        hidden = args[0].clone()
        for row, column, state in recycled.get(index, []):
            hidden[row, column] = state
        entered[index] = hidden
        added = torch.zeros(batch, mask.shape[1], mask.shape[1]).masked_fill_(~allowed(index), -1e30)
        return (hidden, *args[1:]), kwargs | {"attention_mask": added[:, None]}

    def run(**options):
        return lm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            **more,
            **options,
        )

    attn = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    hooks = [
        layer.register_forward_pre_hook(partial(hide, i), with_kwargs=True)
        for i, layer in enumerate(lm.layers)
    ]
    for layer in schedule.layers():
        out = run(output_attentions=True)
        states = dict(entered)
        if getattr(schedule, "prior", "token") == "forward":
            for number, row in enumerate(rows):
                unread[number, [c for c in row.columns[1:-1] if not row.visual[c]]] = True
            blind = run(output_attentions=True).attentions[layer - 1].mean(1)[:, -1]
            unread.zero_()
        else:
            blind = torch.zeros(batch, prompt)
        plain = unrotated(lm, layer - 1, states[layer - 1], allowed(layer - 1))
        for number, row in enumerate(rows):
            eager = {
                "attention": [attention[number] for attention in out.attentions],
                "hidden": {index: at[number] for index, at in states.items()},
                "plain": plain[number],
                "blind": blind[number],
            }
            if row.cells:
                back = drop(schedule, layer, row, eager)
                recycled.setdefault(layer, []).extend((number, column, state) for column, state in back)
            gone = [c for c in row.columns if c not in row.left]
            gone_from[number, gone] = gone_from[number, gone].clamp(max=layer)
    for step in range(steps):
        logits.append(vlm.model.lm_head(run().last_hidden_state[:, -1]))
        tokens.append(logits[-1].argmax(-1) if written is None else written[:, step])
        embeds = torch.cat([embeds, lm.embed_tokens(tokens[-1])[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        if "visual_pos_masks" in more:
            marks = more["visual_pos_masks"]
            more["visual_pos_masks"] = torch.cat([marks, marks.new_zeros(batch, 1)], 1)
    for hook in hooks:
        hook.remove()
    vlm.model.set_attn_implementation(attn)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def drop(schedule, layer: int, row: Row, eager: dict) -> list[tuple[int, torch.Tensor]]:
    """Remove from ``row.left`` what goes at the entrance of ``layer``; returns what comes back, as what."""
    scores, count = scores_by_hand(schedule, layer, row, eager)
    if count is None:
        count = max(1, round(schedule.entering(layer) * len(row.cells)))
    last = row.columns[-1]
    best = set(sorted(scores, key=lambda c: (c != last, -scores[c], c))[:count])
    kept_rows, line, dropping = set(), [], count < len(row.cells)
    for column in row.columns:  # a newline ends the row of the map before it
        if row.newline[column]:
            if any(c in best for c in line):
                kept_rows.add(column)
            line = []
        elif column in row.cells and not row.small[column]:
            line.append(column)
    stays = {
        "keep": lambda c: True,
        "drop": lambda c: not dropping,
        "row": lambda c: not dropping or c in kept_rows,
    }[schedule.newline]
    before, row.left = (
        row.left,
        [
            c
            for c in row.left
            if not row.visual[c] or c == last or (stays(c) if row.newline[c] else c in best)
        ],
    )
    share = getattr(schedule, "recycling", 0.0)
    gone = [c for c in before if c in scores and c not in row.left]
    back = recycle_by_hand(gone, scores, eager["hidden"][layer].double().numpy(), share) if share else []
    row.left = sorted([*row.left, *(column for column, _ in back)])
    return back


def recycle_by_hand(
    gone: list[int], scores: dict[int, float], hidden: np.ndarray, share: float
) -> list[tuple[int, torch.Tensor]]:
    """Density peaks among the best of the dropped cells, one cell after the other."""
    best = sorted(sorted(gone, key=lambda c: (-scores[c], c))[: int(share * len(gone))])
    if not best:
        return []
    apart = {
        a: {b: np.linalg.norm(hidden[a] - hidden[b]) / hidden.shape[1] ** 0.5 for b in best} for a in best
    }
    density = {a: np.exp(-np.mean([x**2 for x in sorted(apart[a].values())[1:6]] or [0.0])) for a in best}
    largest = max(max(row.values()) for row in apart.values())
    worth = {}
    for a in best:
        denser = [apart[a][b] for b in best if (density[b], -b) > (density[a], -a)]
        worth[a] = density[a] * (min(denser) if denser else largest)
    centres = sorted(best, key=lambda c: (-worth[c], c))[: len(best) // 10 + 1]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for cell in best:
        members[cell if cell in members else min(centres, key=lambda c, cell=cell: apart[cell][c])].append(
            cell
        )
    return [(c, torch.tensor(hidden[cells].mean(0), dtype=torch.float32)) for c, cells in members.items()]
