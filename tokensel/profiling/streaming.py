"""Ask servers as users do: many requests at a time, each answer timed token by token as it is streamed."""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from tokensel.benchmarks.server import TIMEOUT
from tokensel.utils.errors import TokenselError, reason

__all__ = ["Burst", "Timing", "ask_burst", "drawn_image", "request_body"]

_CELLS = (12, 16)  # colours of a drawn image, which are blended: it is as large a file as a photograph


@dataclass(frozen=True)
class Timing:
    """One streamed answer.

    Attributes:
        first: seconds from the request to the first token.
        further: mean seconds of each later token.
        prompt_tokens, new_tokens: as the server counts them.
    """

    first: float
    further: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Burst:
    """The answers to a number of requests, and the seconds from the first request to the last answer."""

    seconds: float
    timings: list[Timing]


def drawn_image(height: int, width: int, *seeds: int) -> str:
    """A data URL of an image that no other seeds give, so that no cache of a server knows it.

    Args:
        height, width: in pixels.
        seeds: of the generator.
    """
    rng = np.random.default_rng(seeds)
    cells = Image.fromarray(rng.integers(0, 256, (*_CELLS, 3), dtype=np.uint8))
    file = io.BytesIO()
    cells.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def request_body(model: str, image: str, keep: float, new_tokens: int) -> dict[str, Any]:
    """A request for a streamed answer of a fixed length about an image, as vLLM takes it.

    Args:
        model: its name on the server.
        image: a data URL.
        keep: fraction of the visual tokens to keep.
        new_tokens: length of the answer; its end is ignored.
    """
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "What is in the image?"},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "mm_processor_kwargs": {"keep": keep},
    }


def ask_burst(urls: Sequence[str], bodies: Sequence[dict[str, Any]], concurrency: int) -> Burst:
    """Send requests, so many at a time to each server, and wait for all answers.

    Args:
        urls: of the servers' APIs; they take turns.
        bodies: from :func:`request_body`.
        concurrency: requests at a time of one server.

    Raises:
        TokenselError: a request failed.
    """
    data = [json.dumps(body).encode() for body in bodies]  # before the clock runs
    servers = [urls[i % len(urls)] for i in range(len(data))]
    with ThreadPoolExecutor(concurrency * len(urls)) as clients:
        start = perf_counter()
        timings = list(clients.map(_stream, servers, data))
        return Burst(perf_counter() - start, timings)


def _stream(url: str, data: bytes) -> Timing:
    """One request, read line by line as its tokens come."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    stamps, usage, start = [], None, perf_counter()
    try:
        request = urllib.request.Request(f"{url}/chat/completions", data, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                usage = event.get("usage") or usage
                if event.get("choices"):
                    stamps.append(perf_counter())
    except urllib.error.HTTPError as error:
        raise TokenselError(f"{url}: {error.code}: {error.read().decode(errors='replace')[:200]}") from None
    except (OSError, ValueError) as error:
        raise TokenselError(f"{url}: {reason(error)}; the rounds so far are kept") from None
    if usage is None or len(stamps) < 2:
        raise TokenselError(f"{url}: it streams no tokens, or no usage: give a server of vLLM")
    new = int(usage["completion_tokens"])
    # the first event has the role, and is sent with the first token
    return Timing(
        stamps[0] - start, (stamps[-1] - stamps[0]) / max(1, new - 1), int(usage["prompt_tokens"]), new
    )
