"""Drop visual tokens from embeddings, mask and positions of a prompt; the stock model generates.

Nothing of the model is replaced. :func:`reduce_inputs` takes what the processor returns and returns what
``model.generate(**...)`` takes: embeddings of the prompt in which only the chosen visual tokens are left.
"""

import copy
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.schedules.prompt import Prompt
from tokensel.scorers import Scorer
from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.bias import check_read
from tokensel.vlm.choose import Choices
from tokensel.vlm.dropped import bias_columns, fill_dropped, packed_bias
from tokensel.vlm.encode import encode
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.layout import Layout
from tokensel.vlm.visual import choose_tokens, embed_tokens

__all__ = ["Reduced", "assemble", "reduce", "reduce_inputs"]


@dataclass(eq=False)
class Reduced(Mapping[str, Any]):
    """Inputs for ``model.generate(**reduced)``: embeddings, mask and, if they have gaps, position ids.

    There are no ``input_ids`` among them, so ``generate`` returns new tokens only. Gemma 3 and PaliGemma
    refuse embeddings: they are given ``input_ids``, which ``generate`` returns in front of the new tokens.

    It is a mapping of these inputs that also has the counts below. ``copy``, ``copy.copy`` and
    ``copy.deepcopy`` keep them; so does ``reduced | {...}``, which adds or replaces inputs (``{...} |
    reduced`` is a plain dictionary).

    Attributes:
        inputs: what ``generate`` is given, by name; on the device of the model's embeddings.
        visual: True in the prompt's columns that hold visual tokens: cells or newlines.
        newlines: True in those that hold newlines.
        thumbnail: True in those that hold cells of a thumbnail.
        n_visual: visual tokens that reach the language model, row by row; newlines are not counted. On the
            host, as are the other counts and ``kept``.
        n_visual_full: the same when nothing is dropped.
        n_newline: newlines that reach the language model.
        n_tiles: tiles that the tower reads for each row.
        cells: tokens that it makes of each tile.
        kept: True for the cells of each tile that are kept (``None`` where the tiles were encoded again at
            another size).
        grid: for a model without newlines the rows and columns of each tile, in tokens, row after row of the
            batch; else ``None``.
        tiles: for a model without newlines the tile of each column, see
            :class:`~tokensel.schedules.prompt.Prompt`; else ``None``.
        n_read: visual tokens, newlines among them, that the language model read once before this prompt, row
            by row, where the tokens were chosen by that; else ``None``.
        attn_bias: what every layer adds to the attention logits of each column, on the device of the
            embeddings; ``None`` where there is nothing to add. See :func:`~tokensel.vlm.bias.biased`.
    """

    inputs: dict[str, Any]
    visual: Bool[Tensor, "rows length"]
    newlines: Bool[Tensor, "rows length"]
    thumbnail: Bool[Tensor, "rows length"]
    n_visual: Int[Tensor, "rows"]
    n_visual_full: Int[Tensor, "rows"]
    n_newline: Int[Tensor, "rows"]
    n_tiles: Int[Tensor, "rows"]
    cells: int
    kept: Bool[Tensor, "tiles tokens"] | None = None
    tiles: Int[Tensor, "rows length 3"] | None = None
    grid: Int[Tensor, "tiles 2"] | None = None
    attn_bias: Float[Tensor, "rows length"] | None = None
    n_read: Int[Tensor, "rows"] | None = None

    def __getitem__(self, name: str) -> Any:
        value = self.inputs[name]
        if name == "mm_encoder_outputs":
            # generate repeats them in place for several sequences: each call gets an object of its own
            return {kind: copy.copy(outputs) for kind, outputs in value.items()}
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def keys(self) -> KeysView[str]:
        """The names of the inputs, which Python asks for when it unpacks ``**reduced``.

        Raises:
            TokenselError: the prompt has a bias, and is unpacked where nobody adds it.
        """
        check_read(self.attn_bias)
        return self.inputs.keys()

    def __or__(self, other: Mapping[str, Any]) -> "Reduced":
        return replace(self, inputs={**self.inputs, **other})

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self.inputs}

    def with_visual(self, visual: Float[Tensor, "visual width"]) -> "Reduced":
        """The same prompt with other embeddings at its visual columns, newlines among them; gradients pass.

        Args:
            visual: in packed order, which is that of the columns.
        """
        if "mm_encoder_outputs" not in self.inputs:
            return self | {"inputs_embeds": self._placed(visual)}
        outputs = self["mm_encoder_outputs"]  # copies, which may be changed
        sizes = [size for size in self.visual.sum(1).tolist() if size]
        outputs["image"].pooler_output = list(visual.split(sizes))
        return self | {"mm_encoder_outputs": outputs}

    def _placed(self, visual: Float[Tensor, "visual width"]) -> Float[Tensor, "rows length width"]:
        """The embeddings of the prompt with these at its visual columns."""
        embeds = self["inputs_embeds"]
        return embeds.masked_scatter(self.visual[..., None], visual.to(embeds))

    @property
    def for_decoder(self) -> dict[str, Any]:
        """What the language model itself reads, without the model around it.

        These are embeddings of the prompt with its visual tokens in place and, in Qwen3-VL, what is added to
        them after its first layers; mask and positions are those of this mapping.

        Raises:
            TokenselError: a model that makes more of its prompt than that.
        """
        if "inputs_embeds" not in self.inputs:
            raise TokenselError(
                "this model reads image tokens both ways, for which its language model alone has no input: "
                "use model.generate"
            )
        if "mm_encoder_outputs" not in self.inputs:
            return {"inputs_embeds": self["inputs_embeds"]}
        image = self.inputs["mm_encoder_outputs"]["image"]
        return {
            "inputs_embeds": self._placed(torch.cat(list(image.pooler_output))),
            "visual_pos_masks": self.visual,
            "deepstack_visual_embeds": [torch.cat(list(layer)) for layer in image.deepstack_features],
        }

    @property
    def prompt(self) -> Prompt:
        """What the columns hold, for :func:`tokensel.schedules.pruned`."""
        return Prompt(self["attention_mask"], self.visual, self.newlines, self.thumbnail, self.tiles)

    def copy(self) -> "Reduced":
        """The same tensors in a mapping of its own."""
        return replace(self, inputs=dict(self.inputs))

    __copy__ = copy


