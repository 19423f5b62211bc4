"""Fewer visual tokens in engines that serve many users, such as vLLM: a plugin, and shortened prompts.

The command line and vLLM's processes import this package, and most of them need no prompts: they are imported
when they are used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokensel.serving.embeddings import embeddings_field, prompt_embeddings

__all__ = ["embeddings_field", "prompt_embeddings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tokensel.serving import embeddings

    return getattr(embeddings, name)
