"""A running vLLM gives the answers of the adapter, token for token, whatever else it is asked at the time."""

import base64
import http.client
import io
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="vllm is not installed: these tests run by `make serving`")

from tokensel.book.mini.world import draw_page
from tokensel.scorers import Scorer, make_scorer
from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import TokenCounter
from tokensel.vlm import Vlm, load_vlm, reduce_inputs

pytestmark = pytest.mark.timeout(1200)  # seconds; the first of them starts the server
KEEPS = (1.0, 0.5, 0.3, 0.1)
TASKS = {"forms": (40, 8), "transcribe": (10, 64)}  # how many questions, and how many new tokens
NEW = {task: new for task, (_, new) in TASKS.items()}


@lru_cache
def asked(task: str, index: int) -> tuple[Image.Image, str]:
    """A page of the small world and a question about it."""
    page = draw_page(task, "test", index)
    return page.image, page.questions[index % len(page.questions)].question


QUESTIONS = [(task, index) for task, (count, _) in TASKS.items() for index in range(count)]


def scorer_of(engine) -> Scorer:
    return make_scorer(engine.scorer["scorer"], selector=engine.scorer.get("selector"))


@pytest.fixture(scope="module")
def vlm(engine) -> Vlm:
    torch.set_num_threads(1)
    return load_vlm(engine.model, "cpu")


@pytest.fixture(scope="module")
def expected(engine, vlm) -> dict[tuple[str, int, float], tuple[list[int], int]]:
    """New tokens and length of the prompt by question and keep, from the adapter."""
    scorer = scorer_of(engine)
    answers = {}
    for task, index in QUESTIONS:
        image, question = asked(task, index)
        inputs = vlm.inputs([image], [vlm.prompt(question)])
        for keep in KEEPS:
            reduced = reduce_inputs(vlm.model, inputs, scorer, keep, positions=engine.positions)
            out = vlm.generate_output(reduced, NEW[task])
            answers[task, index, keep] = (
                out.tokens[0, : int(out.lengths[0])].tolist(),
                int(reduced["attention_mask"].sum()),
            )
    return answers


def part(image: Image.Image | bytes) -> dict[str, Any]:
    """An image, or the bytes of something else, as a part of a message."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"},
    }


def body(model: str, parts: list[dict[str, Any]], new: int, keep: float | None = None) -> dict[str, Any]:
    """The request for a greedy answer; without a keep, that of the server counts."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": new,
        "temperature": 0.0,
        "add_special_tokens": True,  # the chat template of the small model begins without one
        "return_token_ids": True,
    }
    return asked if keep is None else asked | {"mm_processor_kwargs": {"keep": keep}}


def post(url: str, request: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/chat/completions", data, headers), timeout=250
    ) as response:
        return json.load(response)


def hang_up(engine, request: dict[str, Any]) -> None:
    """Send a request, and go."""
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=250)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
    connection.close()


def answer(engine, task: str, index: int, keep: float | None) -> tuple[list[int], int]:
    """New tokens, and the length of the prompt."""
    image, question = asked(task, index)
    parts = [part(image), {"type": "text", "text": question}]
    reply = post(engine.url, body(engine.model, parts, NEW[task], keep))
    return reply["choices"][0]["token_ids"], reply["usage"]["prompt_tokens"]


def test_one_request_at_a_time_is_answered_as_by_the_adapter(engine, expected):
    for task, index in [("forms", 0), ("transcribe", 0)]:
        for keep in KEEPS:
            assert answer(engine, task, index, keep) == expected[task, index, keep]


def test_sixteen_clients_with_mixed_images_and_keeps_are_answered_as_by_the_adapter(engine, expected):
    # neighbours differ in image and keep, so that a step of the engine mixes both
    many = len(QUESTIONS)
    rows = [(*QUESTIONS[(3 * i + j) % many], keep) for i in range(many) for j, keep in enumerate(KEEPS)]
    assert set(rows) == set(expected)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda row: answer(engine, *row), rows))
    wrong = [row for row, given in zip(rows, answers, strict=True) if given != expected[row]]
    assert not wrong
    assert len({length for _, length in answers}) > 8, "the prompts have many lengths"


def test_without_a_keep_in_the_request_that_of_the_server_counts(engine, expected):
    assert answer(engine, "forms", 1, None) == expected["forms", 1, 0.5]


