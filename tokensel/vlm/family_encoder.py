"""The vision tower of any family as an encoder that a selector is trained on."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tokensel.data.encoders import TOWERS, Tiles, VisionEncoder, tower_errors
from tokensel.data.features import Features
from tokensel.data.images import as_image
from tokensel.utils.errors import CheckpointError, TokenselError
from tokensel.utils.loading import hub_options, quiet
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.families import FAMILIES, family_key, family_of

__all__ = ["FamilyEncoder", "load_encoder"]


def load_encoder(
    name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **hub: Any
) -> VisionEncoder:
    """The vision tower of a checkpoint as an encoder, whatever its family.

    CLIP and SigLIP towers become a :class:`~tokensel.data.encoders.VisionEncoder`, all others a
    :class:`FamilyEncoder`. ``hub`` are options of :func:`~tokensel.utils.loading.hub_options`.

    Raises:
        TokenselError: no such model, no vision tower in it, damaged weights.
    """
    with tower_errors(name):
        config = AutoConfig.from_pretrained(name, **hub_options(name, **hub))
    family = FAMILIES.get(family_key(config))
    if family is None or (family.reads_layer and config.vision_config.model_type in TOWERS):
        return VisionEncoder.from_pretrained(name, device, dtype, **hub)
    return FamilyEncoder.from_pretrained(name, device, dtype, **hub)


class FamilyEncoder(VisionEncoder):
    """The vision tower and image processor of a vision-language model; its language model is not kept.

    A token is one that the language model is given: the mean of the patches that are merged into it, before
    they are merged, in the order of the image.

    Attributes:
        model: the model without layers of its language model.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, name: str = ""):
        config: Any = model.config
        self.model, self.family = model.eval().requires_grad_(False), family_of(config, name)
        self.tower = self.family.tower(model)
        self.kind, self.name = config.vision_config.model_type, name or config.model_type
        self.processor = getattr(processor, "image_processor", processor)
        self.width, self.ragged = self.family.patch_width(config), self.family.ragged
        self.feature_layer = self.drop_cls = None  # the family's own rule
        self.has_cls = False
        self.tokens = self.family.tiles_layout(config, self.stack([None])).tokens  # of one whole tile

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **hub: Any,
    ) -> "FamilyEncoder":
        """Load from a folder or Hub id; of the language model only its embeddings pass through memory.

        Raises:
            TokenselError: no such model, another family, damaged weights.
        """
        name, options = str(name), hub_options(name, **hub)
        with tower_errors(name):
            config = AutoConfig.from_pretrained(name, **options)
            family = family_of(config, name)
            text = config.get_text_config()
            text.num_hidden_layers = 1
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:1]
            with quiet():
                processor = family.processor(name, config, **options)
                loaded: Any = AutoModelForImageTextToText.from_pretrained(
                    name, config=config, dtype=dtype, output_loading_info=True, **options
                )
        model, report = loaded
        if report["missing_keys"]:
            raise CheckpointError(
                f"{name}: lacks the weights {sorted(report['missing_keys'])[:3]}; fetch or save it again"
            )
        for part, attribute in ((model, "lm_head"), (model.base_model, family.text)):
            setattr(part, attribute, None)
        return cls(model.to(device), processor, name)

    def to(self, device: torch.device | str) -> "FamilyEncoder":
        module: Any = self.model  # transformers hides the arguments of its own method
        module.to(device)
        return self

    def preprocess(self, images: Sequence[Any], tiles: Tiles = "whole") -> Any:
        """Pixels of the tiles on the CPU: for each a mapping, as the family's image processor makes it.

        Args:
            images: at least one, each whatever :func:`tokensel.data.images.as_image` takes.
            tiles: "whole" makes one tile of an image, "anyres" cuts it as the model does.

        Raises:
            TokenselError: no images or one that cannot be read.
        """
        if not len(images):
            raise TokenselError("images is empty: give at least one image")
        opened = [as_image(image) for image in images]
        return [tile for image in opened for tile in self.family.cut(self.processor, image, tiles == "whole")]

    def stack(self, tiles: Sequence[Mapping[str, Tensor] | None]) -> Any:
        """One batch of tiles for :meth:`features`; a tile that is ``None`` becomes a black image."""
        (black,) = self.family.cut(self.processor, Image.new("RGB", (64, 64)), True)
        given = [black if tile is None else tile for tile in tiles]
        return {name: torch.cat([tile[name] for tile in given]) for name in black}

    @torch.no_grad()
    def features(self, pixel_values: Any, cls_attention: bool = False) -> Features:
        """Mean patch of each token, ``[tiles, most tokens, width]``, on the encoder's device.

        Args:
            pixel_values: what :meth:`stack` returns.
            cls_attention: not available.

        Raises:
            TokenselError: ``cls_attention`` was asked for.
        """
        if cls_attention:
            raise TokenselError(f"{self.name}: no CLS attention is read here; leave cls_attention out")
        none = torch.zeros(0, 0, dtype=torch.long)
        layout = self.family.tiles_layout(self.model.config, pixel_values)
        encoded = Encoded(
            self.model,
            input_ids=none,
            attention_mask=none.bool(),
            places=torch.zeros(0, 2, dtype=torch.long),
            layout=layout,
            pixel_values=pixel_values["pixel_values"].to(self.device, self.tower.dtype),
            image_sizes=None,
            family=self.family,
            extras={name: value for name, value in pixel_values.items() if name != "pixel_values"},
        )
        out, grid, real = encoded.tower_output, layout.grid, layout.real
        assert grid is not None and real is not None, "these layouts name the grid of each tile"
        tokens = Features(out.tokens, patches=out.patches).by_token()
        return Features(tokens, real.to(tokens.device), grid=grid.to(tokens.device))

    def encode(
        self, images: Sequence[Any], tiles: Tiles = "whole", batch_size: int = 32, cls_attention: bool = False
    ) -> Features:
        """Features of all tiles of ``images``, in float32 on the CPU; keys count the tiles from 0.

        Raises:
            TokenselError: as for :meth:`preprocess` and :meth:`features`.
        """
        cut = self.preprocess(images, tiles)
        parts = [
            self.features(self.stack(cut[start : start + batch_size]), cls_attention).to("cpu", torch.float32)
            for start in range(0, len(cut), batch_size)
        ]
        most = max(part.tokens.shape[1] for part in parts)
        tokens = torch.cat([pad(part.tokens, (0, 0, 0, most - part.tokens.shape[1])) for part in parts])
        grid = torch.cat([part.grid for part in parts if part.grid is not None])
        valid = torch.arange(most) < grid.prod(1)[:, None]
        return Features(tokens, valid, keys=torch.arange(len(cut)), grid=grid)

    def fingerprint(self) -> str:
        """16 hex digits over weights and preprocessing: equal if the features are."""
        digest = hashlib.blake2b(self.processor.to_json_string().encode(), digest_size=8)
        return self._with_weights(digest)
