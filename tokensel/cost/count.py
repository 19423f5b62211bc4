"""FLOPs and bytes by formula, from configurations alone: nothing is run, nothing is loaded.

A multiply-add counts as two. Attention is counted over the full matrix of queries and keys, as ``torch``'s
own FLOP counter does, although a causal kernel may skip half of it. Norms, activations and softmaxes are left
out: they move bytes, but their FLOPs are negligible next to those of the matrix products. Sliding
windows are left out, too: attention and cache of a prompt longer than its window are counted whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int
from transformers import PretrainedConfig

from tokensel.data.features import feature_width
from tokensel.utils.errors import check_keep

Count = TypeVar("Count", int, np.ndarray)


def count_layer(
    queries: Count, keys: Count, width: int, q_width: int, kv_width: int, hidden: int, matrices: int
) -> Count:
    """A Transformer layer: ``queries`` new tokens attend to ``keys``; its MLP has ``matrices`` matrices."""
    projections = 2 * q_width * width + 2 * kv_width * width  # queries and output; keys and values
    return 2 * queries * (projections + matrices * width * hidden) + 4 * queries * keys * q_width


def count_vision(
    config: PretrainedConfig, tiles: int = 1, layers: int | None = None, patches: int | None = None
) -> int:
    """FLOPs of a CLIP or SigLIP tower over ``tiles`` tiles.

    Args:
        config: a ``CLIPVisionConfig`` or ``SiglipVisionConfig``.
        tiles: tiles of the image, the thumbnail included.
        layers: how many of its layers are run; all by default.
        patches: patches of each tile; by default those of the tower's own image size.
    """
    depth = config.num_hidden_layers if layers is None else layers
    cells = patches or (config.image_size // config.patch_size) ** 2
    tokens = cells + (config.model_type.startswith("clip"))  # SigLIP has no CLS token
    width = config.hidden_size
    embedding = 2 * cells * config.num_channels * config.patch_size**2 * width
    layer = count_layer(tokens, tokens, width, width, width, config.intermediate_size, 2)
    return tiles * (embedding + depth * layer)


def layers_read(config: PretrainedConfig) -> int:
    """How many layers of its tower a LLaVA needs: all up to the last one whose output it reads."""
    read, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return max(index % (count + 1) for index in ([read] if isinstance(read, int) else read))


def count_trunk(config: PretrainedConfig, tokens: int, tiles: int = 1) -> int:
    """FLOPs of a selector over ``tiles`` rows of ``tokens`` tokens, its two-logit head included."""
    width = config.width
    layer = count_layer(tokens, tokens, width, width, width, int(width * config.mlp_ratio), 2)
    return tiles * (config.layers * layer + 2 * tokens * width * 2)


def count_training(config: PretrainedConfig, tokens: int, tiles: int = 1) -> int:
    """FLOPs of one training step of a selector and its reconstructor.

    A backward pass counts as two forward passes.
    """
    head = (
        2 * tiles * tokens * config.width**2
    )  # the reconstructor's head, in place of the selector's two logits
    return 3 * (2 * count_trunk(config, tokens, tiles) - 4 * tiles * tokens * config.width + head)


def count_projector(config: PretrainedConfig, tokens: int) -> int:
    """FLOPs of LLaVA's two-layer projector over ``tokens`` visual tokens."""
    read, width = (
        feature_width(config.vision_config, config.vision_feature_layer),
        config.text_config.hidden_size,
    )
    return 2 * tokens * width * (read + width)


def count_decoder(config: PretrainedConfig, new: int, past: int = 0) -> int:
    """FLOPs of a language model over ``new`` tokens after ``past`` cached ones, and of one row of logits.

    Args:
        config: of a language model whose MLP has a gate: Llama, Mistral, Qwen2, Qwen3, Gemma.
        new: tokens of one row that pass through the layers: the prompt, or 1 in decoding.
        past: tokens whose keys and values are in the cache.
    """
    layer = _decoder_layer(config, new, past + new)
    return config.num_hidden_layers * layer + 2 * config.hidden_size * config.vocab_size


def _decoder_layer(config: PretrainedConfig, queries: Count, keys: Count) -> Count:
    q_width, kv_width = (_head(config) * n for n in (config.num_attention_heads, config.num_key_value_heads))
    return count_layer(queries, keys, config.hidden_size, q_width, kv_width, config.intermediate_size, 3)


