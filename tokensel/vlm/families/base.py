"""What one model family answers about its visual tokens, so that one ``encode`` and one ``reduce`` serve all.

A family is one class in a file of its own and one row of :data:`tokensel.vlm.families.FAMILIES`. Nothing of a
model is replaced: a family reads the processor's output, calls the model's own tower and projector, and hands
``model.generate`` embeddings of the shortened prompt, or its ids and the kept tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded, TowerOutput, content_keys
from tokensel.vlm.layout import Layout

__all__ = [
    "Family",
    "Located",
    "check_cls",
    "host_tensor",
    "needed",
    "no_visual",
    "run_lengths",
    "tensor",
    "text_embeds",
]


@dataclass
class Located:
    """Where the visual tokens of a batch are, before the tower has run.

    Attributes:
        layout: where each packed token comes from; on the host.
        pixel_values: what the tower reads, on its device; ``None`` without images.
        image_sizes: height and width of each image in pixels, where the processor returns them.
        extras: other outputs of the processor that the family needs later, by name; on the host.
    """

    layout: Layout
    pixel_values: Tensor | None
    image_sizes: Int[Tensor, "images 2"] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)


def tensor(inputs: Mapping[str, Any], name: str) -> Tensor | None:
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


def host_tensor(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    value = tensor(inputs, name)
    return None if value is None else value.cpu()


class Family(ABC):
    """One family; the methods here are what most families share.

    Attributes:
        name: as readers know it.
        way: how a shortened prompt reaches the model.
        tiled: whether it packs tiles and newlines as LLaVA-NeXT does, which down-sampling and the timing of
            costs rely on.
        text: name of the language model inside the model.
        empty_rows: whether its processor wants a list of images for every row, an empty one for text alone.
        needs_image: whether its processor refuses a row without an image.
        carried: outputs of the processor, among ``extras``, that are shortened and passed with the prompt.
        reads_layer: whether its features are a layer of a CLIP or SigLIP tower, named in the configuration.
        ragged: whether an image gives as many tokens as its size asks for, not whole tiles of one size.
        videos: whether ``pixel_values_videos`` can be reduced; a clip is then one image with a tile for each
            step of time.
    """

    name = ""
    way = "embeddings of the shortened prompt go to model.generate, nothing of the model is replaced"
    tiled = False
    text = "language_model"
    empty_rows = False
    needs_image = False
    carried: tuple[str, ...] = ()
    reads_layer = False
    ragged = False
    videos = False

    def placeholders(self, config: Any) -> Int[Tensor, "kinds"]:
        """Ids of the tokens that stand for visual tokens in ``input_ids``, on the host."""
        return torch.tensor([config.image_token_id])

    def mark(self, token: str) -> str:
        """An image in the text of a prompt: its placeholder ``token`` and what the model wants around it."""
        return token

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 - most families can trace every model
        """Raise ``TokenselError`` if this model's visual tokens cannot be traced."""

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        """The processor of the checkpoint ``name``; ``hub`` are options of ``from_pretrained``."""
        return AutoProcessor.from_pretrained(name, **hub)

    @abstractmethod
    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        """Find the visual tokens from the processor's output, without running the tower.

        Args:
            model: the model.
            inputs: the processor's output.
            ids: ``input_ids`` on the host.

        Raises:
            TokenselError: the inputs are incomplete.
        """

    @abstractmethod
    def width(self, config: Any) -> int:
        """Channels of the tokens that :meth:`run` returns."""

    @abstractmethod
    def run(self, encoded: Encoded) -> TowerOutput:
        """Run the tower over the images of a batch that has some."""

    def tower(self, model: PreTrainedModel) -> Any:
        """The vision tower."""
        core: Any = model.base_model
        return core.vision_tower

    def patch_width(self, config: Any) -> int:
        """Channels of a patch, before patches become one token."""
        return config.vision_config.hidden_size

    def cut(self, image_processor: Any, image: Image, whole: bool) -> list[dict[str, Tensor]]:
        """The tiles of one image, each as the tower reads it, with a first dimension to join them along.

        Args:
            image_processor: of the checkpoint.
            image: in RGB.
            whole: make one tile of it.
        """
        pixels = image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return [{"pixel_values": tile[None]} for tile in pixels]

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        """The layout of tiles from :meth:`cut`, joined, as if each were an image of its own.

        Raises:
            TokenselError: a family whose towers are loaded without it.
        """
        raise TokenselError(f"{self.name} is trained on by its vision tower: give VisionEncoder")

    def keys(self, encoded: Encoded) -> Int[Tensor, "tiles"]:
        """A number for each tile that depends on its pixels alone."""
        assert encoded.pixel_values is not None  # asked only where there are images
        return content_keys(encoded.pixel_values)

    def project(
        self,
        encoded: Encoded,
        kept: Bool[Tensor, "packed"],
        features: Float[Tensor, "tiles tokens channels"] | None = None,
    ) -> Float[Tensor, "kept width"]:
        """Embeddings of the packed tokens that stay, as the model itself makes them.

        Args:
            encoded: the batch.
            kept: packed tokens that stay.
            features: what is projected, from a scorer that merges; by default what the tower made.

        Raises:
            TokenselError: features of a family that has no :meth:`embed`.
        """
        if not bool(kept.any()):
            return no_visual(encoded)
        if features is not None:
            source = encoded.layout.source[kept].to(features.device)
            return self.embed(encoded, features.flatten(0, 1)[source])
        embeds = encoded.tower_output.embeds
        return no_visual(encoded) if embeds is None else embeds[kept.to(embeds.device)]

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        """Embeddings of tokens as :meth:`run` returns them, one by one.

        Raises:
            TokenselError: a family that does more to its tokens than this.
        """
        raise TokenselError(
            f"{self.name} projects what its own tower made, so a scorer that merges dropped tokens into kept "
            "ones cannot be used with it: choose another, such as diversity"
        )

    def positions(self, encoded: Encoded) -> Int[Tensor, "axes rows length"] | None:
        """Positions of the full prompt where they have several axes; ``None`` where they count tokens."""
        return None

    def place(
        self,
        encoded: Encoded,
        ids: Int[Tensor, "rows length"],
        slots: Bool[Tensor, "rows length"],
        visual: Float[Tensor, "kept width"],
        kept: Bool[Tensor, "packed"],
    ) -> dict[str, Any]:
        """Put visual tokens into the prompt; returns these inputs of ``generate``, by name.

        Args:
            encoded: the batch.
            ids: of the shortened prompt, on the host.
            slots: True at its placeholders, on the host.
            visual: embeddings of the tokens that stay, in packed order.
            kept: which packed tokens those are.
        """
        embeds = text_embeds(encoded, ids)
        rows, columns = (index.to(embeds.device) for index in slots.nonzero(as_tuple=True))
        embeds[rows, columns] = visual.to(embeds.device, embeds.dtype)
        return {"inputs_embeds": embeds}


