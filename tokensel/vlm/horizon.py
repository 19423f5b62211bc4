"""The horizon: how much the visual tokens still tell at each depth of the language model.

All visual tokens are withdrawn before one layer, for every layer in turn, and the probability of the right
answer is read. Beyond the layer where it stays what it was, the text has taken up what it needs of the image:
there VTW may withdraw the tokens, and there any choice of tokens is as good as a random one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.schedules import Prompt, Vtw, pruned
from tokensel.schedules.decoder import decoder_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.forced import Forced, force, forced_logits
from tokensel.vlm.model import Vlm, images_of_row
from tokensel.vlm.reduce import reduce_inputs

__all__ = ["Horizon", "measure_horizon"]


@dataclass(frozen=True)
class Horizon:
    """Probabilities of the right answers, the geometric mean over the tokens of each.

    Attributes:
        full: with all visual tokens in all layers.
        blind: to the question without its image.
        withdrawn: row i: without visual tokens from layer i + 1 on, layers counted from 0.
    """

    full: Float[np.ndarray, "questions"]
    blind: Float[np.ndarray, "questions"]
    withdrawn: Float[np.ndarray, "layers questions"]

    @property
    def told(self) -> Float[np.ndarray, "layers"]:
        """The part of what the image adds to the probability that the text holds at each layer from 1 on.

        1 where withdrawing the image costs nothing, 0 where it costs as much as having no image.

        Raises:
            TokenselError: the answers are not likelier with the image than without it.
        """
        adds = self.full.mean() - self.blind.mean()
        if not adds > 0:
            raise TokenselError(
                "the image does not make the right answers likelier: give questions that it decides"
            )
        return (self.withdrawn.mean(1) - self.blind.mean()) / adds

    def layer(self, share: float = 0.95) -> int | None:
        """The horizon: the first layer from which on withdrawal leaves ``share`` of what the image adds.

        ``None`` if even the last layer needs the image.
        """
        enough = [i for i in range(len(self.told)) if bool((self.told[i:] >= share).all())]
        return enough[0] + 1 if enough else None


@torch.no_grad()
def measure_horizon(
    vlm: Vlm, images: Sequence[Any], questions: Sequence[str], answers: Sequence[str]
) -> Horizon:
    """Measure the horizon on some questions, one after the other.

    The idea is that of the information horizon (Wang et al. 2025, arXiv 2512.07580), which withdraws single
    tokens. Here all go at once, as VTW withdraws them: a pass for each layer and question.

    Args:
        vlm: the model.
        images: for each question its image, or a list of several; see :meth:`Vlm.inputs`.
        questions: the users' turns; the chat template is put around them.
        answers: the right answer to each.

    Raises:
        TokenselError: no questions, or other numbers of images and answers.
    """
    if not questions or not len(images) == len(questions) == len(answers):
        raise TokenselError(
            f"{len(images)} images, {len(questions)} questions, {len(answers)} answers: give at least one, "
            "and as many of each"
        )
    depth = len(decoder_of(vlm.model).layers)
    full, blind, withdrawn = [], [], []
    for image, question, answer in zip(images, questions, answers):
        seeing = _forced(vlm, image, question, answer)
        full.append(_likelihood(vlm, seeing))
        blind.append(_likelihood(vlm, _forced(vlm, None, question, answer)))
        withdrawn.append([_likelihood(vlm, seeing, layer) for layer in range(1, depth)])
    return Horizon(np.array(full), np.array(blind), np.array(withdrawn).T)


def _forced(vlm: Vlm, image: Any, question: str, answer: str) -> Forced:
    """One prompt, with its image or without, followed by the answer and the end token."""
    places = len(images_of_row(image))
    inputs = vlm.inputs([image] if places else None, [vlm.prompt(question, places)])
    tokenizer, device = vlm.processor.tokenizer, vlm.model.device
    ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    tokens = torch.tensor([ids], device=device)
    reduced = reduce_inputs(vlm.model, inputs)
    return force(vlm.model, reduced, tokens, torch.tensor([len(ids)], device=device))


def _likelihood(vlm: Vlm, forced: Forced, layer: int | None = None) -> float:
    """Probability of the answer's tokens, their geometric mean; without visual tokens from ``layer`` on."""
    if layer is None:
        logits = forced_logits(vlm.model, forced)
    else:
        mask = forced.inputs["attention_mask"]
        # the whole pass is the prompt here, its answer text; newlines are visual tokens, which all go
        visual = torch.zeros_like(mask, dtype=torch.bool)
        visual[:, : forced.visual.shape[1]] = forced.visual
        with pruned(vlm.model, Prompt(mask, visual), Vtw(layer)):
            logits = forced_logits(vlm.model, forced)
    chosen: Tensor = logits.log_softmax(-1).gather(-1, forced.labels[..., None])
    return float(chosen.mean().exp())
