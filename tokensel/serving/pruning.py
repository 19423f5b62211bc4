"""From images to the embeddings of the tokens that are kept, with the engine's own modules.

The layout, the choice and the newlines are those of :mod:`tokensel.vlm`; the vision tower, the projector and
the newline are the engine's, which may be spread over devices or quantised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import grid_layout, layout_of, served_scorer, skeleton
from tokensel.vlm.choose import Choices
from tokensel.vlm.encoded import Encoded, TowerOutput
from tokensel.vlm.families import family_of
from tokensel.vlm.families.llava_next import LlavaNext
from tokensel.vlm.layout import Layout
from tokensel.vlm.visual import choose_tokens, embed_tokens

__all__ = ["GridPruner", "Pruner", "TilePruner"]

Tower = Callable[[Tensor], Tensor]
# from patches and the grids of the images to what the merger reads and what it makes of it
GridTower = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class _Kept:
    """The packed tokens of a batch of images that are kept.

    Attributes:
        embeds: their embeddings, in packed order.
        mask: True at the packed tokens that are kept.
        counts: how many they are, image by image.
    """

    embeds: Float[Tensor, "kept width"]
    mask: Bool[Tensor, "packed"]
    counts: list[int]


class Pruner:
    """Chooses and embeds visual tokens by the options of a server.

    Attributes:
        options: what is kept.
        scorer: what ranks the tokens.
    """

    def __init__(self, config: PretrainedConfig):
        """
        Args:
            config: of the model, with :class:`~tokensel.serving.config.ServeConfig` in it.

        Raises:
            TokenselError: a model or a choice that cannot be served.
        """
        self.options = ServeConfig.of(config)
        self.scorer = served_scorer(config, self.options)
        self._choices = Choices.of(self.options.choices)
        self._model = skeleton(config)

    def _encoded(self, family: Any, layout: Layout, pixels: Tensor, **more: Any) -> Encoded:
        """Images as a batch with one row for each; the text is the engine's, and the rows have none."""
        none = torch.zeros(len(layout.tiles), 0, dtype=torch.long)
        return Encoded(
            self._model,
            input_ids=none,
            attention_mask=none.bool(),
            places=torch.stack([layout.image, torch.zeros_like(layout.image)], 1),
            layout=layout,
            pixel_values=pixels,
            image_sizes=more.pop("image_sizes", None),
            family=family,
            **more,
        )

    def _keep(self, encoded: Encoded, keeps: Sequence[float]) -> _Kept:
        """Choose the tokens of each image by its own keep, and embed them.

        All images go through the vision tower, the scorer and the projector together.

        Args:
            encoded: the images.
            keeps: fraction of the visual tokens of each image to keep, in (0, 1].

        Raises:
            TokenselError: a fraction that is not in (0, 1].
        """
        layout = encoded.layout
        # the keep of each packed token's image
        keep_of_token = torch.tensor(list(keeps), dtype=torch.float64)[layout.image]
        cells, kept = torch.zeros_like(layout.cell), torch.zeros_like(layout.cell)
        for keep in set(keeps):  # scores are computed once; only the choice depends on keep
            scorer = None if keep == 1.0 else self.scorer
            chosen = choose_tokens(encoded, scorer, keep, self._choices)
            for mask, part in zip((cells, kept), chosen):
                mask |= part & (keep_of_token == keep)
        counts = torch.bincount(layout.image[kept], minlength=len(keeps)).tolist()
        return _Kept(embed_tokens(encoded, self.scorer, cells, kept), kept, counts)


class _EngineTower(LlavaNext):
    """LLaVA-NeXT, with the vision tower of an engine."""

    def __init__(self, tower: Tower):
        self.engine_tower = tower

    def run(self, encoded: Encoded) -> TowerOutput:
        assert encoded.pixel_values is not None  # asked only where there are images
        return TowerOutput(self.engine_tower(encoded.pixel_values))


