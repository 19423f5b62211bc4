"""How the small LLaVA-NeXT is trained: first its eyes, then its tongue, on ever larger pages.

1. The vision tower alone learns from dense labels what each patch shows, and its CLS token what the tile holds.
2. The same on pages full of random print, from which letters are learnt ten times as fast as from the world's pages.
3. Projector and language model join it and learn to answer, from single tiles to full pages; the tower goes on
   with its labels, on the same pages and a few of print. A model that starts on full pages learns nothing for a long time: finding and copying first
   appear in short contexts.

No visual token is ever dropped here: the paper's claim is about models that have never seen a reduced image.
Every step's batch is a function of (seed, step), so a killed run resumes to the same weights.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from tokensel import io
from tokensel.mini.batches import layout, pack, patch_pixels, tiles
from tokensel.mini.canvas import ILLEGIBLE
from tokensel.mini.model import build_model, build_processor
from tokensel.mini.reading import print_page
from tokensel.mini.words import COLORS, SHAPES
from tokensel.mini.world import DRAW, SIZES, draw


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: ``steps`` batches of ``pages`` pages of one of ``sizes`` each.

    In ``balanced`` stages every question weighs the same in the loss, however long its answer, general tasks and
    charts are drawn twice as often, and two in five multiple-choice questions are put without their options. Before,
    every token of an answer weighs the same, which favours reading: it is what can be learnt first.
    """

    name: str
    steps: int
    pages: int
    sizes: tuple[tuple[int, int], ...]
    questions: int = 6  # at most, a page
    balanced: bool = False
    tower: bool = True  # whether the vision tower learns too


@dataclass(frozen=True)
class Recipe:
    """All that decides the shipped weights."""

    seed: int = 0
    encoder_steps: int = 1600
    encoder_pages: int = 24
    encoder_rate: float = 1.5e-3
    print_steps: int = 800
    print_rate: float = 3e-3  # of Muon, in the second phase
    print_share: float = 0.75  # of the pages in the second phase that are full of random print
    stages: tuple[Stage, ...] = (
        Stage("tile", 350, 32, ((64, 64),), 4),
        Stage("strip", 350, 20, ((64, 128), (128, 64))),
        Stage("page", 100, 16, SIZES, balanced=True),
        Stage("tile again", 500, 48, ((64, 64),), 4, balanced=True, tower=False),
        Stage("page again", 350, 16, SIZES, balanced=True),
    )
    rate: float = 3e-3  # of Muon, in the language model; half of it for AdamW beside it
    tower_rate: float = 5e-4  # of the tower, once the language model has joined it
    warmup: int = 60
    print_pages: int = 4  # of print beside the pages of each language step
    cooldown: int = 300  # the last steps, over which the rate falls to zero
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DRAW, 1.0) | {"transcribe": 1.5})
    balanced: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(DRAW, 2.0)
        | dict.fromkeys(("forms", "posters", "scene_text", "transcribe", "describe"), 1.0)
    )

    @property
    def steps(self) -> int:
        """Language steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that ``step`` belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def scale(self, step: int, total: int, cooldown: int) -> float:
        """The learning rate's factor: up, flat, then down to zero."""
        return min(1.0, (step + 1) / self.warmup, (total - step) / max(1, cooldown))


class Heads(nn.Module):
    """Throw-away heads that read the tower while it learns."""

    def __init__(self, width: int):
        super().__init__()
        self.letters, self.shapes = nn.Linear(width, ILLEGIBLE + 1), nn.Linear(width, len(SHAPES) + 1)
        self.colors, self.pixels = nn.Linear(width, len(COLORS) + 1), nn.Linear(width, 48)
        self.holds = nn.Linear(width, ILLEGIBLE + len(SHAPES) + len(COLORS))


def train(out: Path, recipe: Recipe = Recipe(), save_every: int = 100, bf16: bool | None = None) -> Path:
    """Train the small model from nothing; resumes from ``out/checkpoint`` if it is there.

    Args:
        out: folder for the checkpoint, ``history.jsonl`` and, at the end, ``model/``: a LLaVA-NeXT checkpoint
            with its processor.
        recipe: steps, sizes and rates.
        save_every: steps between checkpoints.
        bf16: compute in bfloat16; by default where the processor has the instructions for it.

    Returns:
        The folder of the finished model.
    """
    out = Path(out)
    bf16 = torch.cpu._is_avx512_bf16_supported() if bf16 is None else bf16
    torch.manual_seed(recipe.seed)
    model, heads = build_model(), Heads(128)
    run = _Run(out, recipe, model, heads, save_every, bf16)
    run.load()
    run.encoder()
    run.language()
    folder = out / "model"
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    io.write_json(folder / "recipe.json", asdict(recipe) | {"bf16": bf16})
    return folder


