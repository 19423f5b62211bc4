"""Train the small models by their recipe, on a GPU or in a few processes on a CPU; resumable."""

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText

from tokensel.book.mini.losses import Heads, TrainingLosses
from tokensel.book.mini.model import KINDS, build_mini_model, build_processor
from tokensel.book.mini.optim import average_gradients, muon_and_adamw
from tokensel.book.mini.recipe import Recipe
from tokensel.book.mini.step_batches import StepBatches
from tokensel.utils import files
from tokensel.utils.devices import check_device

_FLUSH = 20  # steps between two reads of the counts; each read waits for the device


def train_mini(
    out: Path,
    recipe: Recipe | None = None,
    save_every: int = 100,
    device: str | None = None,
    workers: int | None = None,
    bf16: bool | None = None,
    compiled: bool | None = None,
    start: Path | None = None,
    kind: str = KINDS[0],
    half: bool = False,
) -> Path:
    """Train a small model; resumes from ``out/checkpoint.safetensors`` if it exists.

    Args:
        out: folder for the checkpoint, ``history.*.jsonl`` and, at the end, ``model/``: a LLaVA-NeXT
            checkpoint with its processor.
        recipe: steps, sizes and rates; by default those of :class:`Recipe`.
        save_every: steps between checkpoints.
        device: by default a GPU if there is one, else the CPU.
        workers: processes that share each batch and average their gradients; by default 1 on a GPU, 2 on a
            CPU.
        bf16: compute in bfloat16; by default on a GPU, and on a CPU that has the instructions for it.
        compiled: compile the language model (a quarter faster on a CPU); by default where there is a C++
            compiler.
        start: folder of a finished model to go on from. The recipe's first phase is left out; in its place
            new heads are fitted to that model's tower, as a finished model has none. From a model of another
            kind every weight of the same name and shape is taken over, and no phase is left out.
        kind: of model, one of ``KINDS``.
        half: store the finished model in half of the space, see :func:`halve`.

    Returns:
        The folder of the finished model.
    """
    device = str(check_device(device))
    on_cpu = device == "cpu"
    settings = {
        "device": device,
        "workers": (2 if on_cpu else 1) if workers is None else workers,
        "bf16": (not on_cpu or torch.cpu._is_avx512_bf16_supported()) if bf16 is None else bf16,
        "compiled": shutil.which("g++") is not None if compiled is None else compiled,
    }
    build_processor(kind)  # a faulty environment fails here, in one process
    arguments = (Path(out), recipe or Recipe(), save_every, settings | {"kind": kind, "half": half}, start)
    if settings["workers"] == 1:
        _work(0, *arguments)
    else:
        with tempfile.TemporaryDirectory() as meeting:
            spawn(_work, (*arguments, f"file://{meeting}/workers", os.getpid()), settings["workers"])
    return Path(out) / "model"


def _work(
    worker: int,
    out: Path,
    recipe: Recipe,
    save_every: int,
    settings: dict[str, Any],
    start: Path | None,
    meeting: str | None = None,
    parent: int | None = None,
) -> None:
    """One worker: its share of every batch; the first worker writes all files."""
    workers, device = settings["workers"], torch.device(settings["device"])
    if meeting:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        distributed.init_process_group("gloo", init_method=meeting, rank=worker, world_size=workers)
    torch.manual_seed(recipe.seed)
    model: Any = build_mini_model(settings["kind"])
    model, heads = model.to(device), Heads(128, 192).to(device)
    if device.type == "cpu":
        # Written-out attention: with a mask for each row, the backward pass of sdpa takes six times as long
        # there.
        model.model.language_model.set_attn_implementation("eager")
    if settings["compiled"]:
        model.model.language_model.compile(dynamic=True)
    run = _Run(
        out, recipe, TrainingLosses(model, heads, settings["bf16"]), save_every, worker, workers, parent
    )
    if not run.load() and start is not None:
        run.take_over(start)
    run.tower()
    run.language()
    if worker == 0:
        folder = out / "model"
        model.save_pretrained(folder)
        if settings["half"]:
            halve(folder)
        build_processor(settings["kind"]).save_pretrained(folder)
        files.write_json(folder / "recipe.json", asdict(recipe) | settings | {"torch": torch.__version__})
    if meeting:
        distributed.destroy_process_group()


def halve(folder: Path) -> None:
    """Round all weights of a stored model to bfloat16, but not those of its vision tower.

    The model is loaded in float32 as before, since its configuration says so. A tower that was not trained
    stays the same to the last bit, so selectors and recorded choices of tokens stay valid.
    """
    path = folder / "model.safetensors"
    tensors, meta = files.load_tensors(path)
    small = {name: t if "vision_tower" in name else t.bfloat16() for name, t in tensors.items()}
    files.save_tensors(path, small, meta)


