"""A second question about the same image, answered from the cache that the first one left.

A method that reads the question keeps what this question needs. What it dropped is gone when the next
question comes, since a cache is kept from turn to turn. Here a conversation of two turns is one generation:
after the first answer the text of the second turn is written into it, and the answer to that follows. So
nothing that was dropped comes back, whether a scorer dropped it before the model or a schedule inside it, and
every row of a batch goes on at its own time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jinja2
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tokensel.schedules.schedule import Schedule
from tokensel.utils.errors import TokenselError, check_count, reason
from tokensel.vlm.generate import GenerationOutput
from tokensel.vlm.model import Vlm
from tokensel.vlm.reduce import Reduced

__all__ = ["FollowUp", "follow_up", "next_turn"]

_ANSWER = "\ue000"  # stands for an answer in a template; a private character, which no text holds


@dataclass
class FollowUp:
    """Two questions and their answers, row by row.

    Attributes:
        first: the answers to the first questions, without special tokens.
        second: the answers to the second ones.
        spans: of each row the tokens before the second turn, before the second answer, and to its end.
        output: the whole generation; its tokens hold both answers with the text of the second turn between
            them, and its schedule counts a step for each.
    """

    first: list[str]
    second: list[str]
    spans: Int[Tensor, "rows 3"]
    output: GenerationOutput


def next_turn(vlm: Vlm, question: str) -> str:
    """What the chat template writes between the end of an answer and the beginning of the next one.

    Args:
        vlm: the model.
        question: the user's next turn.

    Raises:
        TokenselError: no chat template, a broken one, one that takes no second turn or that writes the first
            turn in another way once it is answered, so that the cache would hold another text; or a question
            with an image placeholder.
    """
    before = vlm.prompt(question, False)  # checks the question as every first one is checked
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", question), ("assistant", _ANSWER), ("user", question))
    ]
    try:
        text = vlm.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, TypeError) as error:
        raise TokenselError(f"{vlm.name}: its chat template takes no second turn ({reason(error)})") from None
    head, answer, tail = text.partition(_ANSWER)
    if not answer or head.strip() != before.strip():
        raise TokenselError(
            f"{vlm.name}: its chat template writes an answered turn in another way than an open one, so that "
            "the cache of the first cannot be kept; ask each question with its image again"
        )
    return tail


@dataclass
class _Script:
    """Where each row of a batch is in its conversation.

    Attributes:
        turns: token ids of each row's second turn.
        ends: ids that end an answer.
        most: the most tokens of each of the two answers.
        starts: the step at which a row's second turn begins; -1 while it answers the first question.
        stops: how many tokens a row has when its second answer is complete; -1 before.
        step: tokens that every row has so far.
    """

    turns: list[list[int]]
    ends: set[int]
    most: int
    starts: list[int]
    stops: list[int]
    step: int = 0

    def forced(self, row: int, choice: int) -> int | None:
        """The token that row ``row`` has to write next, if it is not ``choice``, which the model would."""
        if self.starts[row] < 0 and (choice in self.ends or self.step == self.most):
            self.starts[row] = self.step  # the end token is the template's, if it has one there
        place = self.step - self.starts[row]
        return self.turns[row][place] if self.starts[row] >= 0 and place < len(self.turns[row]) else None

    def note(self, tokens: list[int]) -> list[bool]:
        """Count the token that every row has written, and return which rows are at their end."""
        self.step += 1
        for row, token in enumerate(tokens):
            answered = self.step - self.starts[row] - len(self.turns[row])
            if self.starts[row] < 0 or self.stops[row] >= 0 or answered < 1:
                continue
            if token in self.ends or answered == self.most:
                self.stops[row] = self.step
        return [stop >= 0 for stop in self.stops]


class _Write(LogitsProcessor):
    """Writes the second turn of each row as soon as its first answer ends."""

    def __init__(self, script: _Script):
        self.script = script

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        tokens = [self.script.forced(row, choice) for row, choice in enumerate(scores.argmax(-1).tolist())]
        for row, token in enumerate(tokens):
            if token is not None:
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


class _Stop(StoppingCriteria):
    """Ends a row when its second answer ends."""

    def __init__(self, script: _Script):
        self.script = script

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: object, **_: object
    ) -> Bool[Tensor, "rows"]:
        return torch.tensor(self.script.note(input_ids[:, -1].tolist()), device=input_ids.device)


def follow_up(
    vlm: Vlm,
    reduced: Reduced,
    questions: Sequence[str],
    max_new_tokens: int = 64,
    schedule: Schedule | None = None,
) -> FollowUp:
    """Answer the prompts, then a second question about the image of each, on the cache that the first left.

    >>> batch = Batch(vlm, images, ["what is the DATE?"])
    >>> follow_up(vlm, prepare(batch, "cdpruner", 0.2), ["and what is the NAME?"]).second

    Answers are the likeliest tokens. The second turn is read token by token, as an answer is; a server reads
    it in one pass, with the same result. A schedule that chooses at every step counts these steps too.

    Args:
        vlm: the model.
        reduced: the prompts of the first questions, from which a scorer may have dropped tokens.
        questions: the second question to each prompt.
        max_new_tokens: the most tokens of each of the two answers.
        schedule: drops further visual tokens inside the language model.

    Raises:
        TokenselError: another number of questions than prompts, a chat template that does not allow it (see
            :func:`next_turn`), a model without an end token, or what
            :func:`~tokensel.vlm.generate.generate` refuses.
    """
    rows, most = len(reduced["attention_mask"]), check_count("max_new_tokens", max_new_tokens, 64)
    if len(questions) != rows:
        raise TokenselError(f"{len(questions)} questions for {rows} prompts: give one for each prompt")
    tokenizer, config = vlm.processor.tokenizer, vlm.model.generation_config
    eos = getattr(config, "eos_token_id", None)
    ends = set(eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos])
    if None in ends:
        raise TokenselError(f"{vlm.name} has no end token: its first answer would have no end")
    turns = [
        tokenizer(next_turn(vlm, question), add_special_tokens=False).input_ids for question in questions
    ]
    script = _Script(turns, ends, most, [-1] * rows, [-1] * rows)
    output = vlm.generate_output(
        reduced,
        2 * most + max(map(len, turns)),
        schedule,
        logits_processor=LogitsProcessorList([_Write(script)]),
        stopping_criteria=StoppingCriteriaList([_Stop(script)]),
        # the script knows where answers end: an end token inside the conversation must not stop its row
        eos_token_id=vlm.model.config.get_text_config().vocab_size,
        pad_token_id=tokenizer.pad_token_id if getattr(config, "pad_token_id", None) is None else None,
    )
    spans = torch.tensor(
        [
            (start, start + len(turn), stop)
            for start, turn, stop in zip(script.starts, turns, script.stops, strict=True)
        ]
    )
    pieces = [
        tokenizer.decode(tokens[low:high], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for tokens, (start, begin, stop) in zip(output.tokens, spans.tolist())
        for low, high in ((0, start), (begin, stop))
    ]
    texts = [piece.strip() for piece in pieces]
    lengths = spans[:, 2].to(output.lengths.device)
    return FollowUp(texts[::2], texts[1::2], spans, replace(output, lengths=lengths))
