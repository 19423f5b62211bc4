"""Training DyRate's rate predictor (arXiv 2501.14204): straight-through Gumbel-Softmax on a frozen model.

The abstract says "based on attention distribution" and no more about the loss. Ours weighs accuracy against compute,

    L = cross entropy of the reference answer + weight * mean over its steps of the fraction of visual tokens kept,

every question counting the same. The fraction kept is what a step's attention and its cache cost; FLOPs counted over a whole
answer would speak of the prompt almost alone and teach nothing about the steps behind it.

All steps of an answer are trained at once. What the predictor reads comes from layers that keep every token, so its rates do
not depend on one another, and the masks of all steps follow from one pass through these layers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from tokensel.training.checkpoint import History, Progress, load_checkpoint, save_checkpoint, sweep
from tokensel.training.config import DyRateConfig
from tokensel.training.optim import adamw, learning_rate, seeded, temperature
from tokensel.utils.errors import check_layers
from tokensel.utils.files import write_json
from tokensel.utils.progress import progress_bar
from tokensel.utils.provenance import checkpoint_digest
from tokensel.utils.seeds import generator
from tokensel.vlm.forced import IGNORED, Forced, force
from tokensel.vlm.load import Vlm, load_vlm
from tokensel.vlm.reduce import reduce

_GONE = 1e-6  # weight of a dropped token in the softmax
_BACK = 0.01  # slope there, as a share of the slope that the logarithm of the weight has; see attention_mask


def soft_masks(
    predictor: RatePredictor,
    mass: Float[Tensor, "rows steps heads types"],
    scores: Float[Tensor, "rows steps prompt"],
    forced: Forced,
    tau: float = 1.0,
    noise: Float[Tensor, "rows steps rates"] | None = None,
) -> tuple[Float[Tensor, "rows steps prompt"], Float[Tensor, "rows steps"]]:
    """Which of the prompt's tokens each step sees, 1 or 0, with the slope of the relaxed choice of rates.

    Args:
        predictor: in training.
        mass: what it reads.
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
    visual, total = forced.visual, forced.visual.sum(1)
    # how many tokens each rate keeps: [rows, rates, 1]
    counts = torch.stack([fraction_count(total, keep) for keep in predictor.keeps.tolist()], 1)[..., None]
    mask, left, masks = torch.ones_like(scores[:, 0]), visual, []
    for step in range(forced.steps):
        kept = (rank(scores[:, step], left)[:, None] < counts) & left[:, None]  # [rows, rates, prompt]
        chosen = torch.einsum("rk,rkp->rp", gate[:, step], kept.to(gate))
        mask = mask * torch.where(visual, chosen, 1.0)
        left = visual & (mask.detach() > 0.5)
        masks.append(mask)
    masks = torch.stack(masks, 1)
    return masks, (masks * visual[:, None]).sum(-1) / total[:, None]


