"""LLaVA-NeXT and LLaVA-OneVision in vLLM with a part of their visual tokens: its classes, and a TilePruner.

Positions are compact: the engine sees an ordinary, shorter prompt and counts its tokens from 0.
"""
# vLLM is no dependency of this package: vLLM alone imports this module, so where it is missing its types are
# pyright: reportMissingImports=false

import re
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokensel.serving.pruning import TilePruner
from tokensel.serving.vllm_processing import KEEP, KeptTilesProcessor, KeptTokensInfo, OnevisionInfo

__all__ = ["TokenselLlavaNext", "TokenselLlavaOnevision"]

# Newer releases of transformers save the vision tower without the module "vision_model", which vLLM expects.
TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): r"\g<1>vision_tower.vision_model."
    }
)


class _KeptTokens(nn.Module):
    """In front of a class of vLLM: only the kept visual tokens reach its language model."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        own: Any = self  # a model of vLLM, with these modules

        def tower(pixel_values: Tensor) -> Tensor:
            return own._image_pixels_to_features(own.vision_tower, pixel_values)

        self._pruner = TilePruner(own.config, tower, own.multi_modal_projector, own.image_newline)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        return self._pruner.embed(pixel_values, kwargs["image_sizes"], kwargs[KEEP].tolist())


@MULTIMODAL_REGISTRY.register_processor(
    KeptTilesProcessor, info=KeptTokensInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class TokenselLlavaNext(_KeptTokens, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT."""

    hf_to_vllm_mapper = TOWER_NAMES | LlavaNextForConditionalGeneration.hf_to_vllm_mapper


@MULTIMODAL_REGISTRY.register_processor(
    KeptTilesProcessor, info=OnevisionInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class TokenselLlavaOnevision(_KeptTokens, LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision, its own compression switched off, as in :mod:`tokensel.vlm.native`."""

    hf_to_vllm_mapper = TOWER_NAMES | LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
