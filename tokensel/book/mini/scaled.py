"""A LLaVA-NeXT scaled down for two CPU cores: the tokens of the real one, and the shares of its parts.

    python -m tokensel.book.mini.scaled FOLDER

Weights are random: how long a model takes depends on its shapes. An image has as many tiles and tokens as in
the published model; tower and language model are smaller by about the same factor, so that the tower has some
5 % of the FLOPs to the first token, as in the one of 7 billion parameters. FOLDER/selector is a selector of
one layer with random weights.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaNextForConditionalGeneration

from tokensel.cost.published import PINPOINTS
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.profiling.shapes import llava_next

__all__ = ["save_scaled"]

MINI = "data/mini/llava-next"  # whose tokenizer and chat template it takes
SIDE, PATCH = 336, 14  # of a tile and a patch in pixels, as published
TOWER: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, projection_dim=128
)
LANGUAGE: dict[str, Any] = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8
)


def save_scaled(folder: str | Path, mini: str = MINI, seed: int = 0) -> None:
    """Save the model with its processor, and a selector in its folder ``selector``.

    Args:
        folder: where to.
        mini: folder of the small LLaVA-NeXT of the book.
        seed: of the weights.
    """
    processor: Any = AutoProcessor.from_pretrained(mini)
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    image_processor.size = {"shortest_edge": SIDE}
    image_processor.crop_size = {"height": SIDE, "width": SIDE}
    image_processor.image_grid_pinpoints = PINPOINTS
    processor.patch_size = PATCH
    config = llava_next(LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer)))
    config.vision_config = CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=PATCH)
    config.image_token_index = tokenizer.convert_tokens_to_ids(processor.image_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
        selector = TokenSelector(SelectorConfig(width=TOWER["hidden_size"], layers=1))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    selector.save_pretrained(Path(folder) / "selector")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    save_scaled(sys.argv[1])
