"""A second question on the cache of the first."""

import pytest
import torch
from reference import SCHEDULES, masked_reference, prompt, vlm_of
from staged_reference import STAGED, staged_reference

from tokensel.schedules import FastV
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm
from tokensel.vlm.followup import follow_up, next_turn

ROWS, SECOND = [1, 3, 2], ["who", "is it a cat?", "why not"]
MOST = 6
WHOLE = FastV(2, 1.0)  # drops nothing


def ending(vlm: Vlm, reduced, schedule=None) -> Vlm:
    """The model with an end token that cuts the first answer of one row at least, and not of all."""
    tokens = vlm.generate_output(reduced, MOST, schedule).tokens
    inner = [
        t for t in tokens[:, 1:-1].flatten().tolist() if not all(t in row for row in tokens[:, :-1].tolist())
    ]
    assert inner, "one row has to end early"
    vlm.model.generation_config.update(eos_token_id=[2, inner[0]])
    return vlm


def check_conversation(vlm: Vlm, asked, logits: torch.Tensor) -> None:
    """By ``logits`` [rows, steps, vocabulary] every answer is the likeliest; between the two is the turn."""
    ends = vlm.model.generation_config.eos_token_id
    tokenizer = vlm.processor.tokenizer
    for row, (start, begin, stop) in enumerate(asked.spans.tolist()):
        tokens = asked.output.tokens[row].tolist()
        turn = tokenizer(next_turn(vlm, SECOND[row]), add_special_tokens=False).input_ids
        assert tokens[start:begin] == turn and tokens.count(0) >= len(tokens) - stop
        best = logits[row].argmax(-1).tolist()
        assert best[:start] == tokens[:start] and best[begin:stop] == tokens[begin:stop]
        assert start == MOST or best[start] in ends, "the first answer ends where its model ends it"
        assert stop == begin + MOST or tokens[stop - 1] in ends
        assert not set(ends) & {*tokens[:start], *tokens[begin : stop - 1]}
        for text, low, high in ((asked.first[row], 0, start), (asked.second[row], begin, stop)):
            assert text == tokenizer.decode(tokens[low:high], skip_special_tokens=True).strip()
    assert asked.output.lengths.tolist() == asked.spans[:, 2].tolist()


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_what_a_scorer_left_is_read_by_both_questions(text, keep):
    vlm = vlm_of(text)
    reduced = prompt(vlm, ROWS, keep)
    asked = follow_up(ending(vlm, reduced), reduced, SECOND, MOST)
    assert len(set(asked.spans[:, 0].tolist())) > 1
    written = asked.output.tokens
    _, logits = masked_reference(vlm, reduced, WHOLE, written.shape[1], written=written)
    check_conversation(vlm, asked, logits)


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["fastv", "vtw", "exponential", "fastv-drop", "priortr", "pyramiddrop"])
def test_what_a_schedule_dropped_stays_dropped(text, name):
    vlm, schedule = vlm_of(text), (SCHEDULES | STAGED)[name]
    reduced = prompt(vlm, ROWS)
    asked = follow_up(ending(vlm, reduced, schedule), reduced, SECOND, MOST, schedule)
    written, reference = asked.output.tokens, staged_reference if name in STAGED else masked_reference
    _, logits = reference(vlm, reduced, schedule, written.shape[1], written=written)
    check_conversation(vlm, asked, logits)
    assert asked.output.pruning is not None
    left = torch.stack(asked.output.pruning.cached)  # [steps, layers, rows]
    total = reduced.prompt.visual.sum(1)
    falls, fewer = bool((left.diff(dim=0) <= 0).all()), bool((left[-1] < total).any())
    assert falls and fewer, "nothing comes back"


def test_rows_do_not_depend_on_each_other():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, ROWS, 0.5)
    together = follow_up(ending(vlm, reduced), reduced, SECOND, MOST)
    assert len({*together.first, *together.second}) > 3
    for row, index in enumerate(ROWS):
        # the question of a row is that of its place in the batch
        alone = prompt(vlm, [*ROWS[:row], index], 0.5)
        other = follow_up(vlm, alone, SECOND[: row + 1], MOST)
        assert (other.first[row], other.second[row]) == (together.first[row], together.second[row])


def test_a_template_writes_the_turn_between_two_answers():
    vlm = vlm_of("llama")
    assert next_turn(vlm, "and?") == "[INST] and? [/INST]"
    vlm.processor.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'][0]['text'] }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    assert next_turn(vlm, "and?") == "</s><s>user:and?</s><s>assistant:"


@pytest.mark.parametrize(
    "template, line",
    [
        ("{{ messages[-1]['content'][0]['text'] }}", "another way"),
        ("{% for m in messages %}{{ loop.length }}{{ m['content'][0]['text'] }}{% endfor %}", "another way"),
        (
            "{% if messages[1:] %}{{ raise_exception('one turn alone') }}{% endif %}"
            "{{ messages[0]['content'][0]['text'] }}",
            "takes no second turn .*one turn alone",
        ),
    ],
)
def test_a_template_without_second_turns_is_one_line(template, line):
    vlm = vlm_of("llama")
    vlm.processor.chat_template = template
    with pytest.raises(TokenselError, match=line):
        next_turn(vlm, "and?")


def test_bad_input_is_one_line():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [1, 3])
    with pytest.raises(TokenselError, match="1 questions for 2 prompts"):
        follow_up(vlm, reduced, ["who"])
    with pytest.raises(TokenselError, match="max_new_tokens is 0"):
        follow_up(vlm, reduced, ["who", "why"], 0)
    with pytest.raises(TokenselError, match="stands for an image"):
        follow_up(vlm, reduced, ["who", "<image>"])
    vlm.processor.tokenizer.eos_token = None
    with pytest.raises(TokenselError, match="no end token"):
        follow_up(vlm, reduced, ["who", "why"])
