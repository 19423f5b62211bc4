"""The model for lmms-eval, called as lmms-eval calls it: with a context, options and a document."""

from types import SimpleNamespace

import pytest
import suite_tiny
import tiny_families
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_selector

from tokensel.benchmarks.plugin import Tokensel
from tokensel.methods import Batch, prepare
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin")
    tiny_selector().save_pretrained(path / "chooser")
    suite_tiny.save_models(path)
    return path


def documents():
    pictures = [
        [suite_tiny.page(0)],
        [suite_tiny.page(1)],
        [suite_tiny.page(2), suite_tiny.page(4)],
        [],
    ]
    return [{"pictures": each, "text": f"what{'?' * number}"} for number, each in enumerate(pictures)]


def requests(limits=(3, 7, 3, None)):
    options = [{} if limit is None else {"max_new_tokens": limit} for limit in limits]
    return [
        SimpleNamespace(args=(each["text"], option, lambda doc: doc["pictures"], number, "task", "test"))
        for number, (each, option) in enumerate(zip(documents(), options))
    ]


def model(folder, **options) -> Tokensel:
    made = Tokensel(str(folder / "tiny-llava"), device="cpu", **options)
    made.task_dict = {"task": {"test": documents()}}
    return made


def test_answers_come_whole_and_in_the_order_of_the_requests(folder, monkeypatch):
    monkeypatch.setattr("tokensel.benchmarks.plugin.UNLIMITED", 5)
    chosen = model(
        folder, method="selector", selector=str(folder / "chooser"), keep=0.3, batch_size=3, newline="row"
    )
    answers = chosen.generate_until(requests())
    for document, answer, limit in zip(documents(), answers, (3, 7, 3, 5)):
        batch = Batch(chosen.vlm, [document["pictures"] or None], [document["text"]])
        alone = prepare(batch, "selector", 0.3, {"newline": "row"}, chosen.scorer)
        assert answer == chosen.vlm.generate(alone, limit)[0]
    assert len(set(answers)) > 1
    assert chosen.generate_until(requests()[::-1]) == answers[::-1]


def test_random_selection_does_not_depend_on_the_batch(folder):
    one, three = (model(folder, method="random", keep=0.2, seed=3, batch_size=size) for size in (1, 3))
    limits = (4, 4, 4, 4)
    assert one.generate_until(requests(limits)) == three.generate_until(requests(limits))


def test_what_it_does_not_do(folder):
    for method, told in (
        ("guess", "method 'guess' is unknown"),
        ("fastv", "fastv drops tokens inside the language model"),
    ):
        with pytest.raises(TokenselError, match=told):
            model(folder, method=method)
    plain = model(folder)
    with pytest.raises(TokenselError, match="generates text"):
        plain.loglikelihood([])
    with pytest.raises(TokenselError, match="single questions"):
        plain.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"selector": "FOLDER", "keep": 0.3}, "method full uses no selector: give method=selector"),
        ({"keep": 0.3}, "method full keeps no fraction"),
        ({"method": "norm", "keep": 0.0}, "keep is 0.0"),
        ({"method": "norm", "budget": "page"}, "budget is 'page'"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(options, line):
    with pytest.raises(TokenselError, match=line):
        Tokensel("no/such-model", device="cpu", **options)


def test_sampling_tasks_are_refused_and_stop_strings_cut(folder):
    plain = model(folder)
    (greedy,) = plain.generate_until(requests()[:1])
    request = requests()[0]
    request.args[1].update(temperature=0, top_p=0.1, num_beams=1, do_sample=False)
    assert plain.generate_until([request]) == [greedy]
    for options in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 3}):
        request = requests()[0]
        request.args[1].update(options)
        with pytest.raises(TokenselError, match="answers are greedy here"):
            plain.generate_until([request])
    request = requests(limits=(9, 9, 9, 9))[0]
    (whole,) = plain.generate_until([request])
    request.args[1]["until"] = [whole[2]]
    assert plain.generate_until([request]) == [whole.split(whole[2])[0]]


def prompts_of(plain: Tokensel, request, monkeypatch) -> list[str]:
    """The prompts that the processor is given for a request."""
    seen, inputs = [], Vlm.inputs
    with monkeypatch.context() as patch:
        patch.setattr(
            Vlm, "inputs", lambda vlm, images, texts: seen.extend(texts) or inputs(vlm, images, texts)
        )
        plain.generate_until([request])
    return seen


@given(pieces=st.lists(st.sampled_from(["what", " ", "?", "<image>", "\n"]), max_size=7))
@settings(max_examples=15, deadline=None)
def test_placeholders_in_a_context_are_the_places_of_its_images(folder, pieces):
    plain, (request,) = model(folder), requests()[2:3]
    context = "".join(pieces)
    request.args = (context, *request.args[1:])
    with pytest.MonkeyPatch.context() as patch:
        (prompt,) = prompts_of(plain, request, patch)
    if context.count("<image>") == 2:  # as many as the document has images
        assert prompt == plain.vlm.prompt("QUESTION", 0).replace("QUESTION", context)
    else:
        words = context.replace("<image>", "").strip() if "<image>" in context else context
        assert prompt == plain.vlm.prompt(words, 2)


def test_an_image_is_read_where_it_is_mentioned(folder, monkeypatch):
    plain = model(folder)
    before, after = requests()[1], requests()[1]
    before.args = ("<image>what?", *before.args[1:])
    after.args = ("what?<image>", *after.args[1:])
    assert prompts_of(plain, before, monkeypatch) != prompts_of(plain, after, monkeypatch)
    blind = model(folder, method="none")
    assert prompts_of(blind, after, monkeypatch)[0] == plain.vlm.prompt("what?", 0)


def test_each_process_of_several_has_a_gpu_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "tokensel.benchmarks.plugin.load_vlm", lambda name, device, dtype: asked.append(device)
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for rank, device in ((None, None), ("0", None), ("3", None), ("3", "cuda:1")):
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        Tokensel("no/such-model", **({} if device is None else {"device": device}))
    assert asked == [None, "cuda:0", "cuda:3", "cuda:1"]


QWEN = "<|vision_start|>{}<|vision_end|>"


@pytest.mark.parametrize(("family", "around"), [("qwen2_5_vl", QWEN), ("qwen3_vl", QWEN), ("internvl", "{}")])
def test_other_families_are_asked_in_their_own_prompts(family, around, tmp_path, monkeypatch):
    tiny_families.save(family, tmp_path)
    plain = Tokensel(str(tmp_path), device="cpu", method="norm", keep=0.4, batch_size=3)
    plain.task_dict = {"task": {"test": documents()}}
    asked = requests((4, 4, 4, 4))
    answers = plain.generate_until(asked)
    for document, answer in zip(documents(), answers):
        batch = Batch(plain.vlm, [document["pictures"] or None], [document["text"]])
        assert answer == plain.vlm.generate(prepare(batch, "norm", 0.4), 4)[0]
    # two images where the question mentions them, as the model's template writes images
    request, place = asked[2], around.format(plain.vlm.processor.image_token)
    request.args = ("first <image>, then <image>?", *request.args[1:])
    (prompt,) = prompts_of(plain, request, monkeypatch)
    assert prompt == plain.vlm.prompt("QUESTION", 0).replace("QUESTION", f"first {place}, then {place}?")
    assert place in plain.vlm.prompt("QUESTION", 1)
