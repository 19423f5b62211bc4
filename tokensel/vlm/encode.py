"""Run the vision tower of a LLaVA over a batch at most once and score its tokens, without projecting them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.data.features import Features, feature_width
from tokensel.data.tower import run_tower
from tokensel.scorers import Scorer
from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.utils.hashing import mix
from tokensel.vlm.layout import Layout, empty_layout, read_layout, real_tiles, tile_counts

__all__ = ["Encoded", "check_model", "content_keys", "encode"]


@dataclass
class Encoded:
    """A processed batch as the adapter sees it: everything that does not depend on what is kept.

    Pixels and features are on the model's device. Layouts and masks, a few thousand whole numbers, are on the
    host, so that choosing and assembling never wait for the device: only the scores are copied from it.

    Attributes:
        model: the model that it was encoded with.
        input_ids, attention_mask: as the processor made them, a placeholder for every packed token.
        places: row and column in ``input_ids`` of each packed token.
        layout: where each packed token comes from.
        pixel_values: the real tiles, for the tower and for methods that encode the image again.
        image_sizes: height and width of each image in pixels.
        keys: a stable number for each row, the seed of its random selection; ``None`` to make one from the
            pixels.
    """

    model: PreTrainedModel
    input_ids: Int[Tensor, "rows length"]
    attention_mask: Bool[Tensor, "rows length"]
    places: Int[Tensor, "packed 2"]
    layout: Layout
    pixel_values: Float[Tensor, "tiles 3 height width"] | None
    image_sizes: Int[Tensor, "images 2"] | None
    keys: Int[Tensor, "rows"] | None = None
    _scores: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def core(self) -> Any:
        """The model without its language head: vision tower, projector, newline, language model."""
        return self.model.base_model

    @cached_property
    def _tower_output(self) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """Features of all tiles, and what computes their CLS attention; the tower runs here, and once."""
        config = self.model.config
        if self.pixel_values is None:
            width = feature_width(config.vision_config, config.vision_feature_layer)
            shape = (0, self.layout.tokens, width)
            return torch.zeros(shape, dtype=self.model.dtype, device=self.model.device), None
        drop_cls = config.vision_feature_select_strategy == "default"
        return run_tower(self.core.vision_tower, self.pixel_values, config.vision_feature_layer, drop_cls)

    @cached_property
    def features(self) -> Features:
        """What the projector would be given; without CLS attention, which is :attr:`cls_attention`."""
        tokens, _ = self._tower_output
        if self.pixel_values is None:
            return Features(tokens)
        rows = _row_of_image(self.layout, self.places)
        return Features(tokens, keys=_tile_keys(self.layout, rows, self.pixel_values, self.keys))

    @cached_property
    def cls_attention(self) -> Float[Tensor, "tiles tokens"] | None:
        """The CLS token's attention to each token, computed on first use; ``None`` without a CLS token."""
        _, attention = self._tower_output
        return None if attention is None else attention()

    @property
    def n_visual(self) -> Int[Tensor, "rows"]:
        """Visual tokens of each row when nothing is dropped; newlines are not counted."""
        return self.per_row(self.layout.cell)

    @property
    def n_tiles(self) -> Int[Tensor, "rows"]:
        """Tiles of each row's images, the thumbnails among them."""
        tiles = torch.tensor(self.layout.tiles, dtype=torch.long)
        return torch.zeros(len(self.input_ids), dtype=torch.long).index_add(
            0, _row_of_image(self.layout, self.places), tiles
        )

    def per_row(self, packed: Bool[Tensor, "packed"]) -> Int[Tensor, "rows"]:
        """Count the True entries of a mask over packed tokens, row by row."""
        return torch.bincount(self.places[packed][:, 0], minlength=self.input_ids.shape[0])

    def score(self, scorer: Scorer) -> Float[Tensor, "packed"]:
        """Scores of the packed tokens (0 at newlines), on the host, computed once for each scorer.

        Raises:
            TokenselError: the scorer cannot read these features.
        """
        if not callable(scorer):
            raise TokenselError(f"scorer is {scorer!r}: pass a scorer, such as make_scorer({str(scorer)!r})")
        if scorer not in self._scores:
            if (check := getattr(scorer, "check_model", None)) is not None:
                check(self.model.config)
            self._scores[scorer] = self._score(scorer)
        return self._scores[scorer]

    def _score(self, scorer: Scorer) -> Tensor:
        cell, source = self.layout.cell, self.layout.source
        scores = torch.zeros(len(source))
        if not bool(cell.any()):
            return scores
        features = self.features
        if scorer.needs_cls_attention:
            features = replace(features, cls_attention=self.cls_attention)
        if getattr(scorer, "needs_question", False):
            features = replace(features, relevance=self.relevance)
        if scorer.scope == "tile":
            scores[cell] = scorer(features).float().cpu().flatten()[source[cell]]
        else:
            rows, slot, by_image = self.by_image(features)
            scores[cell] = scorer(by_image).float().cpu()[rows, slot]
        return scores

    @cached_property
    def relevance(self) -> Float[Tensor, "tiles tokens"]:
        """Cosine of each projected token with the words of its question, averaged over words.

        The words are the text after the last image of a row, the template included, as their embeddings enter
        the language model; where there is none, all text of the row.
        """
        image = (self.input_ids == self.model.config.image_token_id) & self.attention_mask
        text = self.attention_mask & ~image
        after = text & (image.flip(1).cumsum(1).flip(1) == 0)
        words = torch.where(after.any(1, keepdim=True), after, text)
        embedding: Any = self.model.get_input_embeddings()
        states = embedding(self.input_ids.to(device_of(embedding))).float()
        unit = torch.nn.functional.normalize(states, dim=-1)
        share = (words / words.sum(1, keepdim=True).clamp(min=1)).to(unit)
        question = torch.einsum("rlw,rl->rw", unit, share)  # mean of unit vectors
        tokens = self.features.tokens.to(device_of(self.core.multi_modal_projector))
        projected = torch.nn.functional.normalize(self.core.multi_modal_projector(tokens).float(), dim=-1)
        row = _row_of_image(self.layout, self.places)[self.layout.image_of_tile]
        return torch.einsum("ntw,nw->nt", projected, question[row.to(question.device)].to(projected))

    def merged(self, scorer: Any, kept: Bool[Tensor, "packed"]) -> Float[Tensor, "tiles tokens channels"]:
        """The features when a scorer with a method ``merge`` has merged the dropped tokens into ``kept``."""
        features, layout = self.features, self.layout
        if scorer.needs_cls_attention:
            features = replace(features, cls_attention=self.cls_attention)
        device = features.tokens.device
        if scorer.scope == "tile":
            masks = (layout.spread(kept).to(device), layout.valid.to(device))
            return scorer.merge(replace(features, valid=masks[1]), masks[0])
        rows, slot, by_image = self.by_image(features)
        mask = torch.zeros(by_image.tokens.shape[:2], dtype=torch.bool)
        mask[rows, slot] = kept[layout.cell]
        merged = scorer.merge(by_image, mask.to(device)).flatten(0, 1)
        place = (rows * by_image.tokens.shape[1] + slot).to(device)
        source = layout.source[layout.cell].to(device)
        flat = features.tokens.flatten(0, 1).index_copy(0, source, merged[place])
        return flat.view_as(features.tokens)

    def by_image(
        self, features: Features | None = None
    ) -> tuple[Int[Tensor, "cells"], Int[Tensor, "cells"], Features]:
        """The visual cells with one row for each image, padded: row and slot of each, and the features.

        Args:
            features: by tile; those of :attr:`features` by default.
        """
        features = self.features if features is None else features
        rows, slot, total = self.layout.slots
        images, longest = len(self.layout.tiles), int(total.max())
        device = features.tokens.device
        source = self.layout.source[self.layout.cell].to(device)
        to = (rows * longest + slot).to(device)  # place of each cell in the flattened [images * longest]

        def regroup(by_tile: Tensor) -> Tensor:
            flat = by_tile.flatten(0, 1)  # [tiles * tokens, ...]
            out = flat.new_zeros(images * longest, *flat.shape[1:])
            return out.index_copy_(0, to, flat[source]).unflatten(0, (images, longest))

        first = torch.searchsorted(self.layout.image_of_tile, torch.arange(images)).to(device)
        attention, keys, relevance = features.cls_attention, features.keys, features.relevance
        tile, centre = torch.zeros(images, longest, dtype=torch.long), torch.zeros(images, longest, 2)
        of_cell = self.layout.source[self.layout.cell] // self.layout.tokens  # counted over the batch
        tile[rows, slot] = of_cell - torch.searchsorted(self.layout.image_of_tile, rows)
        centre[rows, slot] = self.layout.centres
        grouped = Features(
            tokens=regroup(features.tokens),
            valid=regroup(torch.ones(features.tokens.shape[:2], dtype=torch.bool, device=device)),
            cls_attention=None if attention is None else regroup(attention),
            keys=None if keys is None else keys[first],  # an image's key is that of its first tile
            tile=tile.to(device),
            centre=centre.to(device),
            relevance=None if relevance is None else regroup(relevance.to(device)),
        )
        return rows, slot, grouped