def _head(config: PretrainedConfig) -> int:
    """Channels of one head, which together may be wider or narrower than the model (Qwen3, Gemma)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count_layers(config: PretrainedConfig, layers: int, tokens: int) -> int:
    """FLOPs of some layers of a language model over the ``tokens`` of one row, without logits."""
    return layers * int(_decoder_layer(config, tokens, tokens))


def held_tokens(text: int, visual: Int[np.ndarray, "steps layers"]) -> Int[np.ndarray, "steps layers"]:
    """Tokens of one row in each layer's cache after each generation step.

    Args:
        text: tokens of the prompt besides the image.
        visual: visual tokens, newlines included, that each layer holds at each step. Step 0 is the prefill,
            and every further step adds a token of the answer.
    """
    return text + visual + np.arange(len(visual))[:, None]


def count_answer(
    config: PretrainedConfig,
    text: int,
    visual: Int[np.ndarray, "steps layers"],
    ranked: Iterable[tuple[int, int]] = (),
) -> int:
    """FLOPs of a language model that generates an answer while visual tokens are dropped.

    Args:
        config: of a language model whose MLP has a gate: Llama, Mistral, Qwen2, Qwen3, Gemma.
        text: tokens of the prompt besides the image.
        visual: see :func:`held_tokens`; one step for each token of the answer.
        ranked: step and layer of every row of attention that is computed in addition to the model's own, to
            rank tokens.
    """
    held, width = held_tokens(text, visual), config.hidden_size
    queries = np.where(np.arange(len(held))[:, None] == 0, held, 1)
    layers = int(_decoder_layer(config, queries, held).sum())
    # the query of the ranking token a second time, and its product with every key
    q_width = config.num_attention_heads * _head(config)
    ranking = sum(2 * q_width * (width + int(held[step, layer])) for step, layer in ranked)
    return layers + len(held) * 2 * width * config.vocab_size + ranking


def kv_bytes(config: PretrainedConfig, tokens: int, bytes_each: int = 2) -> int:
    """Bytes of the keys and values of ``tokens`` tokens of one row, with ``bytes_each`` bytes a number."""
    kv_width = config.num_key_value_heads * _head(config)
    return 2 * config.num_hidden_layers * kv_width * tokens * bytes_each


def step_bytes(config: PretrainedConfig, held: int, rows: int = 1, bytes_each: int = 2) -> int:
    """Bytes that one decode step has to read: the weights once, and the keys and values of every row.

    A decode step is bound by memory, so that the ratio of two such numbers bounds what dropping tokens can
    gain.

    Args:
        config: of a language model whose MLP has a gate: Llama, Mistral, Qwen2, Qwen3, Gemma.
        held: tokens in the cache of each row.
        rows: answers that are generated at a time.
        bytes_each: bytes of a number.
    """
    # a product of one token with a matrix takes two FLOPs for each weight; without keys there is no attention
    # to count
    weights = (
        config.num_hidden_layers * _decoder_layer(config, 1, 0)
    ) // 2 + config.hidden_size * config.vocab_size
    return weights * bytes_each + rows * kv_bytes(config, held, bytes_each)


@dataclass(frozen=True)
class Cost:
    """FLOPs until the first token of an answer, part by part."""

    encoder: int
    selector: int
    projector: int
    prefill: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.encoder + self.selector + self.projector + self.prefill

    def speedup(self, full: "Cost") -> float:
        """Speed-up of the first token over ``full`` if latency were proportional to FLOPs."""
        return full.total / self.total


def first_token(
    config: PretrainedConfig,
    tiles: int,
    visual: int,
    text: int,
    keep: float = 1.0,
    newlines: int = 0,
    selector: PretrainedConfig | None = None,
    encoder_layers: int | None = None,
) -> Cost:
    """FLOPs of a LLaVA from pixels to the first token of the answer, for one question.

    Args:
        config: configuration of the whole model.
        tiles: tiles of the image, the thumbnail included.
        visual: visual tokens after unpadding, newlines not counted.
        text: tokens of the prompt besides the image.
        keep: fraction of the visual tokens that reach projector and language model, in (0, 1].
        newlines: newline tokens that reach the language model.
        selector: configuration of the selector, if it is used.
        encoder_layers: how many layers of the tower are run; by default all, as the stock model does.

    Raises:
        TokenselError: ``keep`` outside (0, 1].
    """
    check_keep(keep)
    vision = config.vision_config
    kept = max(1, round(keep * visual)) if visual else 0
    cells = (vision.image_size // vision.patch_size) ** 2
    return Cost(
        encoder=count_vision(vision, tiles, layers=encoder_layers),
        selector=count_trunk(selector, cells, tiles) if selector else 0,
        projector=count_projector(config, kept),
        prefill=count_decoder(config.text_config, text + kept + newlines),
    )
