"""Run the vision tower of a LLaVA over a batch once, and score its tokens, without projecting any of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.errors import TokenselError
from tokensel.features import Features
from tokensel.scorers import Scorer
from tokensel.scorers.random import mix
from tokensel.tower import run_tower
from tokensel.vlm.layout import Layout, empty_layout, read_layout, real_tiles, tile_counts


@dataclass
class Encoded:
    """A processed batch after the vision tower: everything that does not depend on what is kept.

    Attributes:
        model: the model it was encoded with.
        input_ids, attention_mask: as the processor made them, a placeholder for every packed token.
        places: row and column in ``input_ids`` of each packed token.
        features: what the projector would be given, with CLS attention where the tower has a CLS token.
        layout: where each packed token comes from.
        pixel_values: the real tiles, for methods that look at the picture again.
        image_sizes: height and width of each image in pixels.
    """

    model: PreTrainedModel
    input_ids: Int[Tensor, "rows length"]
    attention_mask: Bool[Tensor, "rows length"]
    places: Int[Tensor, "packed 2"]
    features: Features
    layout: Layout
    pixel_values: Float[Tensor, "tiles 3 height width"] | None
    image_sizes: Int[Tensor, "images 2"] | None
    _scores: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n_visual(self) -> Int[Tensor, "rows"]:
        """Visual tokens of each row when nothing is dropped; newlines are not counted."""
        return self.per_row(self.layout.cell)

    @property
    def n_tiles(self) -> Int[Tensor, "rows"]:
        """Tiles of each row's images, the thumbnails among them."""
        counts = torch.zeros(len(self.input_ids), dtype=torch.long, device=self.input_ids.device)
        tiles = torch.as_tensor(self.layout.tiles, dtype=torch.long, device=counts.device)
        return counts.index_add(0, _row_of_image(self.layout, self.places), tiles)

    def per_row(self, packed: Bool[Tensor, "packed"]) -> Int[Tensor, "rows"]:
        """Count the True entries of a mask over packed tokens, row by row."""
        return torch.bincount(self.places[packed][:, 0], minlength=self.input_ids.shape[0])

    def score(self, scorer: Scorer) -> Float[Tensor, "packed"]:
        """Scores of the packed tokens (0 at newlines), computed once for each scorer.

        Raises:
            TokenselError: the scorer cannot read these features.
        """
        if scorer not in self._scores:
            self._scores[scorer] = self._score(scorer)
        return self._scores[scorer]

    def _score(self, scorer: Scorer) -> Tensor:
        cell, source = self.layout.cell, self.layout.source
        scores = self.features.tokens.new_zeros(len(source), dtype=torch.float32)
        if not bool(cell.any()):
            return scores
        if scorer.scope == "tile":
            return torch.where(cell, scorer(self.features).flatten()[source.clamp(min=0)].float(), scores)
        rows, slot, features = self.by_image()
        scores[cell] = scorer(features)[rows, slot].float()
        return scores

    def by_image(self) -> tuple[Int[Tensor, "cells"], Int[Tensor, "cells"], Features]:
        """The visual cells regrouped so that a row is an image: row and slot of each, and the features."""
        rows, slot, total = self.layout.slots
        source = self.layout.source[self.layout.cell]
        shape = (len(self.layout.tiles), int(total.max()))

        def regroup(flat: Tensor) -> Tensor:
            out = flat.new_zeros(*shape, *flat.shape[1:])
            out[rows, slot] = flat[source]
            return out

        tokens, attention, keys = self.features.tokens, self.features.cls_attention, self.features.keys
        first = torch.searchsorted(self.layout.image_of_tile, torch.arange(shape[0], device=rows.device))
        return (
            rows,
            slot,
            Features(
                tokens=regroup(tokens.flatten(0, 1)),
                valid=regroup(torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device).flatten()),
                cls_attention=None if attention is None else regroup(attention.flatten()),
                keys=None if keys is None else keys[first],
            ),
        )


def _row_of_image(layout: Layout, places: Int[Tensor, "packed 2"]) -> Int[Tensor, "images"]:
    """The row in which each image's first placeholder stands."""
    images = torch.arange(len(layout.tiles), device=places.device)
    return places[torch.searchsorted(layout.image, images), 0].contiguous()


