"""Qwen2.5-VL in vLLM with a part of the visual tokens of its images, each at its place in the image.

Positions travel by vLLM's own means for models that prune videos: channels of the embeddings, which
``recompute_mrope_positions`` takes off. Its model runner asks for that where ``--video-pruning-rate`` is
above 0, which ``python -m tokensel serve`` sets. Videos are refused.
"""
# vLLM is no dependency of this package: vLLM alone imports this module, so where it is missing its types are
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import TokenCounter
from tokensel.serving.places import append_places, pending_positions, placed_positions, split_places
from tokensel.serving.pruning import GridPruner
from tokensel.serving.vllm_processing import KEEP, KeepProcessor
from tokensel.utils.errors import TokenselError
from tokensel.vlm.families.processors import image_processor_only, stock_processor

__all__ = ["TokenselQwen25Vl"]


class GridInfo(Qwen2_5_VLProcessingInfo):
    """Images alone, with a processor that needs no part for videos."""

    @cached_property
    def counter(self) -> TokenCounter:
        config = self.get_hf_config()
        return TokenCounter(config, ServeConfig.of(config))

    def get_hf_processor(self, **kwargs: Any) -> Any:
        return self.ctx.get_hf_processor(
            image_processor_only(stock_processor(self.get_hf_config())), **kwargs
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        # memory is reserved for an image of which nothing is dropped, as a request may ask for that
        return {"image": self.get_max_image_tokens()}


class KeptGridProcessor(KeepProcessor, Qwen2_5_VLMultiModalProcessor):
    """As many placeholders as the image will have kept tokens."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        token = self.info.get_hf_config().image_token_id
        keep = self._keep(hf_processor_mm_kwargs)

        def placeholders(item: int) -> list[int]:
            _, height, width = out_mm_kwargs["image"][item]["image_grid_thw"].data.tolist()
            return [token] * self.info.counter.count(height, width, keep)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


class _Reader(nn.Module):
    """In the place of a merger, for one call: keeps what it reads."""

    def __init__(self, merger: nn.Module):
        super().__init__()
        self.merger = merger

    def forward(self, patches: Tensor) -> Tensor:
        self.read = patches.flatten(0, -2)
        return self.merger(patches)


@MULTIMODAL_REGISTRY.register_processor(
    KeptGridProcessor, info=GridInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class TokenselQwen25Vl(Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL; only the kept visual tokens reach its language model."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.use_data_parallel:
            raise TokenselError(
                "mm_encoder_tp_mode is 'data': no process then has all tokens of an image; leave it out"
            )
        if not self.is_multimodal_pruning_enabled:
            raise TokenselError(
                "video_pruning_rate is not above 0, without which the engine asks for no places of kept "
                "tokens: start it with `python -m tokensel serve`"
            )
        self._pruner = GridPruner(self.config, self._tower, self.visual.merger)

    def _tower(self, pixel_values: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """What the merger reads, ``[patches, channels]``, and the embeddings that it makes."""
        merger = self.visual.merger
        self.visual.merger = reader = _Reader(merger)  # a hook would not do: vLLM may compile the call
        try:
            embeds = self.visual(pixel_values, grid_thw=grids.tolist())
        finally:
            self.visual.merger = merger
        return reader.read, embeds

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        if (pixel_values := kwargs.get("pixel_values")) is None:
            return []
        kept = self._pruner.embed(pixel_values, kwargs["image_grid_thw"], kwargs[KEEP].tolist())
        return [append_places(embeds, places) for embeds, places in kept]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Positions of a prompt, and how much those of new tokens differ from their number."""
        merge, images = self.config.vision_config.spatial_merge_size, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            grid = feature.data["image_grid_thw"].data
            side = int(grid[1:].max()) // merge
            images.append((feature.mm_position.offset, feature.mm_position.length, side))
        positions = pending_positions(len(input_tokens), images)
        return positions, int(positions.max()) + 1 - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Any,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Take the places off the embeddings of a piece of the prompt, and give its tokens these places."""
        parts = [split_places(embeds) for embeds in multimodal_embeddings]
        if parts:
            places = torch.cat([place for _, place in parts]).to(mrope_positions.device)
            ids = torch.as_tensor(input_ids, device=mrope_positions.device)[num_computed_tokens:]
            # the embeddings are those of the next placeholders
            coming = (ids == self.config.image_token_id).nonzero()[: len(places), 0] + num_computed_tokens
            mrope_positions = placed_positions(mrope_positions, coming, places)
        delta = int(mrope_positions.max()) + 1 - len(input_ids)
        return [embeds for embeds, _ in parts], mrope_positions, delta
