"""Frozen vision encoders: from images to the features that the language model would read."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.utils.hub import cached_file

from tokensel.data.features import Features, feature_width
from tokensel.data.images import as_image
from tokensel.data.tower import run_tower
from tokensel.utils.errors import CheckpointError, TokenselError, reason
from tokensel.utils.loading import hub_options, quiet

Tiles = Literal["whole", "anyres"]

# per kind of tower: class, feature layer, drop the CLS token?, mean and std of the pixels.
# CLIP as LLaVA-NeXT uses it, SigLIP as LLaVA-OneVision does (their published configurations).
TOWERS = {
    "clip_vision_model": (
        CLIPVisionModel,
        -2,
        True,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "siglip_vision_model": (SiglipVisionModel, -1, False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class VisionEncoder:
    """A frozen CLIP or SigLIP vision tower with its image preprocessing.

    Attributes:
        tower: the stock transformers model, in evaluation mode, without gradients.
        feature_layer: which hidden state is the feature tensor F; -2 for CLIP, -1 for SigLIP, or what the
            LLaVA checkpoint says (of several, the channels are joined); before the tower's last norm.
        drop_cls: whether the first token is the CLS token and is left out.
        name: where it came from.
        read_by: folder or Hub id of the LLaVA checkpoint whose language model reads its features; empty if
            there is none.
        width: channels of a token.
        tokens, grid: tokens of a tile; their rows and columns.
        size: pixels per side of a tile.
        kind: the model type of the tower.
        ragged: whether tiles differ in their number of tokens.
    """

    ragged, read_by = False, ""

    def __init__(
        self,
        tower: PreTrainedModel,
        processor: Any = None,
        feature_layer: int | list[int] | None = None,
        drop_cls: bool | None = None,
        name: str = "",
        read_by: str = "",
    ):
        kind = tower.config.model_type
        if kind not in TOWERS:
            raise TokenselError(
                f"{name or kind}: a {kind} is no vision tower known here; give one of {list(TOWERS)}"
            )
        _, layer, cls, self.mean, self.std = TOWERS[kind]
        self.kind = kind
        self.tower = tower.eval().requires_grad_(False)
        self.processor = processor
        self.feature_layer = layer if feature_layer is None else feature_layer
        self.drop_cls = cls if drop_cls is None else drop_cls
        self.name, self.read_by = name or kind, read_by
        self.width = feature_width(tower.config, self.feature_layer)
        self.size = tower.config.image_size
        side = self.size // tower.config.patch_size
        self.grid = (side, side)
        self.has_cls = cls
        self.tokens = side * side + (cls and not self.drop_cls)
        resample = getattr(processor, "resample", None)
        self.resample = Image.Resampling.BICUBIC if resample is None else resample
        if processor is not None:
            self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        feature_layer: int | list[int] | None = None,
        drop_cls: bool | None = None,
        **hub: Any,
    ) -> "VisionEncoder":
        """Load from a Hub id or folder: a vision tower, a CLIP or SigLIP model, or a LLaVA checkpoint.

        From a LLaVA checkpoint only the files that hold the vision tower are fetched and read; its feature
        layer, CLS choice and image processor come with it. ``hub`` are options of
        :func:`~tokensel.utils.loading.hub_options`, such as ``token`` and ``revision``; they are used for
        every download.

        Raises:
            TokenselError: no such model, no connection to the Hub, no vision tower in it, damaged weights.
        """
        name = str(name)
        options = hub_options(name, **hub)
        with tower_errors(name):
            config = AutoConfig.from_pretrained(name, **options)
            vision = getattr(config, "vision_config", config)
            if vision.model_type in TOWERS and hasattr(config, "vision_feature_layer"):
                tower = _tower_of_llava(name, config, dtype, options)
                feature_layer = config.vision_feature_layer if feature_layer is None else feature_layer
                drop_cls = (
                    config.vision_feature_select_strategy == "default" if drop_cls is None else drop_cls
                )
            else:
                if vision.model_type not in TOWERS:
                    raise TokenselError(
                        f"{name}: a {vision.model_type} has no CLIP or SigLIP vision tower; give one that "
                        "has, or load it with tokensel.vlm.load_encoder"
                    )
                with quiet():
                    kind = TOWERS[vision.model_type][0]
                    tower = kind.from_pretrained(name, config=vision, dtype=dtype, **options)
            processor = _processor(name, options)
        cast(nn.Module, tower).to(device)
        read_by = name if hasattr(config, "vision_feature_layer") else ""
        return cls(tower, processor, feature_layer, drop_cls, name, read_by)

    @classmethod
    def from_vlm(cls, model: PreTrainedModel, processor: Any, name: str = "") -> "VisionEncoder":
        """The tower of a LLaVA model already in memory, shared and not copied."""
        config = model.config
        image_processor = getattr(processor, "image_processor", processor)
        drop_cls = config.vision_feature_select_strategy == "default"
        name = name or str(config.name_or_path or "")
        read_by, layer = str(config.name_or_path or ""), config.vision_feature_layer
        return cls(model.model.vision_tower, image_processor, layer, drop_cls, name, read_by)

    @property
    def device(self) -> torch.device:
        return self.tower.device

    def to(self, device: torch.device | str) -> "VisionEncoder":
        cast(nn.Module, self.tower).to(device)  # transformers hides the arguments of its own method
        return self

    def preprocess(
        self, images: Sequence[Any], tiles: Tiles = "whole"
    ) -> Float[Tensor, "tiles 3 height width"]:
        """Pixels of the tiles, normalised, on the CPU.

        ``"whole"`` resizes each image to one square tile, as the thumbnail of LLaVA-NeXT is made;
        ``"anyres"`` adds the high-resolution tiles that the checkpoint's own image processor cuts.

        Args:
            images: at least one, each whatever :func:`tokensel.data.images.as_image` takes.
            tiles: ``"whole"`` or ``"anyres"``.

        Raises:
            TokenselError: no images or one that cannot be read, or ``"anyres"`` with an encoder that is not
                from a LLaVA-NeXT or OneVision checkpoint.
        """
        if not len(images):
            raise TokenselError("images is empty: give at least one image")
        opened = [as_image(image) for image in images]
        if tiles == "whole":
            return torch.stack([self._whole_tile(image) for image in opened])
        if not hasattr(self.processor, "image_grid_pinpoints"):
            raise TokenselError(
                f"{self.name}: cuts no anyres tiles; give a LLaVA-NeXT checkpoint, or whole tiles"
            )
        # one image at a time: images have different numbers of tiles, and a batch would be padded
        parts = [self.processor(images=[image], return_tensors="pt")["pixel_values"][0] for image in opened]
        return torch.cat(parts)

    def stack(self, tiles: Sequence[Tensor | None]) -> Tensor:
        """One batch of tiles for :meth:`features`; a tile that is ``None`` becomes a blank one."""
        blank = torch.zeros(3, self.size, self.size)
        return torch.stack([blank if tile is None else tile for tile in tiles])

    def features(
        self, pixel_values: Float[Tensor, "tiles 3 height width"], cls_attention: bool = False
    ) -> Features:
        """Features F of each tile, ``[tiles, tokens, width]``, on the encoder's device.

        Args:
            pixel_values: what :meth:`preprocess` returns, on any device.
            cls_attention: also return the attention of the CLS token in the layer that makes F, averaged
                over its heads.

        Raises:
            TokenselError: ``cls_attention`` with an encoder that has no CLS token.
        """
        if cls_attention and not (self.has_cls and self.drop_cls):
            raise TokenselError(
                f"{self.name}: no CLS token apart from the features; choose a scorer that needs none"
            )
        pixels = pixel_values.to(self.device, self.tower.dtype)
        tokens, attention = run_tower(self.tower, pixels, self.feature_layer, self.drop_cls)
        return Features(tokens, cls_attention=attention() if cls_attention and attention else None)

    def encode(
        self,
        images: Sequence[Any],
        tiles: Tiles = "whole",
        batch_size: int = 32,
        cls_attention: bool = False,
    ) -> Features:
        """Features of all tiles of ``images``, in float32 on the CPU; keys count the tiles from 0.

        Raises:
            TokenselError: as for :meth:`preprocess` and :meth:`features`.
        """
        if not len(images):
            raise TokenselError("images is empty: give at least one image")
        parts = []
        for start in range(0, len(images), batch_size):
            pixels = self.preprocess(images[start : start + batch_size], tiles)
            parts += [
                self.features(chunk, cls_attention).to("cpu", torch.float32)
                for chunk in pixels.split(batch_size)
            ]
        tokens = torch.cat([part.tokens for part in parts])
        rows = [part.cls_attention for part in parts if part.cls_attention is not None]
        attention = torch.cat(rows) if cls_attention else None
        return Features(tokens, cls_attention=attention, keys=torch.arange(len(tokens)))

    def fingerprint(self) -> str:
        """16 hex digits over weights, feature layer and preprocessing: equal if the features are."""
        digest = hashlib.blake2b(digest_size=8)
        pinpoints = getattr(self.processor, "image_grid_pinpoints", None)  # sizes that are cut into tiles
        settings = [self.feature_layer, self.drop_cls, self.size, self.mean, self.std]
        settings += [int(self.resample), pinpoints]
        digest.update(json.dumps(settings).encode())
        return self._with_weights(digest)

    def _with_weights(self, digest: Any) -> str:
        """Hexadecimal digits of a digest that takes in the weights of the tower."""
        for _, weight in sorted(self.tower.state_dict().items()):
            values = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def _whole_tile(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        resized = image.resize((self.size, self.size), self.resample)
        pixels = (np.asarray(resized).astype(np.float64) / 255).astype(np.float32)
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@contextmanager
def tower_errors(name: str | Path) -> Iterator[None]:
    """Errors on the way to a vision tower, as lines that name it and the fix."""
    try:
        yield
    except TokenselError:
        raise
    except (SafetensorError, EOFError) as error:
        raise CheckpointError(
            f"{name}: its weights are cut short or damaged ({error}); fetch it again"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise TokenselError(
            f"{name}: no vision tower can be loaded ({reason(error)}); give a local folder of one"
        ) from None


def _file(name: str, file: str, options: dict[str, Any]) -> str | None:
    """The path of one file of a model, downloaded if needed; ``None`` if the model has no such file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)


