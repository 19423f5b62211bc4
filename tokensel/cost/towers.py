"""FLOPs of the vision towers of all families, their projectors included, by formula."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from tokensel.cost.count import count_layer, count_projector, layers_read
from tokensel.utils.errors import TokenselError
from tokensel.vlm.families import family_key

__all__ = ["Tower", "count_tower", "tower_of"]


@dataclass(frozen=True)
class Tower:
    """The shape of a vision tower, as far as its matrix products need it.

    Attributes:
        width: channels of a patch.
        hidden: channels inside the MLP of a layer.
        depth: layers that run.
        values: numbers of the image that a patch is made of.
        projector: weights of the projector (or merger), which every token passes.
        patches: patches that become one token.
        matrices: matrices of the MLP of a layer.
        cls: 1 if there is a CLS token.
        window: rows, and columns, of tokens in an attention window; 0 without windows.
        full: layers whose attention has no windows, where others have.
        joined: whether the images of a prompt, padded to the largest of them, pass the tower as one sequence,
            in which a mask hides them from each other. Its attention is counted whole.
    """

    width: int
    hidden: int
    depth: int
    values: int
    projector: int
    patches: int = 1
    matrices: int = 2
    cls: int = 0
    window: int = 0
    full: int = 0
    joined: bool = False

    def flops(self, rows: int, columns: int) -> int:
        """FLOPs over one tile.

        Args:
            rows, columns: of its tokens.
        """
        tokens = rows * columns
        patches = tokens * self.patches
        layers = self.depth * self._layer(patches + self.cls)
        if self.window:
            # each window is a row of its own; those at the lower and right edge are smaller
            sides = [_parts(side, self.window) for side in (rows, columns)]
            inside = sum(self._layer(high * wide * self.patches) for high in sides[0] for wide in sides[1])
            layers = self.full * self._layer(patches) + (self.depth - self.full) * inside
        return layers + 2 * (patches * self.values * self.width + tokens * self.projector)

    def _layer(self, read: int) -> int:
        """FLOPs of one layer over ``read`` patches that attend to each other."""
        return count_layer(read, read, self.width, self.width, self.width, self.hidden, self.matrices)


def _parts(side: int, window: int) -> list[int]:
    return [min(window, side - start) for start in range(0, side, window)]


def _clip(config: Any, projector: int, patches: int = 1, cls: int = 0, depth: int | None = None) -> Tower:
    """A tower with the names of CLIP's and SigLIP's configurations; the sides of a patch may be a pair."""
    vision = config.vision_config
    size = vision.patch_size
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    return Tower(
        width=vision.hidden_size,
        hidden=vision.intermediate_size,
        depth=vision.num_hidden_layers if depth is None else depth,
        values=vision.num_channels * high * wide,
        projector=projector,
        patches=patches,
        cls=cls,
    )


def _qwen(config: Any) -> Tower:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL; a merger of two matrices for the output and each deeper layer."""
    vision = config.vision_config
    # Qwen2-VL calls the channels of a patch embed_dim, and those of a token hidden_size
    first = hasattr(vision, "embed_dim")
    width = vision.embed_dim if first else vision.hidden_size
    merged = width * vision.spatial_merge_size**2
    out = vision.hidden_size if first else vision.out_hidden_size
    windows = hasattr(vision, "window_size")
    return Tower(
        width=width,
        hidden=int(width * vision.mlp_ratio) if first else vision.intermediate_size,
        depth=vision.depth,
        values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        projector=merged * (merged + out) * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))),
        patches=vision.spatial_merge_size**2,
        matrices=3 if windows else 2,  # Qwen2.5-VL's has a gate
        window=vision.window_size // vision.spatial_merge_size // vision.patch_size if windows else 0,
        full=len(vision.fullatt_block_indexes) if windows else 0,
    )


def _internvl(config: Any) -> Tower:
    patches, text = round(1 / config.downsample_ratio) ** 2, config.text_config.hidden_size
    read = config.vision_config.hidden_size * patches
    return _clip(config, projector=read * text + text**2, patches=patches, cls=1)


def _idefics3(config: Any) -> Tower:
    patches = config.scale_factor**2
    projector = config.vision_config.hidden_size * patches * config.text_config.hidden_size
    return _clip(config, projector, patches)


def _gemma3(config: Any) -> Tower:
    side = config.vision_config.image_size // config.vision_config.patch_size
    projector = config.vision_config.hidden_size * config.text_config.hidden_size
    return _clip(config, projector, side**2 // config.mm_tokens_per_image)


def _paligemma(config: Any) -> Tower:
    return _clip(config, config.vision_config.hidden_size * config.projection_dim)


def _llava(config: Any) -> Tower:
    # layers after the one that is read do not run
    cls = int(config.vision_config.model_type.startswith("clip"))
    return _clip(config, count_projector(config, 1) // 2, cls=cls, depth=layers_read(config))


def _mistral3(config: Any) -> Tower:
    width, text = config.vision_config.hidden_size, config.text_config.hidden_size
    patches = config.spatial_merge_size**2
    tower = _clip(config, projector=patches * width**2 + width * text + text**2, patches=patches)
    return replace(tower, matrices=3, joined=True)  # the MLP of its layers has a gate


def _pixtral(config: Any) -> Tower:
    width, text = config.vision_config.hidden_size, config.text_config.hidden_size
    return replace(_clip(config, width * text + text**2), matrices=3, joined=True)


# by the keys of tokensel.vlm.families.FAMILIES
TOWERS = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "llava": _llava,
    "mistral3": _mistral3,
    "pixtral": _pixtral,
}


def tower_of(config: PretrainedConfig) -> Tower:
    """The shape of the tower of a vision-language model without newlines.

    Raises:
        TokenselError: a model whose tower is not in :data:`TOWERS`.
    """
    key = family_key(config)
    if key not in TOWERS:
        raise TokenselError(f"the tower of a {key} cannot be counted: give one of {', '.join(TOWERS)}")
    return TOWERS[key](config)


def count_tower(config: PretrainedConfig, grids: Sequence[Sequence[int]]) -> int:
    """FLOPs from the pixels of some tiles to their tokens, as the language model is given them.

    Which of the tokens are dropped afterwards makes no difference: all of them are projected.

    Args:
        config: of a vision-language model without newlines.
        grids: rows and columns of each tile, in tokens.

    Raises:
        TokenselError: as :func:`tower_of`.
    """
    tower = tower_of(config)
    if tower.joined and len(grids):
        rows, columns = ([int(grid[axis]) for grid in grids] for axis in (0, 1))
        tokens = sum(high * wide for high, wide in zip(rows, columns))
        padding = (len(grids) * max(rows) * max(columns) - tokens) * tower.patches
        return tower.flops(1, tokens) + 2 * padding * tower.values * tower.width
    return sum(tower.flops(*map(int, grid)) for grid in grids)