def assemble(
    encoded: Encoded,
    kept: Bool[Tensor, "packed"],
    visual: Float[Tensor, "kept width"],
    positions: str,
    cells: Bool[Tensor, "packed"] | None = None,
) -> tuple[
    dict[str, Any],
    Bool[Tensor, "rows length"],
    Bool[Tensor, "rows length"],
    Bool[Tensor, "rows length"],
]:
    """Build the shortened prompt: text and kept visual tokens in their old order, padded on the left.

    Args:
        encoded: the batch.
        kept: packed tokens that stay.
        visual: their embeddings, in packed order.
        positions: "compact" or "original".
        cells: packed tokens that are cells, the others being newlines; by default as the layout has it.

    Returns:
        Inputs for ``generate``, and the columns that hold visual tokens, newlines, and cells of a thumbnail.
    """
    stay = encoded.attention_mask.clone()
    stay[encoded.places[:, 0], encoded.places[:, 1]] = kept
    length = int(stay.sum(1).max())
    # A stable sort by "stays" moves dropped tokens and padding to the left and keeps all others in order.
    order = stay.to(torch.uint8).argsort(dim=1, stable=True)[:, stay.shape[1] - length :]
    mask = stay.gather(1, order)
    ids = encoded.input_ids.gather(1, order).masked_fill(~mask, _pad_id(encoded))
    slots = torch.isin(ids, encoded.family.placeholders(encoded.model.config)) & mask
    device = device_of(encoded.model.get_input_embeddings())
    out = encoded.family.place(encoded, ids, slots, visual, kept) | {
        # always given: without it, gaps in the positions would be read as several packed sequences
        "attention_mask": mask.long().to(device),
    }
    for name in encoded.family.carried:  # one value a column
        out[name] = encoded.extras[name].gather(1, order).masked_fill(~mask, 0).to(device)
    if (axes := encoded.positions) is not None:
        if positions == "compact":
            raise TokenselError(
                f"positions is 'compact': {encoded.family.name} gives a visual token its place in the image, "
                "and there is no compact one; use 'original'"
            )
        # always given: without them the model would read visual tokens as text
        out["position_ids"] = axes.gather(2, order.expand(len(axes), -1, -1)).to(device)
    elif positions == "original" and not bool(kept.all()):  # with nothing dropped the model makes them itself
        place = (encoded.attention_mask.long().cumsum(1) - 1).clamp(min=0)
        out["position_ids"] = place.gather(1, order).masked_fill(~mask, 0).to(device)
    # columns and packed tokens are both in the order of the prompts, so that one mask fills the other
    newlines, thumbnail = torch.zeros_like(slots), torch.zeros_like(slots)
    newlines[slots] = ~(encoded.layout.cell if cells is None else cells)[kept]
    thumbnail[slots] = encoded.layout.thumbnail[kept]
    return out, slots.to(device), newlines.to(device), thumbnail.to(device)


