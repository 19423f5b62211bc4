"""Tiles as the image processor cuts them, and many questions packed behind one image."""

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tokensel.book.mini.canvas import CELLS, PATCH, QA, TILE, Page
from tokensel.book.mini.general import BACKGROUNDS, choice
from tokensel.book.mini.model import build_tokenizer
from tokensel.book.mini.words import COLORS, SHAPES
from tokensel.vlm.layout import pack
from tokensel.vlm.native import OFF

MEAN, STD = (np.array(stat, np.float32)[:, None, None] for stat in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))


def tiles(page: Page) -> Float[Tensor, "tiles 3 height width"]:
    """Thumbnail and high-resolution tiles, normalised, as the image processor makes them."""
    width, height = page.image.size
    rows, columns = -(-height // TILE), -(-width // TILE)
    top, left = (rows * TILE - height) // 2, (columns * TILE - width) // 2
    padded = np.zeros((rows * TILE, columns * TILE, 3), np.uint8)
    padded[top : top + height, left : left + width] = np.asarray(page.image)
    cut = padded.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    if len(cut) > 1:  # a page of a single tile needs no thumbnail
        thumbnail = np.asarray(page.image.resize((TILE, TILE), Image.Resampling.BICUBIC))
        cut = np.concatenate([thumbnail[None], cut])
    pixels = cut.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD)


@lru_cache(maxsize=64)
def layout(core, size: tuple[int, int]) -> Int[Tensor, "packed"]:
    """For each visual token of a page of ``size``: tile * 64 + cell, or -1 for a newline; nothing is shrunk.

    The model's own code packs the indices, so unpadding and newlines are exactly the model's. A page of one
    tile (the first stage of the curriculum) is its rows with newlines, without a thumbnail.
    """
    newline = torch.full((1,), -1.0)
    if size == (TILE, TILE):
        cells = torch.arange(CELLS * CELLS).view(CELLS, CELLS)
        return torch.cat([cells, cells.new_full((CELLS, 1), -1)], 1).flatten()
    count = 1 + -(-size[0] // TILE) * -(-size[1] // TILE)
    index = torch.arange(count * CELLS * CELLS, dtype=torch.float32).view(count, CELLS * CELLS, 1)
    return pack(core, [index], torch.tensor([size]), newline, OFF)[0][:, 0].round().long()


@dataclass
class PackedQuestions:
    """Questions of a batch of pages, packed behind the visual tokens of each page.

    Each question sees the image and itself, never another question, and counts positions as if it stood
    alone: one row holds what would be ``questions`` rows of a batch.
    """

    ids: Int[Tensor, "pages text"]
    labels: Int[Tensor, "pages text"]  # -100 where nothing is predicted
    weights: Float[Tensor, "pages text"]  # of each label, so that a question's sum to 1
    block: Int[Tensor, "pages text"]  # number of the question, -1 for padding
    positions: Int[Tensor, "pages total"]
    # At the token that begins an answer: where what is asked about lies; elsewhere NaN. There and at the
    # question's end, before its options: the answer in a word, where that is a letter or a number; elsewhere
    # -100.
    spots: Float[Tensor, "pages text 2"]
    named: Int[Tensor, "pages text"]

    def mask(self) -> Float[Tensor, "pages 1 total total"]:
        """Added to the attention logits: 0 where attention is allowed, the lowest bfloat16 elsewhere."""
        prefix, total = self.positions.shape[1] - self.ids.shape[1], self.positions.shape[1]
        itself = torch.eye(self.ids.shape[1], dtype=torch.bool, device=self.ids.device)
        mask = (  # causal, and between the questions of a page blocked
            torch.ones(total, total, dtype=torch.bool, device=self.ids.device)
            .tril()
            .repeat(len(self.ids), 1, 1)
        )
        mask[:, prefix:, prefix:] &= (self.block[:, :, None] == self.block[:, None, :]) | itself
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(
            ~mask, torch.finfo(torch.bfloat16).min
        )
        return bias[:, None]

    def to(self, device: torch.device) -> "PackedQuestions":
        """The same on a device."""
        return PackedQuestions(
            *(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self))
        )


PAD = 0  # as in build_tokenizer
HEAD = 2  # text tokens before the image: <s> USER:


