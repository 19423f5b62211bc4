"""Tokenizers of one token a character, and a chat template that puts images where they belong."""

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["LANGUAGE", "TOWER", "Pair", "template", "tokenizer", "vocabulary"]

Pair = tuple[PreTrainedModel, Any]  # a model and its processor; processors share no useful type

BASE = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = [c for c in string.printable if c not in "\r\x0b\x0c\t"]
# the shape of every language model here
LANGUAGE: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
# and of every tower that is named as CLIP's
TOWER: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def vocabulary(special: list[str]) -> dict[str, int]:
    """Ids of the tokens of :func:`tokenizer`."""
    return {token: i for i, token in enumerate(BASE + special + LETTERS)}


def tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """One token a character and one for each of ``special``; ``named`` are attributes such as image_token."""
    tokens = Tokenizer(models.WordLevel(vocabulary(special), unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.add_special_tokens(BASE + special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
        padding_side="left",
    )


def template(image: str) -> str:
    """A chat template in which each image is ``image``."""
    return (
        "{% for message in messages %}[INST] "
        "{% for part in message['content'] if part['type'] == 'image' %}" + image + "\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} [/INST]"
        "{% endfor %}"
    )
