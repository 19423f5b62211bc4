"""Teacher forcing: an answer that is known already, read after its prompt in one pass."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.schedules.attention import PADDING, RESPONSE, last_rows, token_types, type_mass
from tokensel.schedules.decoder import Attention, attention_of, decoder_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.bias import biased
from tokensel.vlm.reduce import Reduced

__all__ = ["IGNORED", "Forced", "answer_mass", "force", "forced_logits"]

IGNORED = -100  # label that no loss counts


@dataclass
class Forced:
    """Prompts followed by their answers, for the language model without its head.

    A generation step is a column: the last of the prompt is step 0, which predicts the first token of the
    answer.

    Attributes:
        inputs: embeddings, mask and positions of prompt and answer; the answer's last token is never read.
            With Qwen3-VL also what is added to visual tokens after its first layers.
        visual: True at the prompt's visual tokens, newlines among them.
        cells: True at its visual tokens without newlines, which is what a rate counts.
        types: of each column, see :data:`~tokensel.schedules.attention.TYPES`; -1 at padding.
        attn_mask: for each step, True at the columns that its token may attend to.
        labels: the token to predict at each step, ``IGNORED`` after a row's end.
        attn_bias: of the prompt's columns, see :class:`~tokensel.vlm.reduce.Reduced`.
    """

    inputs: dict[str, Any]
    visual: Bool[Tensor, "rows prompt"]
    cells: Bool[Tensor, "rows prompt"]
    types: Int[Tensor, "rows columns"]
    attn_mask: Bool[Tensor, "rows steps columns"]
    labels: Int[Tensor, "rows steps"]
    attn_bias: Float[Tensor, "rows prompt"] | None = None

    @property
    def steps(self) -> int:
        """Generation steps of the longest answer."""
        return self.labels.shape[1]


def force(
    model: PreTrainedModel, reduced: Reduced, tokens: Int[Tensor, "rows steps"], lengths: Int[Tensor, "rows"]
) -> Forced:
    """Append answers to their prompts.

    Args:
        model: the vision-language model.
        reduced: the prompts.
        tokens: the answers, their end tokens included, as ``generate`` returns them.
        lengths: tokens of each answer; what follows them is ignored.
    """
    step = torch.arange(tokens.shape[1], device=tokens.device)
    labelled = step < lengths[:, None]
    read = labelled[:, 1:]  # a token is read if another follows
    prompt, mask = reduced["attention_mask"], torch.cat([reduced["attention_mask"], read.long()], 1)
    # without gaps the positions count the real tokens; padding before them gets 0
    positions = reduced.get("position_ids", (prompt.cumsum(1) - 1).clamp(min=0))
    # all axes of M-RoPE go on together, as the last token of a prompt is text
    positions = torch.cat([positions, positions[..., -1:] + 1 + step[:-1]], -1)
    answers = model.get_input_embeddings()(tokens[:, :-1])
    read_by_decoder = reduced.for_decoder
    embeds = read_by_decoder["inputs_embeds"]
    embeds = torch.cat([embeds, answers.to(embeds)], 1)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    if (marks := read_by_decoder.get("visual_pos_masks")) is not None:
        # no token of an answer is visual
        read_by_decoder["visual_pos_masks"] = torch.cat([marks, torch.zeros_like(read).bool()], 1)
    response = torch.where(read, RESPONSE, PADDING)
    column = torch.arange(mask.shape[1], device=mask.device)
    causal = column <= prompt.shape[1] - 1 + step[:, None]  # [steps, columns]
    return Forced(
        inputs=read_by_decoder | inputs,
        visual=reduced.visual,
        cells=reduced.prompt.cells,
        types=torch.cat([token_types(reduced.visual, prompt.bool()), response], 1),
        attn_mask=causal & mask.bool()[:, None],
        labels=tokens.masked_fill(~labelled, IGNORED),
        attn_bias=reduced.attn_bias,
    )


def forced_logits(model: PreTrainedModel, forced: Forced) -> Float[Tensor, "rows steps vocabulary"]:
    """Logits of every step of the answers, in single precision; gradients pass.

    Args:
        model: the vision-language model.
        forced: prompts and answers.

    Raises:
        TokenselError: a language model that is not in :data:`tokensel.schedules.decoder.MODELS`.
    """
    with biased(model, forced.attn_bias):
        states = decoder_of(model)(**forced.inputs, use_cache=False).last_hidden_state
    head = cast(nn.Module, model.get_output_embeddings())
    return head(states[:, -forced.steps :]).float()


@torch.no_grad()
def answer_mass(model: PreTrainedModel, forced: Forced) -> Float[Tensor, "layers rows steps heads types"]:
    """How every layer's attention is shared among the types of tokens during an answer, with nothing dropped.

    Args:
        model: the vision-language model.
        forced: prompts and answers. After a row's end the values mean nothing; ``forced.labels`` tells where
            that is.

    Raises:
        TokenselError: a language model that is not in :data:`tokensel.schedules.decoder.MODELS`, or prompts
            with a bias, which this attention is computed without.
    """
    if forced.attn_bias is not None:
        raise TokenselError("prompts with a bias: give them with attention 'plain' and dropped 'removed'")
    decoder = decoder_of(model)
    masses: list[Tensor] = []

    def record(attention: nn.Module, _args: tuple, kwargs: dict[str, Any], _out: Any) -> None:
        hidden, rotation = kwargs["hidden_states"], kwargs["position_embeddings"]
        rows = last_rows(cast(Attention, attention), hidden, rotation, None, forced.attn_mask)
        masses.append(type_mass(rows, forced.types))

    modules = [attention_of(decoder, layer) for layer in range(len(decoder.layers))]
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        decoder(**forced.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(masses)