def _processor(name: str, options: dict[str, Any]) -> Any:
    """The image processor beside the model; without one the pixel statistics of the family are used."""
    files = ("preprocessor_config.json", "processor_config.json")
    if not any(_file(name, file, options) for file in files):
        return None
    return AutoImageProcessor.from_pretrained(name, **options)


def _tower_of_llava(name: str, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Build the vision tower as LLaVA does, from the shards that hold it (a 7B model has 15 GB of others)."""
    index = _file(name, "model.safetensors.index.json", options)
    if index is None:
        files = {"model.safetensors"}
    else:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {file for key, file in weight_map.items() if "vision_tower." in key}
    tower = AutoModel.from_config(config.vision_config, dtype=dtype)

    def plain(key: str) -> str:  # older files have a prefix vision_model. that newer models do not
        return key.split("vision_tower.")[-1].removeprefix("vision_model.")

    weights = {}
    for file in sorted(files):
        with safe_open(cached_file(name, file, **options), framework="pt") as shard:
            vision_keys = [key for key in shard.keys() if "vision_tower." in key]  # noqa: SIM118 - no mapping
            weights |= {plain(key): shard.get_tensor(key) for key in vision_keys}
    wanted = {plain(key): key for key in tower.state_dict()}
    if missing := sorted(set(wanted) - set(weights)):
        raise TokenselError(
            f"{name}: its vision tower lacks {missing[0]} and {len(missing) - 1} more; fetch it again"
        )
    tower.load_state_dict({wanted[key]: weights[key].to(dtype) for key in wanted})
    return tower