def test_at_keep_1_the_answers_are_those_of_the_stock_model(vlm, expected):
    # the engine's answers are compared with these above
    for task, index in QUESTIONS:
        image, question = asked(task, index)
        inputs = vlm.inputs([image], [vlm.prompt(question)])
        tokens = vlm.model.generate(**inputs, max_new_tokens=NEW[task], do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        assert new == expected[task, index, 1.0][0]
        assert inputs["input_ids"].shape[1] == expected[task, index, 1.0][1]


def test_answers_depend_on_the_places_of_kept_tokens(engine, vlm, expected):
    """Of what is compared above: an engine that did not place the tokens would give other answers."""
    if engine.positions == "compact":
        pytest.skip("its tokens have no places")
    changed = 0
    for task, index in QUESTIONS[:10]:
        image, question = asked(task, index)
        inputs = vlm.inputs([image], [vlm.prompt(question)])
        reduced = reduce_inputs(vlm.model, inputs, scorer_of(engine), 0.3)
        positions = reduced["position_ids"].clone()
        positions[2:, reduced.visual] = positions[1, reduced.visual]  # rows and columns as the first token's
        out = vlm.generate_output(reduced | {"position_ids": positions}, NEW[task])
        changed += out.tokens[0, : int(out.lengths[0])].tolist() != expected[task, index, 0.3][0]
    assert changed >= 5


def test_several_images_in_a_prompt_are_answered_as_by_the_adapter_or_refused(engine, vlm):
    images, question = [asked("forms", index)[0] for index in (0, 1)], asked("forms", 1)[1]
    request = body(engine.model, [*map(part, images), {"type": "text", "text": question}], 8, keep=0.3)
    if engine.model.endswith("onevision"):  # which cuts an image only where it is alone
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(engine.url, request)
        with caught.value as error:
            assert error.code == 400
        return
    scorer = scorer_of(engine)
    inputs = vlm.inputs([images], [vlm.prompt(question, 2)])
    reduced = reduce_inputs(vlm.model, inputs, scorer, 0.3, positions=engine.positions)
    out = vlm.generate_output(reduced, 8)
    reply = post(engine.url, request)
    assert reply["usage"]["prompt_tokens"] == int(reduced["attention_mask"].sum())
    assert reply["choices"][0]["token_ids"] == out.tokens[0, : int(out.lengths[0])].tolist()


def test_bad_requests_are_refused_and_the_engine_lives_on(engine, expected):
    image, question = asked("forms", 2)
    text = {"type": "text", "text": question}
    asked_of = partial(body, engine.model)
    refused = [
        asked_of([part(b"no image"), text], 8),
        asked_of([part(image), text], 8, keep=0.0),
        asked_of([part(image), text], 8, keep=1.5),
        asked_of([part(image), text], 8) | {"mm_processor_kwargs": {"keep": "half"}},
    ]
    for request in refused:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(engine.url, request)
        with caught.value as error:
            assert error.code in (400, 422), error.read()
    assert answer(engine, "forms", 3, 0.3) == expected["forms", 3, 0.3]


def counted_size(vlm: Vlm, image: Image.Image) -> tuple[int, int]:
    """Height and width of an image as a TokenCounter takes them: in pixels, or in patches when scaled."""
    if vlm.model.config.model_type != "qwen2_5_vl":
        return image.size[1], image.size[0]
    _, height, width = vlm.processor.image_processor(images=[image])["image_grid_thw"][0].tolist()
    return height, width


def test_images_of_every_size_beside_broken_ones_and_clients_that_hang_up(engine, vlm, expected, requests):
    counter = TokenCounter(vlm.model.config, ServeConfig(engine.model))
    asked_of, text = partial(body, engine.model), {"type": "text", "text": "what is it?"}
    alone = post(engine.url, asked_of([text], 1))["usage"]["prompt_tokens"]
    inputs = vlm.inputs([asked("forms", 0)[0]], [vlm.prompt("what is it?")])
    # tokens of a prompt besides those of its image
    around = int((inputs["input_ids"] != vlm.model.config.image_token_id).sum())

    def ask(number: int) -> str | None:
        """What is wrong with the answer to one of the requests; ``None`` if nothing is."""
        rng = np.random.default_rng(number)
        size, keep = rng.integers(8, 400, 2), float(rng.choice(KEEPS))
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        kind = number % 8
        if kind == 0:
            return (
                None if post(engine.url, asked_of([text], 1))["usage"]["prompt_tokens"] == alone else "text"
            )
        if kind == 1:  # a client that does not wait
            hang_up(engine, asked_of([part(image), text], 64, keep))
            return None
        if kind == 2:
            try:
                post(engine.url, asked_of([part(image.tobytes()[:200]), text], 1, keep))
            except urllib.error.HTTPError as error:
                with error:
                    return None if error.code == 400 else f"{error.code}"
            return "an answer about a broken image"
        if kind == 3:  # one of the questions whose answers are known, token for token
            row = known[number % len(known)]
            return None if answer(engine, *row) == expected[row] else f"another answer to {row}"
        length = post(engine.url, asked_of([part(image), text], 1, keep))["usage"]["prompt_tokens"]
        wanted = around + counter.count(*counted_size(vlm, image), keep)
        return None if length == wanted else f"{length} tokens for {wanted} ({size}, keep {keep})"

    known, memory = sorted(expected), []
    with ThreadPoolExecutor(64) as clients:
        waiting = [clients.submit(ask, number) for number in range(requests)]
        for number, asked_for in enumerate(waiting):
            assert (wrong := asked_for.result()) is None, wrong
            if number % (requests // 10) == 0:
                memory.append(engine.memory())
    print(f"\n{engine.model}: {requests} requests; MB:", *(held >> 20 for held in memory))
    if requests >= 2000:  # by then its caches are full, and every page of the memory for keys and values used
        assert memory[-1] < 1.02 * memory[-3]
    assert answer(engine, "forms", 4, 0.5) == expected["forms", 4, 0.5]
    assert engine.process.poll() is None
