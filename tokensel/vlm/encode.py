"""Find the visual tokens of a processed batch; the vision tower runs when its features are first needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, content_keys
from tokensel.vlm.families import family_of
from tokensel.vlm.families.base import host_tensor

__all__ = ["Encoded", "content_keys", "encode"]


@torch.no_grad()
def encode(
    model: PreTrainedModel, inputs: Mapping[str, Any], keys: Int[Tensor, "rows"] | Sequence[int] | None = None
) -> Encoded:
    """Find where the visual tokens of a batch are and which tiles they come from; the tower runs later.

    The features are those that the model's own forward hands to its projector: same tiles, same layer, same
    rule about the CLS token. Rows without an image, with several, or no image at all are fine.

    Args:
        model: a model of one of the families in :data:`tokensel.vlm.families.FAMILIES`.
        inputs: what its processor returns: ``input_ids``, ``attention_mask`` and, where there are images,
            ``pixel_values`` and what goes with them; tensors, arrays or lists, on any device. Qwen2-VL,
            Qwen2.5-VL and Qwen3-VL also take ``pixel_values_videos``: a clip is treated as one image whose
            tiles are its steps of time, each of two frames. The other families' videos that arrive as
            ``pixel_values`` (InternVL, SmolVLM) are images, one a frame.
        keys: a stable number for each row, the seed of its random selection; by default one is made from the
            pixels, so that an image is treated alike in every batch.

    Raises:
        TokenselError: a model of no known family, the inputs are incomplete or hold a video that the family
            cannot reduce, the placeholders do not match the images, or keys and rows differ in number.
    """
    family = family_of(model.config, type(model).__name__)
    family.check(model)
    if inputs.get("pixel_values_videos") is not None and not family.videos:
        raise TokenselError(
            f"videos cannot be reduced in {family.name}: give their frames as images, or the inputs to "
            "model.generate as they are"
        )
    # read on the host, and before the device is given anything to do: one short wait in place of many later
    ids, mask = (host_tensor(inputs, name) for name in ("input_ids", "attention_mask"))
    if ids is None or ids.dim() != 2 or not ids.numel():
        raise TokenselError("input_ids with at least one row are missing: pass what the processor returns")
    mask = torch.ones_like(ids).bool() if mask is None else mask.bool()
    if keys is not None:
        if len(keys) != len(ids):
            raise TokenselError(f"{len(keys)} keys for {len(ids)} rows: give one for each row")
        keys = torch.as_tensor(keys, dtype=torch.long).cpu()
    places = (torch.isin(ids, family.placeholders(model.config)) & mask).nonzero()
    located = family.locate(model, inputs, ids)
    layout = located.layout
    if len(places) != len(layout.source):
        raise TokenselError(
            f"{len(places)} image placeholders in input_ids, but the images give {len(layout.source)} visual "
            "tokens: let the processor make both together"
        )
    rows = places[:, 0]
    if bool((rows[1:] != rows[:-1])[layout.image[1:] == layout.image[:-1]].any()):
        raise TokenselError(
            "the placeholders of one image stand in two rows: let the processor make the rows"
        )
    return Encoded(
        model,
        ids,
        mask,
        places,
        layout,
        located.pixel_values,
        located.image_sizes,
        keys,
        family,
        located.extras,
    )
