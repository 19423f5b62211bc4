"""What a training writes while it runs: a checkpoint, replaced atomically, and a history."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor, nn

from tokensel.training.config import FREE
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import load_tensors, save_tensors, write_text

FILE = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a training has come: steps done, scale of its distances, its data, the loader's state."""

    step: int
    scale: float
    identity: str
    loader: dict[str, Any]


def save_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, config: dict[str, Any]
) -> None:
    """Write weights, AdamW's moments and the progress to one safetensors file, atomically; never a pickle.

    Raises:
        TokenselError: no space left on the device; the last checkpoint stays.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in _trained(model):
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    header = {
        "step": str(progress.step),
        "scale": repr(progress.scale),
        "identity": progress.identity,
        "loader": json.dumps(progress.loader),
        "config": json.dumps(config),
    }
    save_tensors(out / FILE, tensors, header)


def load_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str, config: dict[str, Any]
) -> Progress | None:
    """Load the checkpoint of ``out``, if there is one, into model and optimizer; returns its progress.

    Raises:
        TokenselError: the file is cut short, or belongs to a training with other options, on other data, or
            by another version of tokensel.
    """
    path = out / FILE
    if not path.exists():
        return None
    tensors, header = load_tensors(path)
    if not {"step", "scale", "identity", "loader", "config"} <= header.keys():
        raise TokenselError(
            f"{path}: was written by another version of tokensel; give another out folder or delete it"
        )
    before = json.loads(header["config"])
    for name, value in config.items():
        if name not in FREE and before.get(name) != value:
            raise TokenselError(
                f"{path}: was trained with {name} {before.get(name)}, not {value}; "
                "give another out folder or delete it"
            )
    if header["identity"] != identity:
        raise TokenselError(
            f"{path}: was trained on [{header['identity']}], not on [{identity}]; "
            "give another out folder or delete it"
        )
    step = int(header["step"])
    model.load_state_dict(_part(tensors, "model"))
    averages, squares = _part(tensors, "exp_avg"), _part(tensors, "exp_avg_sq")
    for name, parameter in _trained(model):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": averages[name].to(parameter.device),
            "exp_avg_sq": squares[name].to(parameter.device),
        }
    return Progress(step, float(header["scale"]), header["identity"], json.loads(header["loader"]))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that have moments: those that are not fixed."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def remove_partial_files(out: Path) -> None:
    """Remove what a kill during a write left in ``out`` and the folders in it, where all files are whole."""
    for part in (*out.glob(".*.part"), *out.glob("*/.*.part")):
        if part.is_dir():
            rmtree(part, ignore_errors=True)
        else:
            part.unlink()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}/"): value
        for name, value in tensors.items()
        if name.startswith(f"{prefix}/")
    }


class History:
    """One record per step; appended to ``history.jsonl`` in the out folder, if there is one."""

    def __init__(self, out: Path | None, step: int = 0):
        """Read the records of steps up to ``step``; later ones belong to steps that will be done again."""
        self.path = out / "history.jsonl" if out else None
        self.records: list[dict[str, float | int]] = []
        if self.path and self.path.exists():
            *lines, _cut = self.path.read_text(encoding="utf-8").split(
                "\n"
            )  # a line without an end was cut short
            self.records = [record for record in map(json.loads, lines) if record["step"] <= step]
        if self.path:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def extend(self, records: Iterable[dict[str, float | int]]) -> None:
        """Add records and write them out."""
        new = list(records)
        self.records += new
        if self.path and new:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in new))