class TilePruner(Pruner):
    """Embeds images with a part of their visual tokens, for LLaVA-NeXT and LLaVA-OneVision."""

    def __init__(self, config: PretrainedConfig, tower: Tower, projector: nn.Module, newline: nn.Parameter):
        """
        Args:
            config: of the model, with :class:`~tokensel.serving.config.ServeConfig` in it.
            tower: from tiles ``[tiles, 3, height, width]`` to what the projector reads,
                ``[tiles, tokens, channels]``.
            projector: of the engine's model.
            newline: ``[width]``, of the engine's model.

        Raises:
            TokenselError: a model or a choice that cannot be served.
        """
        super().__init__(config)
        self._family = _EngineTower(tower)
        core: Any = self._model.base_model
        core.multi_modal_projector, core.image_newline = projector, newline

    @torch.no_grad()
    def embed(
        self,
        pixel_values: Sequence[Float[Tensor, "_ 3 height width"]]
        | Float[Tensor, "images tiles 3 height width"],
        image_sizes: Int[Tensor, "images 2"],
        keeps: Sequence[float],
    ) -> list[Float[Tensor, "_ channels"]]:
        """The embeddings of each image in the prompt: the kept cells, and newlines.

        Args:
            pixel_values: tiles of each image, on the tower's device; more than the image has are cut off.
            image_sizes: height and width of each image in pixels.
            keeps: fraction of the visual tokens of each image to keep, in (0, 1].

        Raises:
            TokenselError: a fraction that is not in (0, 1].
        """
        sizes = image_sizes.cpu()
        layout = layout_of(self._model, sizes)
        pixels = torch.cat([t[:count] for t, count in zip(pixel_values, layout.tiles, strict=True)])
        kept = self._keep(self._encoded(self._family, layout, pixels, image_sizes=sizes), keeps)
        return list(kept.embeds.split(kept.counts))


class GridPruner(Pruner):
    """Embeds images with a part of their visual tokens, for Qwen2.5-VL."""

    def __init__(self, config: PretrainedConfig, tower: GridTower, merger: nn.Module):
        """
        Args:
            config: of the model, with :class:`~tokensel.serving.config.ServeConfig` in it.
            tower: from patches ``[patches, channels of a patch]`` and grids ``[images, 3]`` to what the
                merger reads ``[patches, channels]``, in the order of the attention windows, and the
                embeddings ``[tokens, width]``, in the order of the image.
            merger: of the engine's model, for scorers that merge tokens.

        Raises:
            TokenselError: a model or a choice that cannot be served.
        """
        super().__init__(config)

        def get_image_features(pixels: Tensor, grids: Tensor, **options: Any) -> Any:
            patches, embeds = tower(pixels, grids)
            return SimpleNamespace(last_hidden_state=patches, pooler_output=[embeds])

        core: Any = self._model.base_model
        core.get_image_features, core.visual.merger = get_image_features, merger

    @torch.no_grad()
    def embed(
        self,
        pixel_values: Float[Tensor, "patches channels"],
        grids: Int[Tensor, "images 3"],
        keeps: Sequence[float],
    ) -> list[tuple[Float[Tensor, "_ width"], Int[Tensor, "_ 2"]]]:
        """The kept tokens of each image: embeddings, and row and column in the image.

        Args:
            pixel_values: patches of the images, on the tower's device.
            grids: time, height and width of each image in patches.
            keeps: fraction of the visual tokens of each image to keep, in (0, 1].

        Raises:
            TokenselError: a fraction that is not in (0, 1].
        """
        grids = grids.cpu()
        layout = grid_layout(self._model, grids)
        config = self._model.config
        kept = self._keep(
            self._encoded(family_of(config), layout, pixel_values, extras={"image_grid_thw": grids}), keeps
        )
        assert layout.grid is not None  # images of any size
        width = layout.grid[layout.source // layout.tokens, 1]
        place = layout.source % layout.tokens
        places = torch.stack([place // width, place % width], 1)[kept.mask]
        return list(zip(kept.embeds.split(kept.counts), places.split(kept.counts), strict=True))
