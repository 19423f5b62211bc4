"""The model for lmms-eval, called as lmms-eval calls it: with a context, options and a document."""

from types import SimpleNamespace

import pytest
import suite_tiny
from tiny import tiny_selector

from tokensel.benchmarks.plugin import Tokensel
from tokensel.methods import Batch, prepare
from tokensel.utils.errors import TokenselError


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
