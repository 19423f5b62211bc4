"""A shortened prompt as embeddings, for an engine that takes them in place of a text.

Vision tower, projector and scorer run here, and the engine runs the language model, which it loads as a text
model. vLLM takes embeddings in ``{"prompt_embeds": row}`` from Python and, if it was started with
``--enable-prompt-embeds``, in the field ``prompt_embeds`` of ``/v1/completions``, as
:func:`embeddings_field` makes it. That option is for clients one trusts.

There is no field for positions: an engine counts them from 0 without gaps. So the prompt is that of
``reduce_inputs(..., positions="compact")``, whose answers may differ from those of "original", the default
elsewhere. Models that read more than embeddings do not fit: Qwen's, whose positions have three axes, and
Gemma 3 and PaliGemma, which read image tokens both ways.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.scorers import Scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encode import encode
from tokensel.vlm.reduce import reduce

__all__ = ["embeddings_field", "prompt_embeddings"]


def prompt_embeddings(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    scorer: Scorer | None = None,
    keep: float | None = 1.0,
    *,
    keys: Int[Tensor, "rows"] | Sequence[int] | None = None,
    **choices: Any,
) -> list[Float[Tensor, "length width"]]:
    """The shortened prompt of each row as embeddings: text and kept visual tokens in their order, no padding.

    >>> inputs = vlm.inputs([image], [vlm.prompt("What is this?")])
    >>> (row,) = prompt_embeddings(vlm.model, inputs, make_scorer("norm"), keep=0.3)

    Args:
        model: the vision-language model.
        inputs: what its processor returned.
        scorer, keep, keys: as for :func:`~tokensel.vlm.reduce.reduce_inputs`.
        choices: see :class:`~tokensel.vlm.choose.Choices`; positions are compact, attention is plain.

    Returns:
        A tensor for each row, on the device of the model's embeddings and in their precision, which has to be
        that of the engine.

    Raises:
        TokenselError: a model or a choice that embeddings cannot serve, or what ``reduce_inputs`` refuses.
    """
    for name, served in (("positions", "compact"), ("attention", "plain"), ("dropped", "removed")):
        if choices.setdefault(name, served) != served:
            raise TokenselError(
                f"{name} is {choices[name]!r}, which embeddings cannot pass on: give {served!r}, or leave it "
                "out"
            )
    encoded = encode(model, inputs, keys)
    if encoded.positions is not None:
        raise TokenselError(
            f"{encoded.family.name} gives a visual token its place in the image, which embeddings cannot "
            "pass on: serve it with its own class"
        )
    reduced = reduce(encoded, scorer, keep, **choices)
    if more := {*reduced} - {"inputs_embeds", "attention_mask"}:
        raise TokenselError(
            f"{encoded.family.name} reads {', '.join(sorted(more))} besides embeddings, or in their place: "
            "serve it with its own class"
        )
    real = reduced["attention_mask"].bool()  # False at the padding
    return [row[columns] for row, columns in zip(reduced["inputs_embeds"], real)]


def embeddings_field(row: Float[Tensor, "length width"]) -> str:
    """One prompt as vLLM reads it from a request: base64 of what ``torch.save`` writes.

    Args:
        row: an entry of :func:`prompt_embeddings`.
    """
    file = io.BytesIO()
    # a copy: torch.save writes the whole storage behind a view, which may hold the prompts of others
    torch.save(row.detach().cpu().clone(), file)
    return base64.b64encode(file.getvalue()).decode("ascii")
