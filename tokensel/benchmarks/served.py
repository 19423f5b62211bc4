"""An evaluation through servers: questions are asked over HTTP, and no model is loaded in this process.

``full`` asks for keep 1 and ``none`` leaves the image out. ``served`` is the method that a server was started
with, at each keep. A request names its keep as ``{"mm_processor_kwargs": {"keep": 0.3}}``, which is how vLLM
passes options of one request to a model's processor. A server that has one fixed keep is asked without, and
``--server-keep`` says what it is.

Records are told apart by the model's name on the servers, not by what stands behind it: a server with another
selector needs another name (``--served-model-name`` of vLLM), or the evaluation another ``out``.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from tqdm import tqdm

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import KEEPS, EvalConfig
from tokensel.benchmarks.dispatch import Request, ask_all
from tokensel.benchmarks.questions import Questions, image_digest
from tokensel.benchmarks.record_files import RecordFile, begin_record, missing_questions
from tokensel.benchmarks.records import Record, append_records
from tokensel.benchmarks.server import Reply, Server, ServerError, parse_body, parse_url
from tokensel.benchmarks.session import Session
from tokensel.benchmarks.shards import Shard
from tokensel.cost.answers import Work
from tokensel.utils.errors import TokenselError
from tokensel.utils.provenance import environment, json_digest
from tokensel.vlm.model import images_of_row

__all__ = ["ServedSession", "ask_servers"]

Content = list[dict[str, Any]]  # of a message: images, then the text


class ServedSession(Session):
    """One model behind one or more servers.

    Attributes:
        servers: they share the questions.
        engine: who the servers say owns the model, such as ``vllm``.
        unanswered: how many answers are missing after all was asked.
        errors: why, by how many requests were given up for it.
    """

    def __init__(self, config: EvalConfig):
        """
        Args:
            config: what to evaluate.

        Raises:
            TokenselError: a server does not answer, or the servers do not have one and the same model.
        """
        self.servers = [Server(url) for url in dict.fromkeys(map(parse_url, config.server))]
        models = {server.url: _only_model(server) for server in self.servers}
        self.name, self.engine = models[self.servers[0].url]
        for url, (name, _) in models.items():
            if name != self.name:
                raise TokenselError(
                    f"{url} serves {name} and {self.servers[0].url} {self.name}: give servers of one model"
                )
        self.model_digest = json_digest(["served", self.name])
        fixed = config.server_keep
        self.config = replace(config, keeps=(config.keeps or KEEPS) if fixed is None else (fixed,))
        self.unanswered, self.errors = 0, Counter[str]()
        self._body, self._checked = parse_body(config.body), fixed is not None

    def body(self, content: Content, max_new_tokens: int, keep: float) -> dict[str, Any]:
        """The request for a greedy answer; the keep is in it where there is an image."""
        body = self._body | {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
        }
        if len(content) > 1 and self.config.server_keep is None:
            body["mm_processor_kwargs"] = body.get("mm_processor_kwargs", {}) | {"keep": keep}
        return body

    def check_keep(self, content: Content) -> None:
        """Check once that every server follows the keep of a request: fewer tokens in the same prompt.

        A server that ignores fields it does not know would answer from the whole image.

        Args:
            content: a question with an image.

        Raises:
            TokenselError: a server ignores the keep or refuses it, or does not report lengths of prompts.
        """
        small = min(self.config.keeps) if min(self.config.keeps) < 1 else 0.5
        for server in [] if self._checked else self.servers:
            whole, part = (self._prompt_tokens(server, content, keep) for keep in (1.0, small))
            if part >= whole:
                raise TokenselError(
                    f"{server.url}: a prompt has {whole} tokens at keep 1 and {part} at keep {small:g}, so "
                    "keep is not followed; give --server-keep, 1 if nothing is dropped"
                )
        self._checked = True

    def _prompt_tokens(self, server: Server, content: Content, keep: float) -> int:
        """How many tokens a server counts in a prompt."""
        request = Request(self.body(content, 1, keep))
        _, reply = next(ask_all([server], [request], 1), (request, ServerError("no answer")))
        if isinstance(reply, ServerError):
            raise TokenselError(
                f"a request with keep {keep:g} got no answer ({reply}); if requests cannot choose their keep "
                "there, give --server-keep"
            )
        if reply.prompt_tokens is None:
            raise TokenselError(
                f"{server.url}: it reports no usage.prompt_tokens, which would show that keep is followed; "
                "give --server-keep"
            )
        return reply.prompt_tokens

    def check_fit(self) -> None:
        """Nothing to check: the server has the model, and :meth:`check_keep` needs a question."""

    def mean_cost(self, condition: Condition, work: Sequence[Work]) -> None:
        """The shape of the model is not known here, so its cost is not counted."""

    def identity(self, condition: Condition) -> dict[str, str]:
        """The request for an empty question: model, decoding, and the fields that the user adds."""
        content = [] if condition.method == "none" else [{}, {}]
        fixed = self.config.server_keep
        return {"request": json_digest(self.body(content, 0, 1.0)), "keep": f"fixed {fixed}" if fixed else ""}

    def provenance(self) -> dict[str, Any]:
        urls = [server.url for server in self.servers]
        facts = {"name": self.name, "digest": self.model_digest, "engine": self.engine, "servers": urls}
        machine = environment(torch.device("cpu"))  # of the process that asks
        return {"model": facts, **machine, "device": f"{len(urls)} servers"}

    def check_answered(self) -> None:
        if self.unanswered:
            ((error, _),) = self.errors.most_common(1) or [("no server answers", 0)]
            raise TokenselError(
                f"{self.unanswered} answers are missing ({error}); the others are kept: run the same command "
                "again to ask for these alone"
            )


def _only_model(server: Server) -> tuple[str, str]:
    """The name of the model that a server has, and its owner."""
    try:
        models = server.models()
    except ServerError as error:
        raise TokenselError(f"{error}; correct --server, or start the server first") from None
    if len(models) != 1:
        raise TokenselError(
            f"{server.url} serves {', '.join(models) or 'no model'}: give a server with one model"
        )
    return next(iter(models.items()))


def ask_servers(
    session: ServedSession,
    questions: Questions,
    files: Mapping[Condition, RecordFile],
    shard: Shard,
    bar: tqdm,
) -> int:
    """Ask the servers what is missing in ``files``.

    Returns:
        The number of new answers. Each is written as soon as it has come; the session counts those missing.
    """
    missing = {
        condition: {i for i in missing_questions(questions, file) if shard.holds(i)}
        for condition, file in files.items()
    }
    seeing = set().union(*(rows for condition, rows in missing.items() if condition.method != "none"))
    if (first := next((i for i in sorted(seeing) if questions.size(i)), None)) is not None:
        session.check_keep(_content(questions, first, _urls(questions.image(first))))
    bar.set_description(questions.benchmark.name, refresh=False)
    count, requests = 0, _requests(session, questions, missing)
    for request, reply in ask_all(session.servers, requests, session.config.concurrency):
        if isinstance(reply, ServerError):
            session.errors[str(reply)] += 1
            continue
        condition, record = _record(session, questions, request, reply)
        append_records(files[condition].path, [record])
        files[condition].add([record])
        count += 1
        bar.update(1)
    session.unanswered += sum(map(len, missing.values())) - count
    return count


def _requests(
    session: ServedSession, questions: Questions, missing: Mapping[Condition, set[int]]
) -> Iterator[Request]:
    """A request for each missing answer; an image is read and encoded once for all conditions."""
    for i in sorted(set().union(*missing.values())):
        image = questions.image(i)
        digest, urls = image_digest(image), _urls(image)
        for condition, rows in missing.items():
            if i in rows:
                content = _content(questions, i, [] if condition.method == "none" else urls)
                body = session.body(content, questions.benchmark.max_new_tokens, condition.keep)
                yield Request(body, (i, condition, digest))


def _content(questions: Questions, i: int, urls: Sequence[str]) -> Content:
    """Question ``i`` as a message, in the order of :meth:`~tokensel.vlm.model.Vlm.prompt`."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*images, {"type": "text", "text": questions.prompts[i]}]


def _urls(image: Image | list[Image] | None) -> list[str]:
    """The images of a question as data URLs: PNG, so that the server has the same pixels."""
    urls = []
    for part in images_of_row(image):
        file = io.BytesIO()
        part.save(file, "PNG", compress_level=1)
        urls.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return urls


def _record(
    session: ServedSession, questions: Questions, request: Request, reply: Reply
) -> tuple[Condition, Record]:
    """The condition of an answer, and its record; what cannot be known here is ``None``."""
    i, condition, digest = request.subject
    return condition, {
        **begin_record(questions, i, condition, session.name, digest),
        "prediction": reply.text,
        "n_visual": None,
        "n_visual_full": None,
        "work": {"prompt_tokens": reply.prompt_tokens, "new_tokens": reply.new_tokens},
        "seconds": round(reply.seconds, 4),
        "versions": {"engine": session.engine or "unknown"},
        "server": reply.server,
    }