def pack_questions(
    pages: list[list[QA]], visual: int, rng: np.random.Generator, free: float = 0.0, drill: float = 0.0
) -> PackedQuestions:
    """Pack the questions of each page behind its ``visual`` visual tokens.

    A row is: <s> USER: | visual tokens | newline, question, answer, question, answer, ... A share ``free`` of
    the multiple-choice questions is asked without options and answered in words. A share ``drill`` asks for
    the letter of a given option, from which the model learns what the letters mean.
    """
    tokenizer = build_tokenizer()
    rows = [
        [(qa, *_turn(tokenizer, *_wording(qa, rng.random(), free, drill))) for qa in page] for page in pages
    ]
    prefix = HEAD + visual  # the position of the first text token after the image
    longest = max(sum(len(turn[1]) for turn in row) for row in rows)
    ids = torch.full((len(pages), longest), PAD)
    labels = torch.full((len(pages), longest), -100)
    weights = torch.zeros(len(pages), longest)
    block = torch.full((len(pages), longest), -1)
    positions = torch.zeros(len(pages), prefix + longest, dtype=torch.long)
    positions[:, :prefix] = torch.arange(prefix)
    spots, named = torch.full((len(pages), longest, 2), torch.nan), torch.full((len(pages), longest), -100)
    for row, turns in enumerate(rows):
        at = 0
        for number, (qa, turn, question, answer) in enumerate(turns):
            end = at + len(turn)
            ids[row, at:end] = torch.tensor(turn)
            labels[row, end - answer - 1 : end - 1] = torch.tensor(
                turn[-answer:]
            )  # predicted one token earlier
            weights[row, end - answer - 1 : end - 1] = 1 / answer
            block[row, at:end] = number
            if qa.spot:
                spots[row, end - answer - 1] = torch.tensor(qa.spot)
            if qa.options or len(qa.named) == 1:  # the last token: a digit has an empty one before it
                named[row, [at + question - 1, end - answer - 1]] = _ids(tokenizer, qa.named)[-1]
            positions[row, prefix + at : prefix + end] = prefix + torch.arange(len(turn))
            at = end
    return PackedQuestions(ids, labels, weights, block, positions, spots, named)


def _wording(qa: QA, draw: float, free: float, drill: float) -> tuple[str, str]:
    """Question and answer as the model gets them; ``draw``, uniform in [0, 1), selects the variant."""
    if qa.options and draw < free + drill:
        question, listed = qa.question.split(" A. ")
        return (question, qa.named) if draw < free else (f"which is {qa.named}? A. {listed}", qa.answers[0])
    return qa.question, qa.answers[0]


def drills(rng: np.random.Generator, rows: int, each: int) -> PackedQuestions:
    """Questions without an image, ``each`` in each of ``rows`` rows: which letter stands for a given option?

    From images alone the small model learns this separately for every shape; here the options are all words
    it knows.
    """
    words = tuple(
        piece[1:]
        for piece in sorted(build_tokenizer().get_vocab())
        if piece[1:].isalpha() and piece[0] == "\u2581"
    )
    pools = (SHAPES, tuple(COLORS), BACKGROUNDS, tuple("12345"), words)
    asked = []
    for _ in range(rows):
        options = [
            [str(option) for option in rng.permutation(pools[int(place)])[:4]]
            for place in rng.integers(5, size=each)
        ]
        asked.append([choice(rng, f"which is {four[0]}?", four[0], four, "drill") for four in options])
    return pack_questions(asked, 0, rng)


@lru_cache(maxsize=65536)
def _ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _turn(tokenizer, question: str, answer: str) -> tuple[list[int], int, int]:
    """Token ids of newline, question, answer and end; how many precede the options; the answer's length."""
    asked = _ids(tokenizer, f"\n{question}ASSISTANT:")
    answered = _ids(tokenizer, f"{answer}</s>")
    return [*asked, *answered], len(_ids(tokenizer, f"\n{question.split(' A. ')[0]}")), len(answered)


def patch_pixels(
    pixels: Float[Tensor, "tiles 3 height width"], shrink: int = 2
) -> Float[Tensor, "tiles cells channels"]:
    """Each patch at 4x4 pixels: a target besides the labels, so that the encoder keeps how a patch looks.

    With ``shrink`` 1 it is all of its 8x8 pixels.
    """
    small = torch.nn.functional.avg_pool2d(pixels, shrink)
    step = PATCH // shrink
    cells = small.unfold(2, step, step).unfold(3, step, step)  # [tiles, 3, 8, 8, 4, 4]
    return cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
