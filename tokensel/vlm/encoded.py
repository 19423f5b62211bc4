"""A processed batch as the adapter sees it: everything that does not depend on what is kept."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.data.features import Features
from tokensel.scorers import Scorer
from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.utils.hashing import mix
from tokensel.vlm.layout import Layout

__all__ = ["Encoded", "TowerOutput", "content_keys"]


@dataclass
class TowerOutput:
    """What a family's vision tower returns for a batch.

    Attributes:
        tokens: what scorers read, a row for each token that a tile gives to the language model: the patches
            that become one token, before the model's projector.
        cls_attention: computes the CLS token's attention to them; ``None`` without a CLS token.
        embeds: embeddings of all packed tokens, where the model made them along the way.
        patches: how many patches stand side by side in the channels of a token.
        deeper: what is added to the tokens inside the language model, ``[packed, width]`` for each of its
            first layers; empty where nothing is.
    """

    tokens: Float[Tensor, "tiles tokens channels"]
    cls_attention: Callable[[], Tensor] | None = None
    embeds: Float[Tensor, "packed width"] | None = None
    patches: int = 1
    deeper: list[Tensor] = field(default_factory=list)


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
        pixel_values: the real tiles (or what the family's tower reads), for the tower and for methods that
            encode the image again.
        image_sizes: height and width of each image in pixels, where the processor returns them.
        keys: a stable number for each row, the seed of its random selection; ``None`` to make one from the
            pixels.
        family: the :class:`~tokensel.vlm.families.base.Family` of the model.
        extras: other outputs of the processor that the family needs, on the host.
    """

    model: PreTrainedModel
    input_ids: Int[Tensor, "rows length"]
    attention_mask: Bool[Tensor, "rows length"]
    places: Int[Tensor, "packed 2"]
    layout: Layout
    pixel_values: Tensor | None
    image_sizes: Int[Tensor, "images 2"] | None
    keys: Int[Tensor, "rows"] | None = None
    family: Any = None  # families take batches, so naming the class here would be an import in a circle
    extras: dict[str, Tensor] = field(default_factory=dict)
    _scores: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def core(self) -> Any:
        """The model without its language head: vision tower, projector, newline, language model."""
        return self.model.base_model

    @cached_property
    def tower_output(self) -> TowerOutput:
        """What the tower makes of all tiles; it runs here, and once."""
        if self.pixel_values is None:
            shape = (0, self.layout.tokens, self.family.width(self.model.config))
            return TowerOutput(torch.zeros(shape, dtype=self.model.dtype, device=self.model.device))
        return self.family.run(self)

    @cached_property
    def features(self) -> Features:
        """What the projector would be given; without CLS attention, which is :attr:`cls_attention`."""
        tokens = self.tower_output.tokens
        if self.pixel_values is None:
            return Features(tokens)
        rows = _row_of_image(self.layout, self.places)
        keys = _tile_keys(self, rows, tokens.device)
        grid, real = self.layout.grid, self.layout.real
        if grid is None or real is None:
            return Features(tokens, keys=keys)
        real, grid = real.to(tokens.device), grid.to(tokens.device)
        return Features(tokens, real, keys=keys, grid=grid, patches=self.tower_output.patches)

    @cached_property
    def positions(self) -> Int[Tensor, "axes rows length"] | None:
        """Positions of the full prompt on the host, where the model's positions have several axes."""
        return self.family.positions(self)

    @cached_property
    def cls_attention(self) -> Float[Tensor, "tiles tokens"] | None:
        """The CLS token's attention to each token, computed on first use; ``None`` without a CLS token."""
        attention = self.tower_output.cls_attention
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
        if getattr(scorer, "needs_projection", False):
            features = replace(features, tokens=self.projected(), patches=1)
        if scorer.scope == "tile":
            scores[cell] = scorer(features).float().cpu().flatten()[source[cell]]
        else:
            rows, slot, by_image = self.by_image(features)
            scores[cell] = scorer(by_image).float().cpu()[rows, slot]
        return scores

    def projected(self) -> Float[Tensor, "tiles tokens width"]:
        """All tokens as the language model would read them."""
        embeds = self.tower_output.embeds
        if embeds is not None:
            return self.layout.by_tile(embeds)
        tokens = self.features.tokens.to(device_of(self.core.multi_modal_projector))
        return self.core.multi_modal_projector(tokens)

    @cached_property
    def relevance(self) -> Float[Tensor, "tiles tokens"]:
        """Cosine of each projected token with the words of its question, averaged over words.

        The words are the text after the last image of a row, the template included, as their embeddings enter
        the language model; where there is none, all text of the row.
        """
        visual = torch.isin(self.input_ids, self.family.placeholders(self.model.config))
        image = visual & self.attention_mask
        text = self.attention_mask & ~image
        after = text & (image.flip(1).cumsum(1).flip(1) == 0)
        words = torch.where(after.any(1, keepdim=True), after, text)
        embedding: Any = self.model.get_input_embeddings()
        states = embedding(self.input_ids.to(device_of(embedding))).float()
        unit = torch.nn.functional.normalize(states, dim=-1)
        share = (words / words.sum(1, keepdim=True).clamp(min=1)).to(unit)
        question = torch.einsum("rlw,rl->rw", unit, share)  # mean of unit vectors
        projected = torch.nn.functional.normalize(self.projected().float(), dim=-1)
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


def _row_of_image(layout: Layout, places: Int[Tensor, "packed 2"]) -> Int[Tensor, "images"]:
    """The row in which each image's first placeholder stands."""
    images = torch.arange(len(layout.tiles))
    return places[torch.searchsorted(layout.image, images), 0].contiguous()


def content_keys(pixel_values: Float[Tensor, "tiles channels height width"]) -> Int[Tensor, "tiles"]:
    """A number for each tile that depends on its pixels alone: the same in every batch."""
    bits = pixel_values.float().contiguous().view(torch.int32)
    columns = bits.sum((1, 2), dtype=torch.long)  # [tiles, width], exact whatever the order of the sum
    return mix(columns, mix(torch.arange(columns.shape[1], device=columns.device))).sum(1)


def _tile_keys(
    encoded: Encoded, row_of_image: Int[Tensor, "images"], device: torch.device
) -> Int[Tensor, "tiles"]:
    """Key of every tile: its row's key, the number of the image in the row, that of the tile in the image."""
    of_tile = encoded.layout.image_of_tile
    first = torch.searchsorted(of_tile, torch.arange(len(encoded.layout.tiles)))
    tile = (torch.arange(len(of_tile)) - first[of_tile]).to(device)
    if encoded.keys is None:
        return mix(encoded.family.keys(encoded).to(device)[first[of_tile].to(device)], tile)
    nth = torch.arange(len(row_of_image)) - torch.searchsorted(row_of_image, row_of_image)
    return mix(mix(encoded.keys[row_of_image], nth)[of_tile].to(device), tile)