def check_model(model: PreTrainedModel) -> None:
    """Raise ``TokenselError`` if the model is none whose visual tokens can be traced to tiles."""
    if not hasattr(model.base_model, "pack_image_features"):
        raise TokenselError(
            f"{type(model).__name__} packs no image tiles: give a LLaVA-NeXT or LLaVA-OneVision"
        )
    config = model.config
    has_cls = config.vision_config.model_type.startswith("clip")
    if has_cls and config.vision_feature_select_strategy != "default":
        raise TokenselError(
            f"{type(model).__name__} with vision_feature_select_strategy "
            f"'{config.vision_feature_select_strategy}' packs no tiles, as the CLS token fits into no grid: "
            "give 'default' in its configuration"
        )


def _tensor(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    """One of the processor's outputs as a tensor, whether or not it was asked for tensors."""
    value = inputs.get(name)
    if value is None or isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError):  # rows of several lengths, or something else that is no array
        raise TokenselError(
            f"{name} is no tensor: call the processor with padding=True and return_tensors='pt'"
        ) from None


def _host(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    value = _tensor(inputs, name)
    return None if value is None else value.cpu()


def _row_of_image(layout: Layout, places: Int[Tensor, "packed 2"]) -> Int[Tensor, "images"]:
    """The row in which each image's first placeholder stands."""
    images = torch.arange(len(layout.tiles))
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
    keys: Int[Tensor, "rows"] | None,
) -> Int[Tensor, "tiles"]:
    """Key of every tile: its row's key, the number of the image in the row, that of the tile in the image."""
    of_tile = layout.image_of_tile
    first = torch.searchsorted(of_tile, torch.arange(len(layout.tiles)))
    tile = (torch.arange(len(of_tile)) - first[of_tile]).to(pixels.device)
    if keys is None:
        return mix(content_keys(pixels)[first[of_tile].to(pixels.device)], tile)
    nth = torch.arange(len(row_of_image)) - torch.searchsorted(row_of_image, row_of_image)
    return mix(mix(keys[row_of_image], nth)[of_tile].to(pixels.device), tile)


