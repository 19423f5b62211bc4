"""What becomes of dropped tokens: kept ones count for them, or something stands in their place.

The weights are a cure for what dropping does to attention, see :mod:`tokensel.vlm.bias`. What stands in the
place of dropped tokens saves nothing: it tells apart *why* answers change. Masked tokens show what is lost
with the content alone; a blank or a copy in each place adds nothing to the content of the kept ones, but
gives the language model the number of tokens and the positions that it was trained on.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokensel.schedules.decoder import decoder_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.choose import Choices
from tokensel.vlm.encoded import Encoded

__all__ = ["bias_columns", "fill_dropped", "nearest_kept", "packed_bias", "token_weights"]

_PART = 1024  # dropped tokens that are compared at a time, which bounds the memory on a page of 27,000


def _images(
    encoded: Encoded, kept: Bool[Tensor, "packed"]
) -> Iterator[tuple[Int[Tensor, "kept"], Int[Tensor, "dropped"]]]:
    """For each image the kept and the dropped cells, by their places among packed tokens."""
    layout = encoded.layout
    for number in range(len(layout.tiles)):
        own = (layout.image == number) & layout.cell
        yield (own & kept).nonzero()[:, 0], (own & ~kept).nonzero()[:, 0]


def nearest_kept(encoded: Encoded, kept: Bool[Tensor, "packed"]) -> Int[Tensor, "packed"]:
    """For each visual cell the kept cell of its image that is most like it, which for a kept one is itself.

    Likeness is the cosine of the tower's features, before the projector; of equals the first one wins.

    Args:
        encoded: the batch.
        kept: cells that stay; newlines may be marked or not.

    Returns:
        Places among packed tokens, on the host; the token's own at newlines, and in an image that keeps
        nothing.
    """
    nearest, tokens = torch.arange(len(kept)), encoded.features.tokens
    flat = tokens.flatten(0, 1)  # [tiles * tokens, channels]

    def unit(places: Int[Tensor, "some"]) -> Float[Tensor, "some channels"]:
        source = encoded.layout.source[places].to(flat.device)
        return nn.functional.normalize(flat[source].float(), dim=-1)

    for targets, dropped in _images(encoded, kept):
        if not len(targets):
            continue
        keys = unit(targets)
        for part in dropped.split(_PART):
            alike = unit(part) @ keys.T  # [dropped, targets]
            # argmax leaves open which of several maxima it names; the first True of a comparison is the first
            best = (alike == alike.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
            nearest[part] = targets[best.cpu()]
    return nearest


def token_weights(encoded: Encoded, kept: Bool[Tensor, "packed"]) -> Float[Tensor, "packed"]:
    """How many visual tokens each kept one stands for: itself, and the dropped ones of which it is nearest.

    The weights of an image's kept cells sum to the number of its cells.

    Args:
        encoded: the batch.
        kept: cells that stay; newlines may be marked or not.

    Returns:
        On the host; 1 at newlines and, where an image keeps nothing, everywhere; 0 at dropped cells.
    """
    return torch.bincount(nearest_kept(encoded, kept), minlength=len(kept)).float()


def packed_bias(
    encoded: Encoded, cells: Bool[Tensor, "packed"], kept: Bool[Tensor, "packed"], options: Choices
) -> Float[Tensor, "packed"] | None:
    """What is added to the attention logits of each packed token; ``None`` where that is nothing.

    Args:
        encoded: the batch.
        cells: cells that are kept.
        kept: these, and the newlines that stay with them.
        options: attention and its strength, and what becomes of dropped tokens.

    Returns:
        On the host; minus infinity where a token is masked. It means nothing where a token is removed.

    Raises:
        TokenselError: a language model that takes no bias, or attention that counts tokens twice.
    """
    bias = torch.zeros(len(kept))
    if options.attention != "plain":
        if options.dropped in ("blank", "copied"):
            raise TokenselError(
                f"attention is '{options.attention}' and dropped is '{options.dropped}': kept tokens count "
                "for dropped ones only where nothing stands in their place; leave one of the two out"
            )
        weights = torch.ones(len(kept))
        if options.attention == "proportional":
            weights = token_weights(encoded, cells)
        else:
            for stay, dropped in _images(encoded, cells):
                weights[stay] += len(dropped) / max(len(stay), 1)
        bias[cells] = options.strength * weights[cells].log()
    if options.dropped == "masked":
        bias[~kept] = -torch.inf
    if not bool(bias.any()):
        return None
    decoder_of(encoded.model)  # raises, here rather than when the answer is generated
    return bias


def bias_columns(
    bias: Float[Tensor, "packed"], stands: Bool[Tensor, "packed"], visual: Bool[Tensor, "rows length"]
) -> Float[Tensor, "rows length"]:
    """The bias of each column of a prompt, 0 at text, on the device of ``visual``.

    Args:
        bias: of each packed token.
        stands: packed tokens that are in the prompt.
        visual: the columns that hold them, in the same order.
    """
    columns = torch.zeros(visual.shape, device=visual.device)
    return columns.masked_scatter(visual, bias[stands].to(visual.device))


def fill_dropped(
    encoded: Encoded, cells: Bool[Tensor, "packed"], visual: Float[Tensor, "packed width"], dropped: str
) -> Float[Tensor, "packed width"]:
    """Embeddings of all visual tokens with something else in the place of dropped cells.

    Args:
        encoded: the batch.
        cells: cells that are kept.
        visual: embeddings of all packed tokens.
        dropped: "blank": the mean embedding of the dropped cells of the image, a blank where they show
            nothing but paper; "copied": the embedding of the kept cell that is most like it, or the blank in
            an image that keeps nothing.

    Raises:
        TokenselError: a model that also adds features to its tokens further on.
    """
    if encoded.layout.tiles and encoded.tower_output.deeper:
        raise TokenselError(
            f"dropped is '{dropped}': {encoded.family.name} adds features of a dropped token inside the "
            "language model, which would show it; use 'removed' or 'masked'"
        )
    nearest = nearest_kept(encoded, cells) if dropped == "copied" else None
    filled = visual.clone()
    for stay, gone in _images(encoded, cells):
        if not len(gone):
            continue
        places = gone.to(visual.device)
        if nearest is None or not len(stay):
            filled[places] = visual[places].float().mean(0).to(visual)
        else:
            filled[places] = visual[nearest[gone].to(visual.device)]
    return filled
