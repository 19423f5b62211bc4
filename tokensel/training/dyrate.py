"""Training DyRate's rate predictor (arXiv 2501.14204): straight-through Gumbel-Softmax on a frozen model.

The abstract says "based on attention distribution" and no more about the loss. Ours weighs accuracy against
compute,

    L = cross entropy of the reference answer + weight * mean over its steps of the fraction of visual tokens
    kept,

with every question counting the same. The fraction kept is what a step's attention and its cache cost. FLOPs
of a whole answer would be dominated by the prompt and give the steps after it almost no gradient.

All steps of an answer are trained at once. The predictor reads layers that keep every token, so its rates do
not depend on one another, and the masks of all steps follow from one pass through these layers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import PreTrainedModel

from tokensel.benchmarks.questions import Questions, load_questions
from tokensel.benchmarks.table import load_suite
from tokensel.budget import fraction_count, rank
from tokensel.methods import Batch
from tokensel.model.gumbel import gumbel_noise
from tokensel.schedules.attention import last_rows, type_mass
from tokensel.schedules.decoder import decoder_of
from tokensel.schedules.dyrate import RateConfig, RatePredictor
from tokensel.training.checkpoint import (
    History,
    Progress,
    load_checkpoint,
    remove_partial_files,
    save_checkpoint,
)
from tokensel.training.config import DyRateConfig
from tokensel.training.optim import adamw, optimizer_step, seeded, temperature
from tokensel.utils.errors import check_layers
from tokensel.utils.files import write_json
from tokensel.utils.progress import progress_bar
from tokensel.utils.provenance import checkpoint_digest, json_digest
from tokensel.utils.seeds import generator
from tokensel.vlm.forced import IGNORED, Forced, force
from tokensel.vlm.load import Vlm, load_vlm
from tokensel.vlm.reduce import reduce

_DROPPED_WEIGHT = 1e-6  # weight of a dropped token in the softmax
_DROPPED_SLOPE = 0.01  # gradient there, as a fraction of that of the weight's logarithm; see attention_mask


def soft_masks(
    predictor: RatePredictor,
    mass: Float[Tensor, "rows steps heads types"],
    scores: Float[Tensor, "rows steps prompt"],
    forced: Forced,
    tau: float = 1.0,
    noise: Float[Tensor, "rows steps rates"] | None = None,
) -> tuple[Float[Tensor, "rows steps prompt"], Float[Tensor, "rows steps"]]:
    """Which of the prompt's tokens each step keeps, 1 or 0, with the gradient of the relaxed choice of rates.

    Args:
        predictor: in training.
        mass: its input, see :func:`tokensel.schedules.attention.type_mass`.
        scores: by which visual tokens are ranked at each step.
        forced: prompts and answers.
        tau: temperature of the Gumbel-Softmax.
        noise: Gumbel samples; without them the masks are those of inference.

    Returns:
        The masks, and the fraction of the visual tokens kept at each step.
    """
    logits = predictor(mass)
    soft = ((logits if noise is None else logits + noise) / tau).softmax(-1)
    gate = one_hot(soft.argmax(-1), soft.shape[-1]) + soft - soft.detach()
    cells, total = forced.cells, forced.cells.sum(1)
    # how many tokens each rate keeps: [rows, rates, 1]
    counts = torch.stack([fraction_count(total, keep) for keep in predictor.keeps.tolist()], 1)[..., None]
    mask, remaining, masks = torch.ones_like(scores[:, 0]), cells, []
    # the answer is predicted from the prompt's last column: if that is a cell, it ranks first and stays
    scores = torch.cat([scores[..., :-1], torch.full_like(scores[..., -1:], torch.inf)], -1)
    for step in range(forced.steps):
        # what each rate would keep: the best-ranked of those that remain, [rows, rates, prompt]
        kept = (rank(scores[:, step], remaining)[:, None] < counts) & remaining[:, None]
        chosen = torch.einsum("rk,rkp->rp", gate[:, step], kept.to(gate))
        mask = mask * torch.where(cells, chosen, 1.0)  # a token that was dropped stays dropped
        remaining = cells & (mask.detach() > 0.5)
        masks.append(mask)
    masks = torch.stack(masks, 1)
    return masks, (masks * cells[:, None]).sum(-1) / total.clamp(min=1)[:, None]


class MaskedForward:
    """Teacher-forced passes through the frozen model, in which the predictor's rates mask visual tokens."""

    def __init__(self, model: PreTrainedModel, predictor: RatePredictor):
        """
        Raises:
            TokenselError: another language model, a layer outside it, or another number of heads.
        """
        self.model, self.predictor, self.decoder = model, predictor, decoder_of(model)
        self.layers = cast(nn.ModuleList, self.decoder.layers)
        check_layers("dyrate", [predictor.config.layer], len(self.layers))

    def logits(
        self, forced: Forced, tau: float = 1.0, noise: Float[Tensor, "rows steps rates"] | None = None
    ) -> tuple[Float[Tensor, "rows steps vocabulary"], Float[Tensor, "rows steps"]]:
        """Logits of every step, and the fraction of visual tokens that it kept; see :func:`soft_masks`."""
        with self._masked(forced, tau, noise) as masking:
            states = self.decoder(**forced.inputs, use_cache=False).last_hidden_state
        head = cast(nn.Module, self.model.get_output_embeddings())
        return head(states[:, -forced.steps :]).float(), masking["fraction"]

    @contextmanager
    def _masked(self, forced: Forced, tau: float, noise: Tensor | None) -> Iterator[dict[str, Tensor]]:
        """While this lasts, the layers from the configured one on run under the predictor's masks."""
        layer, masking = self.predictor.config.layer, {}

        def make_masks(attention: Any, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
            rows = last_rows(
                attention, kwargs["hidden_states"], kwargs["position_embeddings"], None, forced.attn_mask
            )
            scores = rows.mean(1)[..., : forced.visual.shape[1]]
            masks, masking["fraction"] = soft_masks(
                self.predictor, type_mass(rows, forced.types), scores, forced, tau, noise
            )
            masking["mask"] = attention_mask(masks, forced).to(kwargs["hidden_states"].dtype)

        def apply_masks(
            _layer: nn.Module, args: tuple, kwargs: dict[str, Any]
        ) -> tuple[tuple, dict[str, Any]]:
            return args, kwargs | {"attention_mask": masking["mask"]}

        attention = self.layers[layer - 1].get_submodule("self_attn")
        hooks = [attention.register_forward_hook(make_masks, with_kwargs=True)]
        hooks += [
            module.register_forward_pre_hook(apply_masks, with_kwargs=True) for module in self.layers[layer:]
        ]
        try:
            yield masking
        finally:
            for hook in hooks:
                hook.remove()

    def loss(
        self, forced: Forced, weight: float, tau: float, noise: Float[Tensor, "rows steps rates"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss, its cross entropy in nats per token, and its fraction of visual tokens kept."""
        logits, kept = self.logits(forced, tau, noise)
        counted = forced.labels != IGNORED
        losses = cross_entropy(
            logits.flatten(0, 1), forced.labels.flatten(), reduction="none", ignore_index=IGNORED
        )
        # each question's mean over its own tokens, then the mean over the questions
        accuracy = (losses.view(counted.shape).sum(1) / counted.sum(1)).mean()
        compute = ((kept * counted).sum(1) / counted.sum(1)).mean()
        return accuracy + weight * compute, accuracy, compute


def attention_mask(
    masks: Float[Tensor, "rows steps prompt"], forced: Forced
) -> Float[Tensor, "rows 1 columns columns"]:
    """What is added to the logits of the attention: 0 at kept tokens, far below 0 at dropped ones.

    The whole prompt attends to what step 0 kept, every token after it to what its own step kept. At a kept
    token the gradient is that of the logarithm of its weight. At a dropped one it is a small fraction of that
    (``_DROPPED_SLOPE``): the gradient of the logarithm grows without bound as the weight goes to 0, and one
    token that should have been kept outweighs all others. In short trials on the small model the fraction
    kept rose, and the loss with it, at the whole gradient and at a tenth of it; at hardly any it fell to the
    lowest rate and stayed there; at a hundredth the loss fell.
    """
    prompt, columns = forced.visual.shape[1], forced.types.shape[1]
    # column by column, which prompt tokens it may attend to: [rows, columns, prompt]
    visible = torch.cat([masks[:, :1].expand(-1, prompt - 1, -1), masks], 1)
    # the answer's own tokens are never dropped: [rows, columns, columns]
    weight = torch.cat([visible, visible.new_ones(len(visible), columns, columns - prompt)], 2)
    causal = torch.ones(columns, columns, dtype=torch.bool, device=masks.device).tril()
    # padding attends to itself, as a softmax over nothing is NaN
    itself = torch.eye(columns, dtype=torch.bool, device=masks.device)
    allowed = causal & forced.inputs["attention_mask"].bool()[:, None] | itself
    kept = weight.detach() > 0.5
    slope = torch.where(kept, 1.0, _DROPPED_SLOPE / _DROPPED_WEIGHT)
    added = torch.where(kept, 0.0, math.log(_DROPPED_WEIGHT)) + slope * (weight - weight.detach())
    return added.masked_fill(~allowed, torch.finfo(added.dtype).min)[:, None]


def train_dyrate(
    config: DyRateConfig, vlm: Vlm | None = None
) -> tuple[RatePredictor, list[dict[str, float | int]]]:
    """Train a rate predictor; continues an earlier run in ``config.out`` that was interrupted.

    Killed at any moment, the same call ends at the weights of an undisturbed run: each step's questions and
    noise depend on the seed and the step's number alone.

    Args:
        config: all choices.
        vlm: instead of ``config.model``, one in memory; its weights are frozen here.

    Returns:
        The predictor, and one history record per step.

    Raises:
        TokenselError: no model or data, a layer outside the model, a checkpoint of another training, a full
        disk.
    """
    device = None if config.device == "auto" else config.device
    vlm = vlm or load_vlm(config.model, device, revision=config.revision)
    model = vlm.model.requires_grad_(False)
    data = [
        load_questions(benchmark, config.split, config.n)
        for benchmark in load_suite(config.suite, config.benchmarks).values()
    ]
    heads = cast(Any, decoder_of(model).config).num_attention_heads
    shape = {"heads": heads, "layer": config.layer, "rates": config.rates}
    predictor = seeded(lambda: RatePredictor(RateConfig(**shape)), config.seed)
    cast(nn.Module, predictor).to(model.device)
    forward = MaskedForward(model, predictor)
    optimizer, out = adamw(predictor, config), Path(config.out) if config.out else None
    identity = _identity(config, model, data)
    earlier = load_checkpoint(out, predictor, optimizer, identity, config.result()) if out else None
    first = earlier.step if earlier else 0
    history = History(out, first)
    if out:
        remove_partial_files(out)
        write_json(out / "train.json", asdict(config))
    predictor.train()
    with progress_bar(config.steps, done=first, unit="steps", shown=config.progress) as bar:
        for step in range(first, config.steps):
            forced = force(model, *_draw_questions(vlm, data, config, step))
            tau = temperature(step, config)
            noise = gumbel_noise(
                *forced.labels.shape, config.rates, generator=generator(config.seed, "noise", step)
            )
            loss, accuracy, kept = forward.loss(forced, config.weight, tau, noise.to(model.device))
            optimizer_step(predictor, optimizer, loss, step, config)
            values = {"loss": loss, "accuracy_loss": accuracy, "kept": kept}
            record = {"step": step + 1, **{name: value.item() for name, value in values.items()}, "tau": tau}
            history.extend([record])
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}", kept=f"{record['kept']:.2f}", refresh=False)
            if out and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
                save_checkpoint(
                    out, predictor, optimizer, Progress(step + 1, 1.0, identity, {}), config.result()
                )
    predictor.eval()
    last = [record for record in history.records if record["step"] > 0.9 * config.steps]
    names = ", ".join(questions.benchmark.name for questions in data)
    predictor.config.update(
        {name: sum(record[name] for record in last) / len(last) for name in ("accuracy_loss", "kept")}
        | {"model": vlm.name, "weight": config.weight, "steps": config.steps, "seed": config.seed}
        | {"training_data": f"{config.suite}, {config.split}: {names}"}
    )
    if out:
        predictor.cpu().save_pretrained(out / "dyrate")
    return predictor, history.records


def _identity(config: DyRateConfig, model: PreTrainedModel, data: list[Questions]) -> str:
    """Equal for the same model and the same questions with the same answers."""
    weights = checkpoint_digest(config.model, getattr(model.config, "_commit_hash", None))
    asked = json_digest([[questions.ids, questions.prompts, questions.answers] for questions in data])
    names = " ".join(f"{questions.benchmark.name}:{len(questions)}" for questions in data)
    return f"model {weights}, {config.suite} {config.split}: {names} {asked}"


def _draw_questions(vlm: Vlm, data: list[Questions], config: DyRateConfig, step: int) -> tuple:
    """The prompts of one step and their reference answers: tokens and lengths."""
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
    return reduce(batch.seeing), torch.tensor(padded, device=vlm.model.device), lengths
