"""Shortened prompts for engines that serve many users, such as vLLM."""

from tokensel.serving.embeddings import embeddings_field, prompt_embeddings

__all__ = ["embeddings_field", "prompt_embeddings"]