class _Run:
    """The state of one training run, with its checkpoints."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        losses: TrainingLosses,
        save_every: int,
        worker: int,
        workers: int,
        parent: int | None,
    ):
        self.out, self.recipe, self.losses, self.save_every = out, recipe, losses, save_every
        self.worker, self.workers, self.parent = worker, workers, parent
        self.model, self.heads = losses.model, losses.heads
        self.done, self.phase = 0, "tower"
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices inside the layers (fewer steps to the same loss), AdamW for the rest."""
        recipe, core = self.recipe, self.model.model
        if self.phase == "heads":
            return [torch.optim.AdamW(self.heads.parameters(), recipe.head_rate)]
        vision = [core.vision_tower, self.heads]
        if self.phase == "tower":
            return muon_and_adamw(vision, recipe.rate, recipe.rate / 2, recipe.decay)
        text = [core.multi_modal_projector, self.model.lm_head, core.language_model]
        optimizers = muon_and_adamw(text, recipe.rate, recipe.rate / 2, 0.0, extra=[core.image_newline])
        return optimizers + muon_and_adamw(vision, recipe.joint_rate, recipe.joint_rate, recipe.decay)

    # --- checkpoints --------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        if self.worker:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{place}.{name}": value for name, value in state.items()}
        files.save_tensors(
            self.out / "checkpoint.safetensors", tensors, {"phase": self.phase, "step": str(step)}
        )

    def take_over(self, folder: Path) -> None:
        """Start from the weights of a finished model; if it is of another kind, from those that fit.

        A tower that learns without labels starts at random: the finished model's has learned from them.
        """
        finished, own = AutoModelForImageTextToText.from_pretrained(folder), self.model.state_dict()
        fitting = {
            name: tensor
            for name, tensor in finished.state_dict().items()
            if name in own and tensor.shape == own[name].shape
            if not (self.recipe.hidden and "vision_tower" in name)
        }
        self.model.load_state_dict(own | fitting)
        finished_tower = type(finished) is type(self.model) and not self.recipe.hidden
        self.phase = "heads" if finished_tower else "tower"
        self.optimizers = self._optimizers()

    def load(self) -> bool:
        """Resume from the last checkpoint; returns whether there was one."""
        if not (self.out / "checkpoint.safetensors").exists():
            return False
        tensors, meta = files.load_tensors(self.out / "checkpoint.safetensors")
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
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        return True

    # --- the two phases ------------------------------------------------------------------------------------

    def tower(self) -> None:
        """Phase one: the vision tower alone; or, if it is that of a finished model, only the heads on it."""
        if self.phase != "language":
            steps = self.recipe.tower_steps if self.phase == "tower" else self.recipe.head_steps
            self._loop(
                steps,
                int(steps * self.recipe.tower_cooldown),
                lambda step, batch: self.losses.tower_loss(batch),
            )
            self.phase, self.done = "language", 0
            self.optimizers = self._optimizers()
            self.save(0)

    def language(self) -> None:
        """Phase two: all parts together."""
        self._loop(
            self.recipe.steps,
            int(self.recipe.stages[-1].steps * self.recipe.cooldown),
            lambda step, batch: self.losses.answer_loss(batch, self.recipe.stage(step).tower),
        )

    def _batches(self, steps: range) -> DataLoader:
        """Batches, prefetched by other processes if a GPU trains; on a CPU these would take its cores."""
        visual = self.losses.visual({size for stage in self.recipe.stages for size in stage.sizes})
        batches = StepBatches(self.recipe, self.phase, steps, visual, self.worker, self.workers)
        ahead = 0 if self.losses.device.type == "cpu" else max(1, (os.cpu_count() or 2) - 2)
        return DataLoader(batches, batch_size=None, num_workers=ahead, prefetch_factor=4 if ahead else None)

    def _loop(self, total: int, cooling: int, loss_of) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        history = self.out / f"history.{self.phase}.jsonl"
        if self.worker == 0 and history.exists():  # steps after the checkpoint are repeated
            lines = [
                line for line in history.read_text().splitlines() if json.loads(line)["step"] < self.done
            ]
            files.write_text(history, "".join(line + "\n" for line in lines))
        # only the first worker logs
        with open(history if self.worker == 0 else os.devnull, "a", buffering=1, encoding="utf-8") as log:
            steps = range(self.done, total)
            bar = tqdm(
                zip(steps, self._batches(steps)),
                initial=self.done,
                total=total,
                desc=self.phase,
                mininterval=10,
                disable=self.worker > 0,
            )
            parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
            counted, began = [], time.perf_counter()
            for step, batch in bar:
                if self.parent and os.getppid() != self.parent:
                    raise SystemExit(
                        1
                    )  # the parent was killed and perhaps restarted: no two runs may write one checkpoint
                factor = self.recipe.scale(step, total, cooling)
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = factor * optimizer.defaults["lr"]
                loss, counts = loss_of(step, batch.to(self.losses.device))
                loss.backward()
                average_gradients(parameters)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                self.model.zero_grad(set_to_none=True)  # also of parts that this phase does not train
                self.heads.zero_grad(set_to_none=True)
                saving = (step + 1) % self.save_every == 0 and step + 1 < total
                if self.worker == 0:
                    counted.append((step, batch.tasks, loss.detach(), counts))
                if counted and (len(counted) == _FLUSH or saving or step + 1 == total):
                    seconds = (time.perf_counter() - began) / len(counted)
                    for entry in counted:
                        log.write(json.dumps(facts := _facts(*entry) | {"seconds": round(seconds, 3)}) + "\n")
                    bar.set_postfix({k: v for k, v in facts.items() if isinstance(v, float)}, refresh=False)
                    counted, began = [], time.perf_counter()
                if saving:
                    self.save(step + 1)


def _facts(
    step: int, tasks: tuple[str, ...], loss: torch.Tensor, counts: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """A line of the history: the share of right labels, and for each task the right tokens and all tokens."""
    facts: dict[str, Any] = {"step": step, "loss": round(loss.item(), 4)}
    tasks_seen: dict[str, list[int]] = {}
    for name, count in counts.items():
        if name == "pages":
            for task, (right, total) in zip(tasks, count.tolist()):
                earlier = tasks_seen.setdefault(task, [0, 0])
                tasks_seen[task] = [earlier[0] + right, earlier[1] + total]
        elif name == "drill":
            tasks_seen[name] = count.tolist()
        elif int(count[1]):
            facts[name] = round(float(count[0] / count[1]), 4)
    return facts | ({"tasks": tasks_seen} if tasks_seen else {})