class RateLesson:
    """One pass of prompts and answers through the frozen model, with tokens hidden as the predictor's rates have it."""

    def __init__(self, model: PreTrainedModel, predictor: RatePredictor):
        """
        Raises:
            TokenselError: another language model, a layer outside it, or another number of heads.
        """
        self.model, self.predictor, self.decoder = model, predictor, decoder_of(model)
        check_layers("dyrate", [predictor.config.layer], len(self.decoder.layers))

    def read(
        self, forced: Forced, tau: float = 1.0, noise: Float[Tensor, "rows steps rates"] | None = None
    ) -> tuple[Float[Tensor, "rows steps vocabulary"], Float[Tensor, "rows steps"]]:
        """Logits of every step, and the fraction of the visual tokens that it kept; see :func:`soft_masks`."""
        with self._hidden(forced, tau, noise) as kept:
            states = self.decoder(**forced.inputs, use_cache=False).last_hidden_state
        return self.model.get_output_embeddings()(states[:, -forced.steps :]).float(), kept["fraction"]

    @contextmanager
    def _hidden(self, forced: Forced, tau: float, noise: Tensor | None) -> Iterator[dict[str, Tensor]]:
        layer, found = self.predictor.config.layer, {}

        def look(attention: Any, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
            rows = last_rows(
                attention, kwargs["hidden_states"], kwargs["position_embeddings"], None, forced.attn_mask
            )
            scores = rows.mean(1)[..., : forced.visual.shape[1]]
            masks, found["fraction"] = soft_masks(
                self.predictor, type_mass(rows, forced.types), scores, forced, tau, noise
            )
            found["mask"] = attention_mask(masks, forced).to(kwargs["hidden_states"].dtype)

        def hide(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, kwargs | {"attention_mask": found["mask"]}

        layers = self.decoder.layers
        hooks = [layers[layer - 1].self_attn.register_forward_hook(look, with_kwargs=True)]
        hooks += [each.register_forward_pre_hook(hide, with_kwargs=True) for each in layers[layer:]]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def loss(
        self, forced: Forced, weight: float, tau: float, noise: Float[Tensor, "rows steps rates"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss, its cross entropy in nats a token, and its fraction of visual tokens kept."""
        logits, kept = self.read(forced, tau, noise)
        said = forced.labels != IGNORED
        losses = cross_entropy(
            logits.flatten(0, 1), forced.labels.flatten(), reduction="none", ignore_index=IGNORED
        )
        accuracy = (losses.view(said.shape).sum(1) / said.sum(1)).mean()
        compute = ((kept * said).sum(1) / said.sum(1)).mean()
        return accuracy + weight * compute, accuracy, compute


def attention_mask(
    masks: Float[Tensor, "rows steps prompt"], forced: Forced
) -> Float[Tensor, "rows 1 columns columns"]:
    """What is added to the logits of the attention: 0 at tokens that are kept, hugely negative at those that have gone.

    All of the prompt sees what step 0 kept, every token behind it what its own step kept. At a kept token the slope is that
    of the logarithm of its weight. At one that has gone it is a small share of that (``_BACK``): the more of the attention's
    sum is missing, the steeper the logarithm is there, without bound, and one token that should not have gone outweighs all
    others. In short trials on the small model, with the whole slope and with a tenth of it the fraction kept rose although
    the loss rose with it; with hardly any it fell to the lowest rate and stayed there; with a hundredth the loss fell.
    """
    prompt, columns = forced.visual.shape[1], forced.types.shape[1]
    seen = torch.cat([masks[:, :1].expand(-1, prompt - 1, -1), masks], 1)  # [rows, columns, prompt]
    weight = torch.cat([seen, seen.new_ones(len(seen), columns, columns - prompt)], 2)
    causal = torch.ones(columns, columns, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(
        columns, dtype=torch.bool, device=seen.device
    )  # padding looks at itself: no softmax over nothing
    allowed = causal & forced.inputs["attention_mask"].bool()[:, None] | itself
    kept = weight.detach() > 0.5
    slope = torch.where(kept, 1.0, _BACK / _GONE)
    added = torch.where(kept, 0.0, math.log(_GONE)) + slope * (weight - weight.detach())
    return added.masked_fill(~allowed, torch.finfo(added.dtype).min)[:, None]


def train_dyrate(
    config: DyRateConfig, vlm: Vlm | None = None
) -> tuple[RatePredictor, list[dict[str, float | int]]]:
    """Train a rate predictor, from wherever an earlier run in ``config.out`` was stopped.

    Killed at any moment, the same call ends at the weights of an undisturbed run: each step's questions and noise depend on
    the seed and the step's number alone.

    Args:
        config: all choices.
        vlm: instead of ``config.model``, one in memory; its weights are frozen here.

    Returns:
        The predictor, and one history record a step.

    Raises:
        TokenselError: no model or data, a layer outside the model, a checkpoint of another training, a full disk.
    """
    vlm = vlm or load_vlm(config.model, None if config.device == "auto" else config.device)
    model = vlm.model.requires_grad_(False)
    data = [
        load_questions(each, config.split, config.n)
        for each in load_suite(config.suite, config.benchmarks).values()
    ]
    heads = decoder_of(model).config.num_attention_heads
    shape = {"heads": heads, "layer": config.layer, "rates": config.rates}
    predictor = seeded(lambda: RatePredictor(RateConfig(**shape)), config.seed).to(model.device)
    lesson = RateLesson(model, predictor)
    optimizer, out = adamw(predictor, config), Path(config.out) if config.out else None
    digest = checkpoint_digest(config.model, getattr(model.config, "_commit_hash", None))
    identity = f"{digest} {config.suite} {config.split} {' '.join(f'{each.benchmark.name}:{len(each)}' for each in data)}"
    begun = load_checkpoint(out, predictor, optimizer, identity, config.result()) if out else None
    first = begun.step if begun else 0
    history = History(out, first)
    if out:
        sweep(out)
        write_json(out / "train.json", asdict(config))
    predictor.train()
    with progress_bar(config.steps, done=first, unit="steps", shown=config.progress) as bar:
        for step in range(first, config.steps):
            forced = force(model, *_draw(vlm, data, config, step))
            tau = temperature(step, config)
            noise = gumbel_noise(
                *forced.labels.shape, config.rates, generator=generator(config.seed, "noise", step)
            )
            loss, accuracy, kept = lesson.loss(forced, config.weight, tau, noise.to(model.device))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), config.max_grad_norm)
            optimizer.step()
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
    predictor.config.update(
        {name: sum(record[name] for record in last) / len(last) for name in ("accuracy_loss", "kept")}
        | {"model": vlm.name, "weight": config.weight, "steps": config.steps, "seed": config.seed}
        | {
            "training_data": f"{config.suite}, {config.split}: {', '.join(each.benchmark.name for each in data)}"
        }
    )
    if out:
        predictor.to("cpu").save_pretrained(out / "dyrate")
    return predictor, history.records


def _draw(vlm: Vlm, data: list[Questions], config: DyRateConfig, step: int) -> tuple:
    """The prompts of one step and their reference answers: tokens and lengths."""
    drawn = generator(config.seed, "questions", step)
    rows = []
    for _ in range(config.batch_size):
        questions = data[int(torch.randint(len(data), (), generator=drawn))]
        rows.append((questions, int(torch.randint(len(questions), (), generator=drawn))))
    batch = Batch(vlm, [each.image(i) for each, i in rows], [each.prompts[i] for each, i in rows])
    tokenizer = vlm.processor.tokenizer
    answers = [
        [*tokenizer(each.answers[i][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for each, i in rows
    ]
    lengths = torch.tensor([len(answer) for answer in answers], device=vlm.model.device)
    padded = [answer + [tokenizer.eos_token_id] * (int(lengths.max()) - len(answer)) for answer in answers]
    return reduce(batch.seeing), torch.tensor(padded, device=vlm.model.device), lengths
