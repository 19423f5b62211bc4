"""An answer that is known already, read behind its prompt in one pass (teacher forcing)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.schedules.attention import RESPONSE, last_rows, token_types, type_mass
from tokensel.schedules.prune import decoder_of
from tokensel.vlm.reduce import Reduced

IGNORED = -100  # label that no loss counts


@dataclass
class Forced:
    """Prompts with their answers behind them, for the language model without its head.

    A generation step is a column: the last of the prompt is step 0, which says the first token of the answer.

    Attributes:
        inputs: embeddings, mask and positions of prompt and answer; the answer's last token is never read.
        visual: True at the prompt's visual tokens, newlines among them.
        types: of each column, see :data:`~tokensel.schedules.attention.TYPES`; -1 at padding.
        seen: for each step the columns that its token may look at.
        labels: what is said at each step, ``IGNORED`` behind a row's end.
    """

    inputs: dict[str, Tensor]
    visual: Bool[Tensor, "rows prompt"]
    types: Int[Tensor, "rows columns"]
    seen: Bool[Tensor, "rows steps columns"]
    labels: Int[Tensor, "rows steps"]

    @property
    def steps(self) -> int:
        """Generation steps of the longest answer."""
        return self.labels.shape[1]


def force(
    model: PreTrainedModel, reduced: Reduced, tokens: Int[Tensor, "rows steps"], lengths: Int[Tensor, "rows"]
) -> Forced:
    """Put answers behind their prompts.

    Args:
        model: the LLaVA.
        reduced: the prompts.
        tokens: the answers, their ends included, as ``generate`` puts them out.
        lengths: tokens of each answer; what stands behind is ignored.
    """
    step = torch.arange(tokens.shape[1], device=tokens.device)
    said = step < lengths[:, None]
    read = said[:, 1:]  # a token is read if another follows
    prompt, mask = reduced["attention_mask"], torch.cat([reduced["attention_mask"], read.long()], 1)
    positions = reduced.get("position_ids", (prompt.cumsum(1) - 1).clamp(min=0))
    positions = torch.cat([positions, positions[:, -1:] + 1 + step[:-1]], 1)
    answers = model.get_input_embeddings()(tokens[:, :-1])
    embeds = torch.cat([reduced["inputs_embeds"], answers.to(reduced["inputs_embeds"])], 1)
    response = torch.where(read, RESPONSE, -1)
    column = torch.arange(mask.shape[1], device=mask.device)
    upto = column <= prompt.shape[1] - 1 + step[:, None]  # [steps, columns]
    return Forced(
        inputs={"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions},
        visual=reduced.visual,
        types=torch.cat([token_types(reduced.visual, prompt.bool()), response], 1),
        seen=upto & mask.bool()[:, None],
        labels=tokens.masked_fill(~said, IGNORED),
    )


@torch.no_grad()
def answer_mass(model: PreTrainedModel, forced: Forced) -> Float[Tensor, "layers rows steps heads types"]:
    """How every layer's attention is shared among the types of tokens while an answer is written, nothing being dropped.

    Args:
        model: the LLaVA.
        forced: prompts and answers. Behind a row's end the figures mean nothing; ``forced.labels`` tells where that is.
    """
    decoder, found = decoder_of(model), []

    def look(attention: nn.Module, _args: tuple, kwargs: dict, _out: object) -> None:
        rows = last_rows(attention, kwargs["hidden_states"], kwargs["position_embeddings"], None, forced.seen)
        found.append(type_mass(rows, forced.types))

    hooks = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in decoder.layers]
    try:
        decoder(**forced.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