def _tile_columns(
    layout: Layout, kept: Bool[Tensor, "packed"], visual: Bool[Tensor, "rows length"]
) -> Int[Tensor, "rows length 3"] | None:
    """Number, rows and columns of the tile in each column of a shortened prompt; ``None`` with newlines."""
    if layout.grid is None:
        return None
    tile = layout.source[kept] // layout.tokens
    columns = torch.zeros(*visual.shape, 3, dtype=torch.long)
    columns[visual.cpu()] = torch.cat([tile[:, None] + 1, layout.grid[tile]], 1)
    return columns.to(visual.device)


def _pad_id(encoded: Encoded) -> int:
    """What stands at padding: the batch's own choice, so that an untouched batch stays what it was."""
    padding = encoded.input_ids[~encoded.attention_mask]
    if len(padding):
        return int(padding[0])
    generation: Any = encoded.model.generation_config
    return generation.pad_token_id or 0


@torch.no_grad()
def reduce(
    encoded: Encoded, scorer: Scorer | None = None, keep: float | None = 1.0, **choices: Any
) -> Reduced:
    """Keep the best visual tokens of each image of an encoded batch.

    The tower's work is in ``encoded`` and scores are remembered there, so that many scorers and budgets
    cost one encoding.

    Args:
        encoded: the batch, from :func:`~tokensel.vlm.encode.encode`.
        scorer: ranks the tokens; may be ``None`` when everything is kept.
        keep: fraction of the visual tokens of each image to keep, in (0, 1], newlines not counted; ``None``
            for as many as an adaptive scorer itself would keep, whatever the budget. With the budget
            "threshold" it is the fraction of an average image.
        choices: see :class:`~tokensel.vlm.choose.Choices`.

    Returns:
        Inputs for ``model.generate``, with the counts.

    Raises:
        TokenselError: ``keep`` outside (0, 1], an unknown choice, no scorer where one is needed, or a scorer
            that does not fit the features.
    """
    options = Choices.of(choices)
    layout = encoded.layout
    cells, kept = choose_tokens(encoded, scorer, keep, options)
    # tokens that stand in the prompt
    stands = kept if options.dropped == "removed" else torch.ones_like(kept)
    visual = embed_tokens(encoded, scorer, cells, stands)
    if options.dropped in ("blank", "copied"):
        visual = fill_dropped(encoded, cells, visual, options.dropped)
    bias = packed_bias(encoded, cells, kept, options)
    inputs, *marks = assemble(encoded, stands, visual, options.positions)
    return Reduced(
        inputs,
        *marks,
        n_visual=encoded.per_row(stands & layout.cell),
        n_visual_full=encoded.n_visual,
        n_newline=encoded.per_row(stands & ~layout.cell),
        n_tiles=encoded.n_tiles,
        cells=layout.tokens,
        kept=layout.spread(cells),
        tiles=_tile_columns(layout, stands, marks[0]),
        grid=layout.grid,
        attn_bias=None if bias is None else bias_columns(bias, stands, marks[0]),
    )


def reduce_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    scorer: Scorer | None = None,
    keep: float | None = 1.0,
    *,
    keys: Int[Tensor, "rows"] | Sequence[int] | None = None,
    **choices: Any,
) -> Reduced:
    """From the processor's output to inputs for ``model.generate`` with only the chosen visual tokens.

    >>> inputs = processor(images=image, text=prompt, return_tensors="pt")
    >>> model.generate(**reduce_inputs(model, inputs, make_scorer("selector", selector="folder"), keep=0.3))

    :func:`~tokensel.vlm.encode.encode` and :func:`reduce` in one; see there for the arguments.
    """
    return reduce(encode(model, inputs, keys), scorer, keep, **choices)
