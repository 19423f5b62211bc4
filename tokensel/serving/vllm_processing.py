"""How many placeholders vLLM puts into a prompt for an image: as many as there will be kept tokens.

vLLM asks for the number before the vision tower runs. It tokenizes the prompt itself, so what the processor
of transformers counts does not matter here. A request names a keep of its own by
``{"mm_processor_kwargs": {"keep": 0.3}}``, which is part of the key of vLLM's caches.
"""
# vLLM is no dependency of this package: vLLM alone imports this module, so where it is missing its types are
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import LlavaOnevisionConfig
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement

from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import TokenCounter
from tokensel.utils.errors import check_keep
from tokensel.vlm.families.llava_onevision import LlavaOnevisionProcessor

__all__ = ["KEEP", "KeepProcessor", "KeptTilesProcessor", "KeptTokensInfo", "OnevisionInfo"]

KEEP = "keep"  # the name of the option of a request, and of the field that hands it to the model


class KeptTokensInfo(LlavaNextProcessingInfo):
    """Counts the kept tokens of an image."""

    @cached_property
    def counter(self) -> TokenCounter:
        config = self.get_hf_config()
        return TokenCounter(config, ServeConfig.of(config))

    def get_num_image_tokens(self, *, image_width: int, image_height: int, keep: float = 1.0) -> int:
        # memory is reserved for an image of which nothing is dropped, as a request may ask for that
        return self.counter.count(image_height, image_width, keep)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class OnevisionInfo(KeptTokensInfo):
    """The same for LLaVA-OneVision: images alone, and one in a prompt, as it leaves several of them uncut."""

    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config(LlavaOnevisionConfig)

    def get_hf_processor(self, **kwargs: Any) -> Any:
        return self.ctx.get_hf_processor(LlavaOnevisionProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}


class KeepProcessor(BaseMultiModalProcessor):
    """In front of a processor of vLLM: hands each image to the model with the keep of its request."""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # the prompt by which memory is measured has the most tokens that a request may ask for
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs={KEEP: 1.0})

    def _keep(self, options: Mapping[str, object]) -> float:
        """The keep of a request: its own, or the server's."""
        keep: Any = options.get(KEEP)
        return self.info.counter.options.keep if keep is None else check_keep(keep)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> Any:
        others = {name: value for name, value in hf_kwargs.items() if name != KEEP}
        processed = super()._call_hf_processor(hf_data, others)
        images = next(len(processed[name]) for name in ("image_sizes", "image_grid_thw") if name in processed)
        # in double precision: the model has to keep as many tokens as were counted here
        processed[KEEP] = torch.full((images,), self._keep(hf_kwargs), dtype=torch.float64)
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, KEEP: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}


class KeptTilesProcessor(KeepProcessor, LlavaNextMultiModalProcessor):
    """As many placeholders as the image will have kept tokens and newlines."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        token = self.info.get_hf_config().image_token_index
        keep = self._keep(hf_processor_mm_kwargs)

        def placeholders(item: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(item)
            count = self.info.get_num_image_tokens(
                image_width=size.width, image_height=size.height, keep=keep
            )
            return [token] * count

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]
