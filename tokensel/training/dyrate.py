"""Training DyRate's rate predictor (arXiv 2501.14204) on a frozen model.

The abstract says "based on attention distribution" and no more about the loss. Ours weighs accuracy against
compute,

    L = cross entropy of the reference answer + weight * mean over its steps of the fraction of visual tokens
    kept,

with every question counting the same. The fraction kept is what a step's attention and its cache cost. FLOPs
of a whole answer would be dominated by the prompt and give the steps after it almost no gradient.

All steps of an answer are trained at once. The predictor reads layers that keep every token, so its rates do
not depend on one another, and the masks of all steps follow from one pass through these layers.

The choice of a rate has no gradient of its own. ``straight-through`` takes that of a Gumbel-Softmax, as the
abstract says, through the masks of the attention. It is biased; and as dropped tokens never come back, the
lowest of all rates that were drawn for an answer counts, so that it trains a game under noise, which is not
that of inference. ``all-rates`` draws nothing: every answer is read once at each rate, and the loss is
averaged over all that the predictor could draw.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from tokensel.budget import fraction_count, rank
from tokensel.model.gumbel import gumbel_noise
from tokensel.schedules.attention import last_rows, type_mass
from tokensel.schedules.decoder import decoder_of
from tokensel.schedules.dyrate import RateConfig, RatePredictor
from tokensel.training.config import DyRateConfig
from tokensel.training.frozen import (
    answer_loss,
    draw_questions,
    load_frozen,
    run_steps,
    token_losses,
    training_facts,
    training_identity,
)
from tokensel.training.optim import seeded, temperature
from tokensel.utils.errors import check_layers
from tokensel.utils.seeds import generator
from tokensel.vlm.forced import IGNORED, Forced, force, forced_logits
from tokensel.vlm.load import Vlm
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
            logits = forced_logits(self.model, forced)
        return logits, masking["fraction"]

    @contextmanager
    def _masked(self, forced: Forced, tau: float, noise: Tensor | None) -> Iterator[dict[str, Tensor]]:
        """While this lasts, the layers from the configured one on run under the predictor's masks."""
        layer, masking = self.predictor.config.layer, {}

        def make_masks(attention: Any, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
            rows = last_rows(
                attention, kwargs["hidden_states"], kwargs["position_embeddings"], None, forced.attn_mask
            )
            scores = rows.mean(1)[..., : forced.visual.shape[1]]
            masking["mass"] = type_mass(rows, forced.types)
            masks, masking["fraction"] = soft_masks(
                self.predictor, masking["mass"], scores, forced, tau, noise
            )
            masking["mask"] = attention_mask(masks, forced).to(kwargs["hidden_states"].dtype)

        def apply_masks(
            _layer: nn.Module, args: tuple, kwargs: dict[str, Any]
        ) -> tuple[tuple, dict[str, Any]]:
            hidden, *others = args
            if masking["mask"].requires_grad and not hidden.requires_grad:
                # on a GPU, attention keeps what its mask's gradient needs only if its inputs have one, too
                hidden = hidden.detach().requires_grad_()
            return (hidden, *others), kwargs | {"attention_mask": masking["mask"]}

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
        accuracy = answer_loss(logits, forced.labels)
        compute = ((kept * counted).sum(1) / counted.sum(1)).mean()
        return accuracy + weight * compute, accuracy, compute

    def mean_loss(
        self, forced: Forced, weight: float
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        """The same three, averaged over all rates that the predictor could draw, step by step.

        What is left at a step is the lowest rate so far. What the step costs at each rate is measured in a
        pass that keeps this rate from the prompt on.
        """
        losses, fractions, mass = [], [], None
        order = self.predictor.keeps.argsort().to(forced.labels.device)  # from the lowest
        for rate in order:
            sure = 1e6 * one_hot(rate, len(order))  # above any logit
            with torch.no_grad(), self._masked(forced, 1.0, sure.expand(*forced.labels.shape, -1)) as masking:
                losses.append(token_losses(forced_logits(self.model, forced), forced.labels))
            fractions.append(masking["fraction"])
            mass = masking["mass"]  # the same at every rate
        chances = self.predictor(mass).softmax(-1)[..., order]
        # that this step, and each before it, picks at least a rate: [rows, steps, rates]
        reached = chances.flip(-1).cumsum(-1).flip(-1).cumprod(1)
        left = reached - nn.functional.pad(reached[..., 1:], (0, 1))
        counted = forced.labels != IGNORED
        shares = left * (counted / counted.sum(1, keepdim=True))[..., None]
        accuracy, compute = (
            (shares * torch.stack(each, -1)).sum((1, 2)).mean() for each in (losses, fractions)
        )
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
    vlm, data = load_frozen(config, vlm)
    model = vlm.model
    heads = cast(Any, decoder_of(model).config).num_attention_heads
    shape = {"heads": heads, "layer": config.layer, "rates": config.rates}
    predictor = seeded(lambda: RatePredictor(RateConfig(**shape)), config.seed)
    cast(nn.Module, predictor).to(model.device)
    forward = MaskedForward(model, predictor)

    def losses(step: int) -> dict[str, Tensor | float]:
        encoded, tokens, lengths = draw_questions(vlm, data, config, step)
        forced = force(model, reduce(encoded), tokens, lengths)
        if config.gradient == "all-rates":
            loss, accuracy, kept = forward.mean_loss(forced, config.weight)
            return {"loss": loss, "accuracy_loss": accuracy, "kept": kept}
        tau = temperature(step, config)
        noise = gumbel_noise(
            *forced.labels.shape, config.rates, generator=generator(config.seed, "noise", step)
        )
        loss, accuracy, kept = forward.loss(forced, config.weight, tau, noise.to(model.device))
        return {"loss": loss, "accuracy_loss": accuracy, "kept": kept, "tau": tau}

    records = run_steps(config, predictor, training_identity(config, model, data), losses)
    predictor.config.update(
        training_facts(config, data, records, "accuracy_loss", "kept")
        | {"model": vlm.name, "weight": config.weight, "gradient": config.gradient}
    )
    if config.out:
        predictor.cpu().save_pretrained(Path(config.out) / "dyrate")
    return predictor, records
