"""Mistral 3 (Mistral Small 3.1 and later): images of any size, four patches a token, line breaks as text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from tokensel.utils.devices import device_of
from tokensel.vlm.encoded import Encoded, TowerOutput, content_keys
from tokensel.vlm.families.base import Family, Located, needed, tensor
from tokensel.vlm.layout import Layout, plain_layout

__all__ = ["Mistral3", "PixtralProcessor"]


class Mistral3(Family):
    """The tokens that end a row of the image, and the image, are text and stay.

    The processor pads images to the largest of the batch. Here they are held without padding, all pixels one
    after the other, so that what becomes of an image does not depend on the others.
    """

    name = "Mistral 3"
    ragged = True

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        if is_torchvision_available():
            made = super().processor(name, config, **hub)
        else:  # the stock class cannot even be imported
            made = PixtralProcessor.from_pretrained(name, **hub)
        # the processor asks for whole tokens; the image processor by itself would round to patches
        side = made.patch_size * made.spatial_merge_size
        made.image_processor.patch_size = {"height": side, "width": side}
        return made

    def locate(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Int[Tensor, "rows length"]
    ) -> Located:
        pixels, sizes = tensor(inputs, "pixel_values"), torch.zeros(0, 2, dtype=torch.long)
        flat = None
        if pixels is not None and len(pixels):
            sizes = needed(inputs, "image_sizes")
            images = [image[:, :high, :wide].flatten() for image, (high, wide) in zip(pixels, sizes.tolist())]
            flat = torch.cat(images).to(device_of(self.tower(model)))
        extras = {"image_sizes": sizes}
        return Located(self.tiles_layout(model.config, extras), flat, extras=extras)

    def merge(self, config: Any) -> int:
        """Rows, and columns, of the patches that become one token."""
        return config.spatial_merge_size

    def tiles_layout(self, config: Any, tiles: Mapping[str, Tensor]) -> Layout:
        grid = tiles["image_sizes"] // (config.vision_config.patch_size * self.merge(config))
        return plain_layout(grid, [1] * len(grid))

    def cut(self, image_processor: Any, image: Image, whole: bool) -> list[dict[str, Tensor]]:
        out = image_processor(images=[image], return_tensors="pt")
        sizes = torch.as_tensor(out["image_sizes"])
        return [{"pixel_values": out["pixel_values"].flatten(), "image_sizes": sizes}]

    def width(self, config: Any) -> int:
        return config.vision_config.hidden_size * self.merge(config) ** 2

    def images(self, encoded: Encoded) -> list[Float[Tensor, "3 _ _"]]:
        """The images of a batch that has some, ``[3, height, width]`` each, without padding."""
        assert encoded.pixel_values is not None  # asked only where there are images
        sizes = encoded.extras["image_sizes"].tolist()
        flat = encoded.pixel_values.split([3 * high * wide for high, wide in sizes])
        return [image.view(3, high, wide) for image, (high, wide) in zip(flat, sizes)]

    def keys(self, encoded: Encoded) -> Int[Tensor, "tiles"]:
        return torch.cat([content_keys(image[None]) for image in self.images(encoded)])

    def run(self, encoded: Encoded) -> TowerOutput:
        config, sizes = encoded.model.config, encoded.extras["image_sizes"]
        merge, layer = self.merge(config), config.vision_feature_layer
        high, wide = sizes.amax(0).tolist()
        images = [pad(i, (0, wide - i.shape[2], 0, high - i.shape[1])) for i in self.images(encoded)]
        padded = torch.stack(images)
        out = encoded.core.get_image_features(padded, image_sizes=sizes.to(padded.device), return_dict=True)
        hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        grids, groups = sizes // config.vision_config.patch_size, []
        # [1, patches of all images, channels], image after image
        for patches, (rows, columns) in zip(hidden[0].split(grids.prod(1).tolist()), grids.tolist()):
            # the square of patches of each token side by side: [tokens, merge**2 * channels]
            squares = patches.unflatten(0, (rows // merge, merge, columns // merge, merge)).transpose(1, 2)
            groups.append(squares.reshape(rows * columns // merge**2, -1))
        embeds = torch.cat(list(out.pooler_output))
        return TowerOutput(encoded.layout.by_tile(torch.cat(groups)), embeds=embeds, patches=merge**2)

    def embed(self, encoded: Encoded, tokens: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept width"]:
        projector, merge = encoded.core.multi_modal_projector, encoded.model.config.spatial_merge_size
        patches = projector.norm(tokens.unflatten(-1, (merge**2, -1)))
        # the merger reads all patches of one channel, then those of the next
        merged = projector.patch_merger.merging_layer(patches.transpose(1, 2).flatten(1))
        return projector.linear_2(projector.act(projector.linear_1(merged)))


@no_type_check  # from_pretrained reads the names of options off the code of __init__, which a check hides
class PixtralProcessor(ProcessorMixin):
    """What the stock class of this name makes of text and images, without torchvision.

    It has the name of the stock class, so that the stock class reads what it saves.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **options: Any,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_break_token = image_token, image_break_token
        self.image_end_token = image_end_token

    def __call__(self, images: Any = None, text: Sequence[str] = (), **options: Any) -> BatchFeature:
        """Tokens with a placeholder for each visual token, and pixels.

        Args:
            images: for each row with images a list of them.
            text: the prompts.
            options: of the tokenizer.
        """
        out, prompts = {}, list(text)
        flat = [image for row in images or () for image in row]
        if flat:
            side = self.patch_size * self.spatial_merge_size
            out = dict(self.image_processor(flat, patch_size=side, return_tensors="pt"))
            grids = (torch.as_tensor(out["image_sizes"]) // side).tolist()
            shown = iter([self._placeholders(rows, columns) for rows, columns in grids])
            prompts = [re.sub(re.escape(self.image_token), lambda _: next(shown), row) for row in prompts]
        return BatchFeature({**self.tokenizer(prompts, **options), **out})

    def _placeholders(self, rows: int, columns: int) -> str:
        row = self.image_token * columns + self.image_break_token
        return (row * rows).removesuffix(self.image_break_token) + self.image_end_token