class _Run:
    """The state of one training run, saved and found again."""

    def __init__(self, out: Path, recipe: Recipe, model, heads: Heads, save_every: int, bf16: bool):
        self.out, self.recipe, self.model, self.heads = out, recipe, model, heads
        self.save_every, self.bf16 = save_every, bf16
        self.core, self.done, self.phase = model.model, 0, "encoder"
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for the first look; from then on Muon for the matrices inside the layers: fewer steps to the same loss."""
        recipe, tower = self.recipe, self.core.vision_tower
        if self.phase == "encoder":
            parameters = [*tower.parameters(), *self.heads.parameters()]
            return [torch.optim.AdamW(parameters, recipe.encoder_rate, weight_decay=0.05)]
        if self.phase == "print":
            return _muon([tower, self.heads], recipe.print_rate, recipe.encoder_rate, 0.05)
        rest = [self.core.multi_modal_projector, self.model.lm_head, self.core.language_model]
        optimizers = _muon(rest, recipe.rate, recipe.rate / 2, 0.0, extra=[self.core.image_newline])
        return optimizers + _muon([tower, self.heads], recipe.tower_rate, recipe.tower_rate, 0.05)

    # --- what a killed run leaves behind -------------------------------------------------------------------

    def save(self, step: int) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{place}.{name}": value for name, value in state.items()}
        io.save_tensors(self.out / "checkpoint.safetensors", tensors, {"phase": self.phase, "step": str(step)})

    def load(self) -> None:
        if not (self.out / "checkpoint.safetensors").exists():
            return
        tensors, meta = io.load_tensors(self.out / "checkpoint.safetensors")
        self.phase, self.done = meta["phase"], int(meta["step"])
        parts: dict[str, dict] = {"model": {}, "heads": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            parts[kind][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.heads.load_state_dict(parts["heads"])
        self.optimizers = self._optimizers()
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict] = {}
            for name, tensor in parts["optimizer"].items():
                owner, place, entry = name.split(".")
                if int(owner) == number:
                    state.setdefault(int(place), {})[entry] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    # --- the two phases ------------------------------------------------------------------------------------

    def encoder(self) -> None:
        """Phases one and two: the vision tower, alone."""
        for phase, steps, following in (
            ("encoder", self.recipe.encoder_steps, "print"),
            ("print", self.recipe.print_steps, "language"),
        ):
            if self.phase == phase:
                self._loop(steps, steps // (3 if phase == "encoder" else 2), self._look)
                self.phase, self.done = following, 0
                self.optimizers = self._optimizers()
                self.save(0)

    def language(self) -> None:
        """Phase three: all parts together."""
        self._loop(self.recipe.steps, self.recipe.cooldown, self._answer)

    def _loop(self, total: int, cooldown: int, step_of) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / f"history.{self.phase}.jsonl").open("a", buffering=1) as log:
            bar = tqdm(range(self.done, total), initial=self.done, total=total, desc=self.phase, mininterval=10)
            for step in bar:
                began = time.perf_counter()
                factor = self.recipe.scale(step, total, cooldown)
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = factor * optimizer.defaults["lr"]
                loss, facts = step_of(step)
                loss.backward()
                nn.utils.clip_grad_norm_([p for o in self.optimizers for g in o.param_groups for p in g["params"]], 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                facts |= {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - began, 3)}
                log.write(json.dumps(facts) + "\n")
                bar.set_postfix({k: v for k, v in facts.items() if k not in ("step", "seconds", "tasks")}, refresh=False)
                if (step + 1) % self.save_every == 0 and step + 1 < total:
                    self.save(step + 1)

    def _pages(self, step: int, phase: int, count: int, size=None, balanced: bool = False) -> tuple[list[str], list]:
        rng = np.random.default_rng([self.recipe.seed, phase, step])
        tasks = self.recipe.balanced if balanced else self.recipe.weights
        weights = np.array(list(tasks.values()))
        names = rng.choice(list(tasks), count, p=weights / weights.sum())
        first = step * count + 10**9 * phase  # the phases see different pages
        return list(names), [draw(str(task), "train", first + place, size) for place, task in enumerate(names)]

    def _look(self, step: int):
        """Loss of the tower on the labels of a batch of tiles, and how well it reads."""
        _, pages = self._pages(step, 0 if self.phase == "encoder" else 2, self.recipe.encoder_pages)
        if self.phase == "print":
            rng = np.random.default_rng([self.recipe.seed, 3, step])
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
        letters, shapes, colors = (
            torch.from_numpy(np.concatenate([getattr(page, name) for page in pages])).flatten(1)
            for name in ("letters", "shapes", "colors")
        )
        patches = seen.hidden_states[-2][:, 1:]  # the layer that the language model is given
        said = {name: head(patches).float() for name, head in self.heads.named_children() if name != "holds"}
        holds = self.heads.holds(seen.pooler_output).float()
        weight = torch.ones(ILLEGIBLE + 1)
        weight[0] = 0.3  # most patches hold no letter
        present = torch.cat(
            [
                functional.one_hot(labels, count + 1).amax(1)[:, 1:]
                for labels, count in ((letters, ILLEGIBLE), (shapes, len(SHAPES)), (colors, len(COLORS)))
            ],
            1,
        ).float()
        loss = (
            functional.cross_entropy(said["letters"].flatten(0, 1), letters.flatten(), weight)
            + functional.cross_entropy(said["shapes"].flatten(0, 1), shapes.flatten())
            + functional.cross_entropy(said["colors"].flatten(0, 1), colors.flatten())
            + 0.3 * functional.mse_loss(said["pixels"], patch_pixels(pixels))
            + functional.binary_cross_entropy_with_logits(holds, present)
        )
        legible = (letters > 0) & (letters < ILLEGIBLE)
        read = (said["letters"].argmax(-1) == letters)[legible].float().mean().item()
        shaped = (said["shapes"].argmax(-1) == shapes)[shapes > 0].float().mean().item()
        return loss, {"letters": round(read, 4), "shapes": round(shaped, 4)}

    def _answer(self, step: int):
        """Loss of the language model on the answers of a batch of pages, and how many it gets right."""
        stage = self.recipe.stage(step)
        rng = np.random.default_rng([self.recipe.seed, 2, step])
        size = stage.sizes[int(rng.integers(len(stage.sizes)))]
        names, pages = self._pages(step, 1, stage.pages, size, stage.balanced)
        hidden, packed, (looking, facts) = self.forward(pages, size, stage, rng)
        spoken = packed.labels >= 0
        logits = self.model.lm_head(hidden[spoken]).float()
        target = packed.labels[spoken]
        worth = packed.weights[spoken] if stage.balanced else torch.ones(len(target))
        losses = functional.cross_entropy(logits, target, reduction="none")
        loss = (losses * worth).sum() / worth.sum() + looking
        hit = logits.argmax(-1) == target
        row = spoken.nonzero()[:, 0]
        tasks: dict[str, list[float]] = {}
        for name in set(names):
            mine = hit[torch.tensor([names[r] == name for r in row.tolist()])]
            tasks[str(name)] = [int(mine.sum()), mine.numel()]
        return loss, {"right": round(hit.float().mean().item(), 4), **facts, "tasks": tasks}

    def forward(self, pages, size, stage, rng):
        """Hidden states ``[pages, text, width]`` over the packed questions, their packing, the tower's loss."""
        core = self.core
        index = layout(core, size)
        packed = pack(pages, len(index), stage.questions, rng, 0.4 if stage.balanced else 0.0)
        cut = [tiles(page) for page in pages]
        print_pages = [print_page(rng, (128, 128)) for _ in range(self.recipe.print_pages if stage.tower else 0)]
        pixels = torch.cat(cut + [tiles(page) for page in print_pages])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.set_grad_enabled(stage.tower and torch.is_grad_enabled()):
                seen = core.vision_tower(pixels, output_hidden_states=True)
                labels = self._labels(pages + print_pages, pixels, seen)
            cells = seen.hidden_states[-2][: sum(map(len, cut)), 1:]
            cells = cells.reshape(len(pages), -1, core.config.vision_config.hidden_size)
            projected = core.multi_modal_projector(cells[:, index.clamp(min=0)]).float()
            visual = torch.where((index < 0)[:, None], core.image_newline, projected)
            embed = core.language_model.embed_tokens
            start = embed(torch.tensor([[1, 5]])).expand(len(pages), -1, -1)  # <s> USER:
            inputs = torch.cat([start, visual, embed(packed.ids)], 1)
            hidden = core.language_model(
                inputs_embeds=inputs, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
            ).last_hidden_state[:, packed.head + len(index) :]
            return hidden, packed, labels


def _muon(modules: list[nn.Module], rate: float, rest_rate: float, decay: float, extra=()) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the transformer layers of ``modules``, AdamW on everything else in them."""
    matrices, rest = [], list(extra)
    for name, parameter in ((n, p) for module in modules for n, p in module.named_parameters()):
        (matrices if parameter.ndim == 2 and "layers." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, rest_rate, betas=(0.9, 0.98), weight_decay=decay),
    ]
