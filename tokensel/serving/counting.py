"""How many tokens an image of a given size has in the prompt, before the vision tower has seen it.

Counted by the code that chooses the tokens: with any scores, it keeps equally many.
"""

import copy
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tokensel.cost.published import hollow
from tokensel.scorers import Scorer, make_scorer
from tokensel.serving.architectures import ARCHITECTURES
from tokensel.serving.config import ServeConfig
from tokensel.utils.errors import TokenselError, check_keep
from tokensel.vlm.choose import Choices, add_newlines, choose_cells
from tokensel.vlm.families import family_of
from tokensel.vlm.families.llava_onevision import OFF
from tokensel.vlm.layout import Layout, read_layout, tile_counts

__all__ = ["TokenCounter", "grid_layout", "layout_of", "served_scorer", "skeleton"]


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of transformers without weights and with one layer of language model, to lay out tokens with.

    LLaVA-OneVision's own compression is switched off, as :func:`~tokensel.vlm.load.load_vlm` does.

    Args:
        config: of the model; it is not changed.

    Raises:
        TokenselError: a model that cannot be served with fewer tokens.
    """
    family = family_of(config)
    if config.model_type not in ARCHITECTURES:
        raise TokenselError(f"{family.name} is not served yet: give one of {', '.join(ARCHITECTURES)}")
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    if hasattr(config, "vision_aspect_ratio"):
        config.vision_aspect_ratio = OFF
    model = hollow(config)
    family.check(model)
    return model


def layout_of(model: PreTrainedModel, image_sizes: Int[Tensor, "images 2"]) -> Layout:
    """The layout of images, each alone in its prompt.

    Args:
        model: a :func:`skeleton`.
        image_sizes: height and width of each image in pixels, on the host.
    """
    vision: Any = model.config.vision_config
    counts = tile_counts(model, {"image_sizes": image_sizes})
    return read_layout(model.base_model, counts, (vision.image_size // vision.patch_size) ** 2, image_sizes)


def grid_layout(model: PreTrainedModel, grids: Int[Tensor, "images 3"]) -> Layout:
    """The layout of images of Qwen2.5-VL, each alone in its prompt.

    Args:
        model: a :func:`skeleton`.
        grids: time, height and width of each image in patches, on the host.
    """
    return family_of(model.config).tiles_layout(model.config, {"image_grid_thw": grids})


def served_scorer(config: PretrainedConfig, options: ServeConfig) -> Scorer:
    """The scorer of a server.

    Args:
        config: of the model.
        options: what the server keeps.

    Raises:
        TokenselError: no such scorer, one that does not fit the model, or one that reads what an engine does
            not give: the attention of the CLS token, or the question.
    """
    given = {name: getattr(options, name) for name in ("selector", "diffprune", "visionselector", "seed")}
    scorer = make_scorer(options.scorer, **given)
    for needs, what in {"cls_attention": "attention of the CLS token", "question": "question"}.items():
        if getattr(scorer, f"needs_{needs}", False):
            raise TokenselError(
                f"scorer '{options.scorer}' reads the {what}, which is not at hand where an engine embeds "
                "images: give another, such as selector, norm or diversity"
            )
    if (check := getattr(scorer, "check_model", None)) is not None:
        check(config)
    return scorer


class TokenCounter:
    """Counts the tokens of images by their size; equal sizes are counted once.

    A size is height and width: in pixels for LLaVA-NeXT and LLaVA-OneVision, and in patches of the image as
    its processor scales it for Qwen2.5-VL.

    Attributes:
        model: the :func:`skeleton`.
        options: what is kept.
    """

    def __init__(self, config: PretrainedConfig, options: ServeConfig):
        """
        Args:
            config: of the model.
            options: what is kept.

        Raises:
            TokenselError: a model that cannot be served with fewer tokens.
        """
        self.model, self.options = skeleton(config), options
        self._cached = lru_cache(maxsize=4096)(self._count)

    def count(self, height: int, width: int, keep: float | None = None) -> int:
        """Tokens of one image in the prompt, newlines among them.

        Args:
            height, width: the size of the image.
            keep: fraction of its visual tokens that is kept; by default that of :attr:`options`.

        Raises:
            TokenselError: ``keep`` is not in (0, 1].
        """
        return self._cached(int(height), int(width), check_keep(self.options.keep if keep is None else keep))

    def _count(self, height: int, width: int, keep: float) -> int:
        if family_of(self.model.config).tiled:
            layout = layout_of(self.model, torch.tensor([[height, width]]))
        else:
            layout = grid_layout(self.model, torch.tensor([[1, height, width]]))
        choices = Choices.of(self.options.choices)
        cells = choose_cells(layout, torch.zeros(len(layout.source)), keep, choices)
        return int(add_newlines(layout, cells, choices.newline).sum())