def check_cls(model: PreTrainedModel) -> None:
    """Raise unless the model leaves out the CLS token of its tower, if that has one.

    Raises:
        TokenselError: it keeps it, and there is no place for it in the grid of an image.
    """
    strategy = model.config.vision_feature_select_strategy
    if model.config.vision_config.model_type.startswith("clip") and strategy != "default":
        raise TokenselError(
            f"{type(model).__name__} with vision_feature_select_strategy '{strategy}' keeps the CLS token, "
            "which fits into no grid: give 'default' in its configuration"
        )


def needed(inputs: Mapping[str, Any], name: str) -> Tensor:
    """One of the processor's outputs for images, on the host.

    Raises:
        TokenselError: it is missing.
    """
    value = host_tensor(inputs, name)
    if value is None:
        raise TokenselError(f"pixel_values without {name}: pass all that the processor returns")
    return value


def run_lengths(marks: Bool[Tensor, "rows length"]) -> list[int]:
    """Lengths of the runs of True in each row, row after row."""
    edge = torch.zeros(len(marks), 1, dtype=torch.long)
    change = torch.cat([edge, marks.long(), edge], 1).diff(dim=1)
    return ((change == -1).nonzero()[:, 1] - (change == 1).nonzero()[:, 1]).tolist()


def text_embeds(encoded: Encoded, ids: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length width"]:
    """Embeddings of a prompt with its placeholders: a new tensor, to be written into."""
    embedding: Any = encoded.model.get_input_embeddings()
    return embedding(ids.to(device_of(embedding)))


def no_visual(encoded: Encoded) -> Float[Tensor, "0 width"]:
    """Embeddings of no visual token."""
    weight: Any = encoded.model.get_input_embeddings().weight
    return torch.zeros(0, weight.shape[1], dtype=encoded.model.dtype, device=weight.device)
