"""Choosing by the question: the language model reads the whole prompt once, and answers the shortened one."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokensel.data.features import Features
from tokensel.schedules.attention import chosen_rows
from tokensel.schedules.decoder import Attention, attention_of, decoder_of
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.reduce import Reduced, reduce

__all__ = ["asked", "question_attention"]


class _Known:
    """A scorer whose scores are known already, one for each token of each tile."""

    name, needs_cls_attention, scope, adaptive = "asked", False, "tile", False

    def __init__(self, scores: Float[Tensor, "tiles tokens"]):
        self.scores = scores

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        return self.scores


def asked(encoded: Encoded, keep: float | None, **choices: Any) -> Reduced:
    """Keep the visual tokens of each image that its question attends to.

    Methods inside the language model read this attention in one of its first layers, and pay for every token
    until there. Here all layers are read, and none of the answer's steps sees a dropped token; the price is
    a prefill of the whole prompt before that of the shortened one. What is saved is the cache, and the time
    of every step after the first: for long answers, many answers to one prompt, and further questions.

    Args:
        encoded: the batch.
        keep: fraction of the visual tokens to keep, in (0, 1].
        choices: see :class:`~tokensel.vlm.choose.Choices`. With ``neighbours=1`` or 2 the tokens beside those
            that the question attends to come along, which a value beside its name needs.

    Raises:
        TokenselError: as :func:`~tokensel.vlm.reduce.reduce`; a language model that is not in
            :data:`tokensel.schedules.decoder.MODELS`.
    """
    layout, full = encoded.layout, reduce(encoded)
    scores = torch.zeros(sum(layout.tiles) * layout.tokens)
    scores[layout.source[layout.cell]] = question_attention(encoded, full)[layout.cell]
    scorer = _Known(scores.view(-1, layout.tokens))
    reduced = reduce(encoded, scorer, keep, **choices)
    reduced.n_read = full.visual.sum(1).cpu()
    return reduced


@torch.no_grad()
def question_attention(encoded: Encoded, full: Reduced) -> Float[Tensor, "packed"]:
    """The attention of the text behind the image to each packed token, the mean over layers, heads and text.

    In a prompt whose image comes last, this is the text of the chat template that follows it, which has seen
    the question.

    Args:
        encoded: the batch.
        full: its prompt with nothing dropped.

    Returns:
        On the host, in packed order; 0 in a row without text behind its image.

    Raises:
        TokenselError: a language model that is not in :data:`tokensel.schedules.decoder.MODELS`.
    """
    decoder, real = decoder_of(encoded.model), full["attention_mask"].bool()
    # no visual token here nor further right; rows end together, so the longest question covers all
    behind = (full.visual.flip(1).cumsum(1).flip(1) == 0) & real
    longest = max(1, int(behind.sum(1).max()))
    first = real.shape[1] - longest
    queries = torch.arange(first, real.shape[1], device=real.device).expand(len(real), -1)
    share = behind[:, first:].float()
    share = share / share.sum(1, keepdim=True).clamp(min=1)  # [rows, queries]
    paid: list[Tensor] = []

    def record(attention: nn.Module, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
        hidden, rotation = kwargs["hidden_states"], kwargs["position_embeddings"]
        rows = chosen_rows(cast(Attention, attention), hidden, rotation, queries, real)
        paid.append(torch.einsum("rhql,rq->rl", rows, share.to(rows)) / rows.shape[1])

    modules = [attention_of(decoder, layer) for layer in range(len(decoder.layers))]
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    inputs = {name: full[name] for name in ("attention_mask", "position_ids") if name in full.inputs}
    try:
        decoder(**full.for_decoder, **inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(paid).mean(0)[full.visual].cpu()
