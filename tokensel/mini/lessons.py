"""The two losses of the small model's training: what the tower sees, and what the language model answers.

Every batch is a function of (seed, step, worker), so a killed run resumes to the same weights.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tokensel.mini.batches import Packed, drills, layout, pack, patch_pixels, tiles
from tokensel.mini.canvas import GROWTH, ILLEGIBLE, OBJECTS, PAPERS
from tokensel.mini.reading import print_page
from tokensel.mini.recipe import Recipe, Stage
from tokensel.mini.words import COLORS, SHAPES
from tokensel.mini.world import SIZES, draw

LABELS = {
    "letters": ILLEGIBLE,
    "shapes": len(SHAPES),
    "colors": len(COLORS),
    "objects": len(OBJECTS),
    "sizes": len(GROWTH) + 1,
    "papers": len(PAPERS),
}
RARE = ("letters", "objects", "sizes", "papers")  # labels of few patches: there, "nothing" weighs less


class Heads(nn.Module):
    """Throw-away heads that read the tower while it learns."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(width, count + 1) for name, count in LABELS.items()})
        self.pixels = nn.Linear(width, 48)
        self.holds = nn.Linear(width, sum(LABELS.values()))


class Lessons:
    """Losses of one worker's share of each batch."""

    def __init__(self, model, heads: Heads, recipe: Recipe, bf16: bool, worker: int = 0, workers: int = 1):
        self.model, self.core, self.heads, self.recipe, self.bf16 = model, model.model, heads, recipe, bf16
        self.worker, self.workers = worker, workers

    def _pages(self, phase: int, step: int, count: int, size=None, oftener: dict | None = None) -> tuple[list[str], list]:
        """This worker's share of the ``count`` pages of ``step`` and the tasks they are of."""
        rng = np.random.default_rng([self.recipe.seed, phase, step])
        weights = np.array([weight * (oftener or {}).get(task, 1.0) for task, weight in self.recipe.weights.items()])
        names = rng.choice(list(self.recipe.weights), count, p=weights / weights.sum())
        mine = range(self.worker, count, self.workers)
        first = step * 1000 + 10**9 * phase  # no page comes twice
        return [str(names[place]) for place in mine], [draw(str(names[place]), "train", first + place, size) for place in mine]

    def _rng(self, phase: int, step: int) -> np.random.Generator:
        return np.random.default_rng([self.recipe.seed, phase, step, self.worker])

    def look(self, step: int):
        """Loss of the tower on the labels of a batch of tiles, and how well it reads."""
        _, pages = self._pages(0, step, self.recipe.tower_pages)
        rng = self._rng(1, step)
        pages = [
            print_page(rng, SIZES[int(rng.integers(len(SIZES)))]) if rng.random() < self.recipe.print_share else page
            for page in pages
        ]
        pixels = torch.cat([tiles(page) for page in pages])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            seen = self.core.vision_tower(pixels, output_hidden_states=True)
            return self._labels(pages, pixels, seen)

    def _labels(self, pages: list, pixels, seen):
        """How far the tower's features are from the labels of the pages' patches and tiles."""
        labels = {
            name: torch.from_numpy(np.concatenate([getattr(page, name) for page in pages])).flatten(1) for name in LABELS
        }
        patches = seen.hidden_states[-2][:, 1:]  # the layer that the language model is given
        said = {name: head(patches).float() for name, head in self.heads.patch.items()}
        present = [functional.one_hot(labels[name], count + 1).amax(1)[:, 1:] for name, count in LABELS.items()]
        holds = self.heads.holds(seen.pooler_output).float()
        loss = functional.binary_cross_entropy_with_logits(holds, torch.cat(present, 1).float())
        loss = loss + 0.3 * functional.mse_loss(self.heads.pixels(patches).float(), patch_pixels(pixels))
        for name, count in LABELS.items():
            weight = torch.ones(count + 1)
            weight[0] = 0.3 if name in RARE else 1.0
            loss = loss + functional.cross_entropy(said[name].flatten(0, 1), labels[name].flatten(), weight)
        legible = (labels["letters"] > 0) & (labels["letters"] < ILLEGIBLE)
        facts = {}
        for name, where in (("letters", legible), ("objects", labels["objects"] > 0)):
            right = (said[name].argmax(-1) == labels[name])[where]
            facts[name] = round(right.float().mean().item(), 4)
        return loss, facts

    def answer(self, step: int):
        """Loss of the language model on the answers of a batch of pages, and how many of each task it gets right.

        Every question weighs the same, however long its answer.
        """
        stage = self.recipe.stage(step)
        sizes = np.random.default_rng([self.recipe.seed, 2, step])
        size = stage.sizes[int(sizes.integers(len(stage.sizes)))]
        names, pages = self._pages(3, step, stage.pages(size), size, stage.oftener)
        rng = self._rng(4, step)
        hidden, packed, (looking, facts) = self.forward(pages, size, stage, rng)
        loss, hit, row = self._spoken(hidden, packed)
        tasks: dict[str, list[int]] = {}
        for name in set(names):
            mine = hit[torch.tensor([names[r] == name for r in row.tolist()])]
            tasks[name] = [int(mine.sum()), mine.numel()]
        if stage.drills:
            drilled, hits, _ = self._spoken(*self.drill(rng, max(1, stage.drills // self.workers)))
            loss, tasks["drill"] = loss + drilled, [int(hits.sum()), hits.numel()]
        return loss + looking, {"right": round(hit.float().mean().item(), 4), **facts, "tasks": tasks}

    def _spoken(self, hidden, packed: Packed):
        """Mean loss over the questions, which tokens of their answers are right, and the row of each."""
        spoken = packed.labels >= 0
        logits = self.model.lm_head(hidden[spoken]).float()
        target, worth = packed.labels[spoken], packed.weights[spoken]
        losses = functional.cross_entropy(logits, target, reduction="none")
        return (losses * worth).sum() / worth.sum(), logits.argmax(-1) == target, spoken.nonzero()[:, 0]

    def forward(self, pages, size, stage: Stage, rng):
        """Hidden states ``[pages, text, width]`` over the packed questions, their packing, the tower's loss and facts."""
        core, recipe = self.core, self.recipe
        index = layout(core, size)
        packed = pack([page.questions for page in pages], len(index), stage.questions, rng, recipe.free, recipe.drill)
        cut = [tiles(page) for page in pages]
        printed = [print_page(rng, (128, 128)) for _ in range(recipe.print_pages // self.workers if stage.tower else 0)]
        pixels = torch.cat(cut + [tiles(page) for page in printed])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.set_grad_enabled(stage.tower and torch.is_grad_enabled()):
                seen = core.vision_tower(pixels, output_hidden_states=True)
            looking = self._labels(pages + printed, pixels, seen) if stage.tower else (0.0, {})
            cells = seen.hidden_states[-2][: sum(map(len, cut)), 1:]
            cells = cells.reshape(len(pages), -1, core.config.vision_config.hidden_size)
            projected = core.multi_modal_projector(cells[:, index.clamp(min=0)]).float()
            visual = torch.where((index < 0)[:, None], core.image_newline, projected)
            return self._read(visual, packed), packed, looking

    def drill(self, rng, rows: int):
        """Hidden states ``[rows, text, width]`` over questions without a picture, and their packing."""
        packed = drills(rng, rows, 8)
        nothing = torch.zeros(rows, 0, self.core.config.text_config.hidden_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self._read(nothing, packed), packed

    def _read(self, visual, packed: Packed):
        """Run the language model over <s> USER: | visual | text; its states over the text."""
        model = self.core.language_model
        start = model.embed_tokens(torch.tensor([[1, 5]])).expand(len(visual), -1, -1)
        states = model(
            inputs_embeds=torch.cat([start, visual, model.embed_tokens(packed.ids)], 1),
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state
        return states[:, -packed.ids.shape[1] :]
