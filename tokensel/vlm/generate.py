"""Generate answers from a reduced prompt, with or without a schedule inside the language model."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokensel.schedules.prune import Pruning, pruned
from tokensel.schedules.schedule import Schedule, check_options
from tokensel.vlm.reduce import Reduced

__all__ = ["GenerationOutput", "generate"]


@dataclass
class GenerationOutput:
    """The generated text of a batch.

    Attributes:
        texts: one a row, without special tokens.
        tokens: the same as the model put it out, with its end token and the padding behind it.
        lengths: how many tokens each row really has, its end token included.
        pruning: what the schedule did, if there was one.
    """

    texts: list[str]
    tokens: Int[Tensor, "rows new"]
    lengths: Int[Tensor, "rows"]
    pruning: Pruning | None = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reduced: Reduced,
    max_new_tokens: int = 64,
    schedule: Schedule | None = None,
    **options: Any,
) -> GenerationOutput:
    """Generate an answer for each row of a reduced prompt; greedy by default.

    Args:
        model: the vision-language model.
        tokenizer: decodes the generated tokens.
        reduced: the prompts.
        max_new_tokens: where to stop at the latest.
        schedule: drops further visual tokens inside the language model, see :mod:`tokensel.schedules`.
        options: for ``model.generate``.

    Raises:
        TokenselError: options under which a schedule cannot work, or a schedule that does not fit the model.
    """
    options = {"do_sample": False} | options
    inside = nullcontext()
    if schedule is not None:
        check_options(options)
        inside = pruned(model, reduced.visual, reduced["attention_mask"], schedule)
    with inside as pruning:
        tokens = cast(Any, model).generate(**reduced, max_new_tokens=max_new_tokens, **options)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = torch.as_tensor(
        model.generation_config.eos_token_id or [], dtype=tokens.dtype, device=tokens.device
    )
    ended = torch.isin(tokens, ends).long().cumsum(1)
    lengths = (ended - torch.isin(tokens, ends).long() == 0).sum(1)  # up to the first end and with it
    return GenerationOutput([text.strip() for text in texts], tokens, lengths, pruning)
