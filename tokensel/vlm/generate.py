"""Generate answers from a reduced prompt, with or without a schedule inside the language model."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from tokensel.schedules.decoder import decoder_of
from tokensel.schedules.options import check_options, check_window
from tokensel.schedules.prune import Pruning, pruned
from tokensel.schedules.schedule import Schedule
from tokensel.utils.errors import TokenselError, check_count
from tokensel.vlm.bias import biased
from tokensel.vlm.reduce import Reduced

__all__ = ["GenerationOutput", "generate"]

# what a checkpoint may set otherwise; an answer is the likeliest token at each step unless the call asks for
# more
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}

# options of generate that read the prompt's token ids, of which a reduced prompt has none
UNSUPPORTED = {
    "guidance_scale": "guidance needs a second prompt",
    "prefill_chunk_size": "the prefill is cut into chunks of ids",
    "assistant_model": "the assistant reads the prompt's ids",
    "assistant_early_exit": "the assistant reads the prompt's ids",
    "token_healing": "it changes the prompt's ids",
    "input_ids": "the prompt is in the reduced inputs",
    "inputs": "the prompt is in the reduced inputs",
    "inputs_embeds": "the prompt is in the reduced inputs",
    "attention_mask": "it is in the reduced inputs",
    "position_ids": "they are in the reduced inputs",
}
HARMLESS = {"guidance_scale": 1, "token_healing": False}


@dataclass
class GenerationOutput:
    """The generated text of a batch; ``num_return_sequences`` rows for each prompt, one after the other.

    Attributes:
        texts: one a row, without special tokens.
        tokens: the same as the model put it out, with its end token and the padding behind it.
        lengths: how many tokens each row really has, its end token included.
        pruning: what the schedule did, if there was one.
        model_output: all that ``model.generate`` returned, if ``return_dict_in_generate`` was asked for.
    """

    texts: list[str]
    tokens: Int[Tensor, "rows new"]
    lengths: Int[Tensor, "rows"]
    pruning: Pruning | None = None
    model_output: ModelOutput | None = None


class _Options:
    """The options of one call of ``generate``, and what the checkpoint sets where the call does not."""

    def __init__(self, model: PreTrainedModel, max_new_tokens: int, options: dict[str, Any]):
        given = options.pop("generation_config", None)
        self.config: GenerationConfig = copy.deepcopy(given) or GenerationConfig()
        unset = {name: value for name, value in GREEDY.items() if getattr(self.config, name) is None}
        # update() validates, and returns what the configuration does not have: arguments for the model and
        # others
        self.other: dict[str, Any] = self.config.update(
            **{**unset, **options, "max_new_tokens": max_new_tokens}
        )
        self.checkpoint = cast(GenerationConfig, model.generation_config)

    def effective(self, name: str) -> Any:
        """The value of an option; ``None`` where neither call nor checkpoint sets it."""
        if self.other.get(name) is not None:
            return self.other[name]
        own = getattr(self.config, name, None)
        return getattr(self.checkpoint, name, None) if own is None else own

    def check(self) -> None:
        """Raise on options that need the prompt's token ids.

        Raises:
            TokenselError: one of them is given, or set by the checkpoint.
        """
        for name, why in UNSUPPORTED.items():
            value = self.effective(name)
            if value is not None and value != HARMLESS.get(name):
                raise TokenselError(f"{name} was given, or set by the checkpoint: {why}; leave it out")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reduced: Reduced,
    max_new_tokens: int = 64,
    schedule: Schedule | None = None,
    **options: Any,
) -> GenerationOutput:
    """Generate an answer for each row of a reduced prompt; greedy unless ``options`` ask for more.

    Args:
        model: the vision-language model.
        tokenizer: decodes the generated tokens.
        reduced: the prompts.
        max_new_tokens: the most tokens to generate.
        schedule: drops further visual tokens inside the language model, see :mod:`tokensel.schedules`.
        options: for ``model.generate``.

    Raises:
        TokenselError: options under which a reduced prompt or a schedule cannot work, whether they come from
            the call or from the checkpoint; a schedule that does not fit the model, or a prompt with a bias.
    """
    given = _Options(model, check_count("max_new_tokens", max_new_tokens, 64), options)
    given.check()
    context = nullcontext()
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TokenselError(f"schedule is {schedule!r}: make one with make_schedule()")
    if schedule is not None and reduced.attn_bias is not None:
        raise TokenselError(
            f"{schedule.name} drops tokens inside the model, which moves the columns of this prompt's bias: "
            "give attention='plain' and dropped='removed', or no schedule"
        )
    if schedule is not None:
        check_options(given.effective)
        prompt = reduced.prompt
        check_window(schedule.name, decoder_of(model), prompt.visual.shape[1], max_new_tokens)
        context = pruned(model, prompt, schedule)
    with context as pruning, biased(model, reduced.attn_bias):
        result: Any = cast(Any, model).generate(**reduced, generation_config=given.config, **given.other)
    whole = result if isinstance(result, ModelOutput) else None
    tokens = cast(Tensor, result if whole is None else whole["sequences"])
    if "input_ids" in reduced:  # then the prompt comes first
        tokens = tokens[:, reduced["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = torch.as_tensor(given.effective("eos_token_id") or [], dtype=tokens.dtype, device=tokens.device)
    is_end = torch.isin(tokens, ends).long()
    lengths = (is_end.cumsum(1) - is_end == 0).sum(1)  # up to the first end token and with it
    return GenerationOutput([text.strip() for text in texts], tokens, lengths, pruning, whole)
