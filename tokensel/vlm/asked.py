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
    reduced.n_read = torch.bincount(encoded.places[:, 0], minlength=len(encoded.input_ids))
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
    # counted on the host, where it makes nobody wait; rows of the prompt end together, at its last column
    mask, (row, column) = encoded.attention_mask, encoded.places.unbind(1)
    to_end = mask.flip(1).cumsum(1).flip(1)  # real tokens from here on
    visual = torch.zeros_like(mask).index_put_((row, column), torch.tensor(True))
    asking = (mask & (visual.flip(1).cumsum(1).flip(1) == 0)).sum(1)  # text behind the last image
    longest = max(1, int(asking.max()))
    share = (torch.arange(longest) >= longest - asking[:, None]).float() / asking.clamp(min=1)[:, None]
    queries = torch.arange(real.shape[1] - longest, real.shape[1]).expand(len(mask), -1)
    share = share.to(real.device)  # [rows, queries]
    columns = real.shape[1] - to_end[row, column]
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
    mean = torch.stack(paid).mean(0)
    return mean[row.to(mean.device), columns.to(mean.device)].cpu()