def content_keys(pixel_values: Float[Tensor, "tiles 3 height width"]) -> Int[Tensor, "tiles"]:
    """A number for each tile that depends on its pixels alone: the same in every batch."""
    bits = pixel_values.float().contiguous().view(torch.int32)
    columns = bits.sum((1, 2), dtype=torch.long)  # [tiles, width], exact whatever the order of the sum
    return mix(columns, mix(torch.arange(columns.shape[1], device=columns.device))).sum(1)


def _tile_keys(
    layout: Layout,
    row_of_image: Int[Tensor, "images"],
    pixels: Float[Tensor, "tiles 3 height width"],
    keys: Int[Tensor, "rows"] | Sequence[int] | None,
) -> Int[Tensor, "tiles"]:
    """Key of every tile: its row's key, the number of the image in the row, that of the tile in the image."""
    of_tile = layout.image_of_tile
    first = torch.searchsorted(of_tile, torch.arange(len(layout.tiles), device=of_tile.device))
    tile = torch.arange(len(pixels), device=of_tile.device) - first[of_tile]
    if keys is None:
        images = content_keys(pixels)[first]
    else:
        of_row = torch.as_tensor(keys, dtype=torch.long, device=pixels.device)[row_of_image]
        nth = torch.arange(len(of_row), device=pixels.device) - torch.searchsorted(row_of_image, row_of_image)
        images = mix(of_row, nth)
    return mix(images[of_tile], tile)


@torch.no_grad()
def encode(
    model: PreTrainedModel, inputs: Mapping[str, Any], keys: Int[Tensor, "rows"] | Sequence[int] | None = None
) -> Encoded:
    """Run the vision tower over the images of a batch.

    The features are those that the model's own forward hands to its projector: same tiles, same layer, same
    rule about the CLS token. Rows without an image, with several, or no image at all are fine.

    Args:
        model: a LLaVA-NeXT, or a model that packs tiles as it does.
        inputs: what its processor returns: ``input_ids``, ``attention_mask`` and, where there are images,
            ``pixel_values`` and ``image_sizes``; on the model's device.
        keys: a stable number for each row, by which random selection draws; by default one is made from the
            pixels, so that a picture is treated alike in every batch.

    Raises:
        TokenselError: the model packs no tiles, the placeholders do not match the images, or keys and rows
            differ in number.
    """
    core, config = model.base_model, model.config
    if not hasattr(core, "pack_image_features"):
        raise TokenselError(f"{type(model).__name__} packs no image tiles: give a LLaVA-NeXT model")
    ids = inputs["input_ids"]
    mask = (
        inputs["attention_mask"].bool()
        if inputs.get("attention_mask") is not None
        else torch.ones_like(ids).bool()
    )
    if keys is not None and len(keys) != len(ids):
        raise TokenselError(f"{len(keys)} keys for {len(ids)} rows: give one for each row")
    places = ((ids == config.image_token_id) & mask).nonzero()
    vision, layers = config.vision_config, config.vision_feature_layer
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if pixels is None or len(pixels) == 0:
        tokens = (vision.image_size // vision.patch_size) ** 2
        width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
        features = Features(torch.zeros(0, tokens, width, dtype=model.dtype, device=ids.device))
        layout, pixels, sizes = empty_layout(tokens, ids.device), None, None
    else:
        counts = tile_counts(model, inputs)
        pixels = real_tiles(pixels, counts)
        drop_cls = config.vision_feature_select_strategy == "default"
        tokens, attention = run_tower(core.vision_tower, pixels, layers, drop_cls)
        features = Features(tokens, cls_attention=attention)
        layout = read_layout(core, counts, features.tokens.shape[1], sizes)
    if len(places) != len(layout.source):
        raise TokenselError(
            f"{len(places)} image placeholders in input_ids, but the images give {len(layout.source)} visual "
            "tokens: let the processor make both together"
        )
    if pixels is not None:
        row_of_image = _row_of_image(layout, places)
        if not torch.equal(row_of_image[layout.image], places[:, 0]):
            raise TokenselError(
                "the placeholders of one image stand in two rows: let the processor make the rows"
            )
        features.keys = _tile_keys(layout, row_of_image, pixels, keys)
    return Encoded(model, ids, mask, places, features, layout, pixels, sizes)
