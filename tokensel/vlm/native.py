"""LLaVA-OneVision's own compression: switched off when the model is loaded, and available as a method.

OneVision cuts an image into up to 36 tiles. Where their joined map is larger than nine tiles, it is shrunk by
bilinear interpolation until it is about that large. The paper (Sec. 5.2) switches this off, and so does
:func:`~tokensel.vlm.load.load_vlm`, in the configurations of model and processor alike.

The "compression ratios of 1.7 to 2" for larger documents that the paper gives are the factor by which *each
side* of the map shrinks. The number of tokens shrinks by its square: a ratio of 1.7 leaves a third of the
map's tokens, a ratio of 2 a quarter. The paper's largest budget on OneVision, ``keep=0.6``, is 1/1.7, so it
keeps more tokens of a page than the interpolating model sees; ``keep`` 1/1.7² would match it.
:func:`count_tokens` counts the tokens with and without.
"""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from tokensel.utils.devices import device_of
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.families.llava_onevision import OFF, LlavaOnevisionProcessor, switch_off
from tokensel.vlm.layout import mark_cells, pack, tile_counts
from tokensel.vlm.reduce import Reduced, assemble

__all__ = ["OFF", "LlavaOnevisionProcessor", "count_tokens", "native", "switch_off"]


@torch.no_grad()
def native(encoded: Encoded, ratio: str | None) -> Reduced:
    """The prompt as the shipped model makes it: the joined map interpolated to a bounded size.

    Args:
        encoded: the batch, its placeholders counted without interpolation.
        ratio: what :func:`switch_off` returned, such as ``anyres_max_9``.

    Raises:
        TokenselError: the model has no compression of its own.
    """
    if ratio is None:
        raise TokenselError(
            f"method native: a {encoded.model.config.model_type} has no compression of its own; leave it "
            "out, or give a LLaVA-OneVision"
        )
    core, layout, sizes = encoded.core, encoded.layout, encoded.image_sizes
    kept, cells = torch.zeros_like(layout.cell), torch.zeros_like(layout.cell)
    visual = core.image_newline.new_zeros(0, core.image_newline.shape[0])
    if sizes is not None:
        tokens = encoded.features.tokens.to(device_of(core.multi_modal_projector))
        projected = core.multi_modal_projector(tokens)
        newline = core.image_newline.to(projected)
        visual = torch.cat(pack(core, projected.split(layout.tiles), sizes, newline, ratio))
        marks = mark_cells(core, layout.tiles, layout.tokens, sizes, ratio)
        lengths = torch.tensor([len(mark) for mark in marks], device=kept.device)
        first = torch.searchsorted(layout.image, torch.arange(len(marks), device=kept.device))
        # interpolated tokens come from no single place: they fill their image's placeholders from the front
        kept = torch.arange(len(kept), device=kept.device) - first[layout.image] < lengths[layout.image]
        cells[kept] = torch.cat(marks)
    return Reduced(
        *assemble(encoded, kept, visual, "compact", cells),
        n_visual=encoded.per_row(cells),
        n_visual_full=encoded.n_visual,
        n_newline=encoded.per_row(kept & ~cells),
        n_tiles=encoded.n_tiles,
        cells=layout.tokens,
    )


def count_tokens(
    model: PreTrainedModel, height: int, width: int, ratio: str | None = None
) -> tuple[int, int, int]:
    """Tiles, visual tokens and newlines of one image, by the model's own code; weights are not used.

    Args:
        model: a LLaVA, which may live on the meta device.
        height: of the image, in pixels.
        width: of the image, in pixels.
        ratio: the compression, such as ``anyres_max_9``; ``None`` for that of the model's configuration.
    """
    sizes: Int[Tensor, "1 2"] = torch.tensor([[height, width]])
    counts = tile_counts(model, {"image_sizes": sizes})
    vision = model.config.vision_config
    mark: Tensor = mark_cells(
        model.base_model, counts, (vision.image_size // vision.patch_size) ** 2, sizes, ratio
    )[0]
    return counts[0], int(mark.sum()), int((~mark).sum())
