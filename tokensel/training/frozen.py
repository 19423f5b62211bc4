"""Training on the questions of a suite, by how a model answers them.

What such trainings share: the questions of a step, the loss of an answer, and a loop whose result does not
change when it is killed and started again.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tokensel.benchmarks.questions import Questions, load_questions
from tokensel.benchmarks.table import load_suite
from tokensel.methods import Batch
from tokensel.training.checkpoint import (
    History,
    Progress,
    load_checkpoint,
    remove_partial_files,
    save_checkpoint,
)
from tokensel.training.config import QuestionsConfig
from tokensel.training.optim import adamw, optimizer_step
from tokensel.utils.files import write_json
from tokensel.utils.progress import progress_bar
from tokensel.utils.provenance import checkpoint_digest, json_digest
from tokensel.utils.seeds import generator
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.forced import IGNORED
from tokensel.vlm.load import Vlm, load_vlm

__all__ = [
    "answer_loss",
    "draw_questions",
    "load_frozen",
    "run_steps",
    "token_losses",
    "training_facts",
    "training_identity",
]

Record = dict[str, float | int]


def load_frozen(config: QuestionsConfig, vlm: Vlm | None = None) -> tuple[Vlm, list[Questions]]:
    """The model, whose weights are frozen here, and the questions of each benchmark.

    Args:
        config: names both.
        vlm: instead of ``config.model``, one in memory.

    Raises:
        TokenselError: no model or no data.
    """
    device = None if config.device == "auto" else config.device
    vlm = vlm or load_vlm(config.model, device, revision=config.revision)
    vlm.model.requires_grad_(False)
    benchmarks = load_suite(config.suite, config.benchmarks).values()
    return vlm, [load_questions(benchmark, config.split, config.n) for benchmark in benchmarks]


def draw_questions(
    vlm: Vlm, data: list[Questions], config: QuestionsConfig, step: int
) -> tuple[Encoded, Int[Tensor, "rows steps"], Int[Tensor, "rows"]]:
    """The questions of one step and their reference answers: tokens, end tokens included, and lengths.

    They depend on the seed and the step's number alone. Each benchmark is equally likely.
    """
    draws = generator(config.seed, "questions", step)
    rows = []
    for _ in range(config.batch_size):
        questions = data[int(torch.randint(len(data), (), generator=draws))]
        rows.append((questions, int(torch.randint(len(questions), (), generator=draws))))
    images = [questions.image(i) for questions, i in rows]
    batch = Batch(vlm, images, [questions.prompts[i] for questions, i in rows])
    tokenizer = vlm.processor.tokenizer
    answers = [
        [*tokenizer(questions.answers[i][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for questions, i in rows
    ]
    lengths = torch.tensor([len(answer) for answer in answers], device=vlm.model.device)
    longest = max(len(answer) for answer in answers)
    padded = [answer + [tokenizer.eos_token_id] * (longest - len(answer)) for answer in answers]
    return batch.seeing, torch.tensor(padded, device=vlm.model.device), lengths


def answer_loss(
    logits: Float[Tensor, "rows steps vocabulary"], labels: Int[Tensor, "rows steps"]
) -> Float[Tensor, ""]:
    """Cross entropy in nats per token: the mean over each question's tokens, then over the questions."""
    return (token_losses(logits, labels).sum(1) / (labels != IGNORED).sum(1)).mean()


def token_losses(
    logits: Float[Tensor, "rows steps vocabulary"], labels: Int[Tensor, "rows steps"]
) -> Float[Tensor, "rows steps"]:
    """Cross entropy of each token in nats; 0 behind the end of an answer."""
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape)


def run_steps(
    config: QuestionsConfig,
    trained: nn.Module,
    identity: str,
    losses: Callable[[int], Mapping[str, Tensor | float]],
    prepare: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Take all steps; continues an earlier run in ``config.out`` that was interrupted.

    Args:
        config: all choices.
        trained: what is trained, on its device; in evaluation mode afterwards.
        identity: of model and data, see :func:`training_identity`.
        losses: computes the values that one step reports; "loss" is the one that is minimised.
        prepare: called before the first step of a new training.

    Returns:
        One history record per step.

    Raises:
        TokenselError: a checkpoint of another training, or a full disk.
    """
    optimizer, out = adamw(trained, config), Path(config.out) if config.out else None
    earlier = load_checkpoint(out, trained, optimizer, identity, config.result()) if out else None
    first = earlier.step if earlier else 0
    if earlier is None:
        prepare()
    history = History(out, first)
    if out:
        remove_partial_files(out)
        write_json(out / "train.json", asdict(config))
    trained.train()
    with progress_bar(config.steps, done=first, unit="steps", shown=config.progress) as bar:
        for step in range(first, config.steps):
            values = losses(step)
            loss = values["loss"]
            assert isinstance(loss, Tensor), "what is minimised has a gradient"
            optimizer_step(trained, optimizer, loss, step, config)
            numbers = {name: v.item() if isinstance(v, Tensor) else v for name, v in values.items()}
            record = {"step": step + 1, **numbers}
            history.extend([record])
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()}, refresh=False)
            if out and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
                save_checkpoint(
                    out, trained, optimizer, Progress(step + 1, 1.0, identity, {}), config.result()
                )
    trained.eval()
    return history.records


def training_identity(config: QuestionsConfig, model: PreTrainedModel, data: list[Questions]) -> str:
    """Equal for the same model and the same questions with the same answers."""
    weights = checkpoint_digest(config.model, getattr(model.config, "_commit_hash", None))
    asked = json_digest([[questions.ids, questions.prompts, questions.answers] for questions in data])
    names = " ".join(f"{questions.benchmark.name}:{len(questions)}" for questions in data)
    return f"model {weights}, {config.suite} {config.split}: {names} {asked}"


def training_facts(
    config: QuestionsConfig, data: list[Questions], records: list[Record], *averaged: str
) -> dict[str, str | float | int]:
    """What a model card says of a training: data, steps, seed, and values averaged over its last tenth."""
    last = [record for record in records if record["step"] > 0.9 * config.steps]
    names = ", ".join(questions.benchmark.name for questions in data)
    return {name: sum(record[name] for record in last) / len(last) for name in averaged} | {
        "training_data": f"{config.suite}, {config.split}: {names}",
        "steps": config.steps,
        "seed": config.seed,
    }
