"""LLaVA-OneVision: LLaVA-NeXT's tiles with more grids, a Qwen2, and a compression that is switched off."""

from typing import Any

from transformers import LlavaOnevisionProcessor as StockProcessor
from transformers import PreTrainedModel

from tokensel.vlm.families.llava_next import LlavaNext

__all__ = ["OFF", "LlavaOnevision", "LlavaOnevisionProcessor", "switch_off"]

OFF = "anyres_max_1000"  # more tiles than there ever are


class LlavaOnevisionProcessor(StockProcessor):
    """The stock processor for images and text alone: its part for videos needs torchvision.

    It has the name of the stock class, so that the stock class reads what it saves.
    """

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    @property
    def video_token_id(self) -> int | None:
        """``None`` if the tokenizer has no video token: else every unknown word would count as one."""
        known = self.video_token in self.tokenizer.get_vocab()
        return self._video_token_id if known else None

    @video_token_id.setter
    def video_token_id(self, value: int | None) -> None:
        self._video_token_id = value


def switch_off(model: PreTrainedModel, processor: Any) -> str | None:
    """Switch interpolation off in model and processor; returns their rule, ``None`` if they have none."""
    native = getattr(model.config, "vision_aspect_ratio", None)
    if native is not None:
        model.config.vision_aspect_ratio = processor.vision_aspect_ratio = OFF
    return native


class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT; the images of a row with several of them stay uncut."""

    name = "LLaVA-OneVision"

    def processor(self, name: str, config: Any, **hub: Any) -> Any:
        return LlavaOnevisionProcessor.from_pretrained(name, **hub)
