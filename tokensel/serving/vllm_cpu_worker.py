"""vLLM's worker for CPUs, with places of kept tokens: its model runner leaves out one line of that for GPUs.

``python -m tokensel serve`` names it by ``--worker-cls`` where the model needs it and vLLM runs on the CPU.
"""
# vLLM is no dependency of this package: vLLM alone imports this module, so where it is missing its types are
# pyright: reportMissingImports=false

from typing import Any

from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.v1.worker.cpu_worker import CPUWorker

__all__ = ["PlacesCpuWorker"]


class PlacesCpuWorker(CPUWorker):
    """Asks the model for positions by ``recompute_mrope_positions``, as vLLM's runner for GPUs does."""

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        multimodal = self.model_config.multimodal_config
        self.model_runner.is_multimodal_pruning_enabled = (
            supports_multimodal_pruning(self.model_runner.get_model())
            and multimodal is not None
            and multimodal.is_multimodal_pruning_enabled()
        )
