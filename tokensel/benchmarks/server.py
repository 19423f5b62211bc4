"""One OpenAI-compatible server: its address, its model, and one chat completion.

This file imports nothing heavy, so that addresses are checked at once.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from tokensel.utils.errors import TokenselError, reason

__all__ = ["Reply", "Server", "ServerError", "parse_body", "parse_url"]

TIMEOUT = 600.0  # seconds without a byte after which a request counts as failed
_REFUSED = (400, 413, 422)  # errors of a request itself; others may pass, or another server may not have them
_ENDED = ("stop", "length")  # other reasons to end, such as abort, leave an answer unfinished
_OURS = ("max_completion_tokens", "max_tokens", "messages", "model", "n", "stream", "temperature")


def parse_url(text: str) -> str:
    """The address of a server's API: ``http://host:8000`` -> ``http://host:8000/v1``.

    Raises:
        TokenselError: not an address of HTTP, or one that contains a password.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        valid = False
    if not valid or any(not char.isprintable() or char.isspace() for char in text):
        raise TokenselError(f"server is {text!r}: give a URL such as http://localhost:8000")
    if "@" in parts.netloc or "?" in text or "#" in text:
        # the address is recorded with the results
        raise TokenselError(
            f"server {parts.hostname}: give its URL without user, password or query; a key belongs into the "
            "environment variable OPENAI_API_KEY"
        )
    url = text.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def parse_body(text: str | None) -> dict[str, Any]:
    """The fields that the user adds to every request; none for ``None``.

    Raises:
        TokenselError: not a JSON object, or one with a field that the evaluation sets.
    """
    try:
        body = json.loads(text or "{}")
    except ValueError:
        body = None
    options = body.get("mm_processor_kwargs", {}) if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(options, dict):
        raise TokenselError(
            f"body is {text!r}: give a JSON object, such as {json.dumps({'add_special_tokens': True})}"
        )
    if ours := [name for name in _OURS if name in body] or [name for name in ("keep",) if name in options]:
        raise TokenselError(f"body has {ours[0]!r}, which the evaluation sets: leave it out")
    return body


class ServerError(Exception):
    """A request that got no answer.

    Attributes:
        again: whether another attempt may be answered: not where the server refused the request itself.
    """

    def __init__(self, text: str, again: bool = True):
        super().__init__(" ".join(text.split())[:300])
        self.again = again


@dataclass(frozen=True)
class Reply:
    """A server's answer.

    Attributes:
        text: the generated text.
        prompt_tokens, new_tokens: as the server counts them; ``None`` where it does not.
        server: the address of the server.
        seconds: from the request to the answer.
    """

    text: str
    prompt_tokens: int | None
    new_tokens: int | None
    server: str
    seconds: float = 0.0


@dataclass(eq=False)
class Server:
    """One server, and how it has been answering.

    Attributes:
        url: the address of its API, see :func:`parse_url`.
        pending: requests that it has now.
        failures: rounds of requests in a row of which it answered none.
        ready: when it may be asked again, in seconds of the monotonic clock.
    """

    url: str
    pending: int = 0
    failures: int = 0
    ready: float = 0.0

    def models(self) -> dict[str, str]:
        """The models it serves, each with its owner, as vLLM names the engine; "" where it does not say.

        Raises:
            ServerError: it does not answer, or with something else.
        """
        answer = self._call("/models")
        try:
            return {str(row["id"]): str(row.get("owned_by") or "") for row in answer["data"]}
        except (AttributeError, KeyError, TypeError):
            raise ServerError(f"{self.url}/models: this is no list of models") from None

    def chat(self, body: dict[str, Any]) -> Reply:
        """Send a request for a chat completion and wait for the answer.

        Raises:
            ServerError: there was none, or an incomplete one.
        """
        started = time.monotonic()
        answer = self._call("/chat/completions", body)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text, ended = choice["message"]["content"], choice["finish_reason"]
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (AttributeError, IndexError, KeyError, TypeError):
            raise ServerError(f"{self.url}: this is no chat completion: {json.dumps(answer)}") from None
        if ended not in _ENDED or not isinstance(text, str):
            raise ServerError(f"{self.url}: an answer ended by {ended!r} with the text {text!r}")
        prompt, new = (count if isinstance(count, int) else None for count in counts)
        return Reply(text.strip(), prompt, new, self.url, time.monotonic() - started)

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers; a POST where there is a body."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            again = error.code not in _REFUSED
            raise ServerError(f"{self.url}: {error.code}: {_detail(error)}", again) from None
        except urllib.error.URLError as error:
            raise ServerError(f"{self.url}: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:  # a timeout, a connection that ends early
            raise ServerError(f"{self.url}: {reason(error)}") from None
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(f"{self.url}: the answer is not JSON: {content[:80]!r}") from None


def _detail(error: urllib.error.HTTPError) -> str:
    """What the server says about an error, in the form of OpenAI's API or as it is."""
    try:
        with error:
            text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        answer = json.loads(text)
        return str(answer.get("error", answer)["message"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return text or error.reason