@torch.no_grad()
def encode(
    model: PreTrainedModel, inputs: Mapping[str, Any], keys: Int[Tensor, "rows"] | Sequence[int] | None = None
) -> Encoded:
    """Find where the visual tokens of a batch are and which tiles they come from; the tower runs later.

    The features are those that the model's own forward hands to its projector: same tiles, same layer, same
    rule about the CLS token. Rows without an image, with several, or no image at all are fine.

    Args:
        model: a LLaVA-NeXT, or a model that packs tiles as it does.
        inputs: what its processor returns: ``input_ids``, ``attention_mask`` and, where there are images,
            ``pixel_values`` and ``image_sizes``; tensors, arrays or lists, on any device.
        keys: a stable number for each row, the seed of its random selection; by default one is made from the
            pixels, so that an image is treated alike in every batch.

    Raises:
        TokenselError: the model packs no tiles, the inputs hold a video or are incomplete, the placeholders
            do not match the images, or keys and rows differ in number.
    """
    check_model(model)
    core: Any = model.base_model
    config = model.config
    if inputs.get("pixel_values_videos") is not None:
        raise TokenselError(
            "videos cannot be reduced: give their frames as images, or the inputs to model.generate as they "
            "are"
        )
    # read on the host, and before the device is given anything to do: one short wait in place of many later
    ids, mask, sizes = (_host(inputs, name) for name in ("input_ids", "attention_mask", "image_sizes"))
    if ids is None or ids.dim() != 2 or not ids.numel():
        raise TokenselError("input_ids with at least one row are missing: pass what the processor returns")
    mask = torch.ones_like(ids).bool() if mask is None else mask.bool()
    if keys is not None:
        if len(keys) != len(ids):
            raise TokenselError(f"{len(keys)} keys for {len(ids)} rows: give one for each row")
        keys = torch.as_tensor(keys, dtype=torch.long).cpu()
    places = ((ids == config.image_token_id) & mask).nonzero()
    pixels = _tensor(inputs, "pixel_values")
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if pixels is None or len(pixels) == 0:
        layout, pixels, sizes = empty_layout(tokens), None, None
    elif sizes is None:
        raise TokenselError("pixel_values without image_sizes: pass all that the processor returns")
    elif sizes.dim() != 2 or sizes.shape[1] != 2:
        raise TokenselError(
            f"image_sizes has the shape {tuple(sizes.shape)}: give height and width of each image"
        )
    else:
        counts = tile_counts(model, {**inputs, "image_sizes": sizes})
        pixels = real_tiles(pixels, counts).to(device_of(core.vision_tower))
        layout = read_layout(core, counts, tokens, sizes)
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
    return Encoded(model, ids, mask, places, layout, pixels, sizes, keys)
