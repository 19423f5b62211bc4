"""What vLLM loads of this package: the names of the model classes, in every process of the engine.

A class is used where ``hf_overrides`` names it as the architecture, as ``python -m tokensel serve`` does.
Other models of the engine stay as they are.
"""

from tokensel.serving.architectures import ARCHITECTURES

__all__ = ["register"]


def register() -> None:
    """The entry point of the group ``vllm.general_plugins``; it may run several times."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]  # the engine that called this

    for served in ARCHITECTURES.values():
        ModelRegistry.register_model(served.name, f"{served.module}:{served.name}")
