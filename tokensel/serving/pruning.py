"""From tiles of images to the embeddings of the tokens that are kept, with the engine's own modules.

The layout, the choice and the newlines are those of :mod:`tokensel.vlm`; the vision tower, the projector and
the newline are the engine's, which may be spread over devices or quantised.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import layout_of, served_scorer, skeleton
from tokensel.vlm.choose import Choices
from tokensel.vlm.encoded import Encoded, TowerOutput
from tokensel.vlm.families.llava_next import LlavaNext
from tokensel.vlm.visual import choose_tokens, embed_tokens

__all__ = ["Pruner"]

Tower = Callable[[Tensor], Tensor]


class _EngineTower(LlavaNext):
    """LLaVA-NeXT, with the vision tower of an engine."""

    def __init__(self, tower: Tower):
        self.engine_tower = tower

    def run(self, encoded: Encoded) -> TowerOutput:
        assert encoded.pixel_values is not None  # asked only where there are images
        return TowerOutput(self.engine_tower(encoded.pixel_values))


class Pruner:
    """Embeds images with a part of their visual tokens, for LLaVA-NeXT and LLaVA-OneVision.

    Attributes:
        options: what is kept.
        scorer: what ranks the tokens.
    """

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
        self.options = ServeConfig.of(config)
        self.scorer = served_scorer(config, self.options)
        self._family, self._choices = _EngineTower(tower), Choices.of(self.options.choices)
        self._model = skeleton(config)
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

        All images go through the vision tower, the scorer and the projector together.

        Args:
            pixel_values: tiles of each image, on the tower's device; more than the image has are cut off.
            image_sizes: height and width of each image in pixels.
            keeps: fraction of the visual tokens of each image to keep, in (0, 1].

        Raises:
            TokenselError: a fraction that is not in (0, 1].
        """
        encoded = self._encoded(pixel_values, image_sizes.cpu())
        layout = encoded.layout
        # the keep of each packed token's image
        keep_of_token = torch.tensor(list(keeps), dtype=torch.float64)[layout.image]
        cells, kept = torch.zeros_like(layout.cell), torch.zeros_like(layout.cell)
        for keep in set(keeps):  # scores are computed once; only the choice depends on keep
            scorer = None if keep == 1.0 else self.scorer
            chosen = choose_tokens(encoded, scorer, keep, self._choices)
            for mask, part in zip((cells, kept), chosen):
                mask |= part & (keep_of_token == keep)
        embeds = embed_tokens(encoded, self.scorer, cells, kept)
        return list(embeds.split(torch.bincount(layout.image[kept], minlength=len(keeps)).tolist()))

    def _encoded(self, pixel_values: Any, image_sizes: Tensor) -> Encoded:
        """The images as a batch with one row for each."""
        layout = layout_of(self._model, image_sizes)
        none = torch.zeros(len(image_sizes), 0, dtype=torch.long)  # the text is the engine's
        return Encoded(
            self._model,
            input_ids=none,
            attention_mask=none.bool(),
            places=torch.stack([layout.image, torch.zeros_like(layout.image)], 1),
            layout=layout,
            pixel_values=torch.cat([t[:count] for t, count in zip(pixel_values, layout.tiles, strict=True)]),
            image_sizes=image_sizes,
            family=self._family,
        )
