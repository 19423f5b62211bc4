"""LLaVA-NeXT in vLLM with a part of its visual tokens: vLLM's own class, whose images a Pruner embeds.

Positions are compact: the engine sees an ordinary, shorter prompt and counts its tokens from 0.
"""
# vLLM is no dependency of this package: vLLM alone imports this module, so where it is missing its types are
# pyright: reportMissingImports=false

import re
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokensel.serving.pruning import Pruner
from tokensel.serving.vllm_processing import KEEP, KeptTokensInfo, KeptTokensProcessor

__all__ = ["TokenselLlavaNext"]

# Newer releases of transformers save the vision tower without the module "vision_model", which vLLM expects.
TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): r"\g<1>vision_tower.vision_model."
    }
)


@MULTIMODAL_REGISTRY.register_processor(
    KeptTokensProcessor, info=KeptTokensInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class TokenselLlavaNext(LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT; only the kept visual tokens reach its language model."""

    hf_to_vllm_mapper = TOWER_NAMES | LlavaNextForConditionalGeneration.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._pruner = Pruner(self.config, self._features, self.multi_modal_projector, self.image_newline)

    def _features(self, pixel_values: Tensor) -> Tensor:
        return self._image_pixels_to_features(self.vision_tower, pixel_values)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        return self._pruner.embed(pixel_values, kwargs["image_sizes"], kwargs[KEEP].tolist())
