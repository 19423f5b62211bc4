"""Many requests over several servers: as many at a time as they may have, each until it is answered."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from tokensel.benchmarks.server import Reply, Server, ServerError

__all__ = ["Request", "ask_all"]

ATTEMPTS = 10  # for a request, and for a server that answers nothing: together about four minutes of pauses
PAUSE = 1.0  # seconds before the second attempt; each further pause is twice as long
LONGEST = 60  # the longest pause, in multiples of the first


@dataclass(eq=False)
class Request:
    """A chat completion to ask for.

    Attributes:
        body: what is sent.
        subject: whatever the caller wants to know it by.
        failures: attempts that failed.
        ready: when it may be sent again, in seconds of the monotonic clock.
        failed_on: the server that failed it last.
        error: its last error.
    """

    body: dict[str, Any]
    subject: Any = None
    failures: int = 0
    ready: float = 0.0
    failed_on: Server | None = None
    error: ServerError | None = None


def ask_all(
    servers: Sequence[Server], requests: Iterable[Request], concurrency: int
) -> Iterator[tuple[Request, Reply | ServerError]]:
    """Send requests to servers, as many at a time as they may have, and give the answers as they come.

    A request that fails is sent again after a pause that grows, to another server if one is healthy. A server
    that fails is left alone for a pause that grows, or until it answers a request that it still has. A
    request is given up after ``ATTEMPTS`` failures, and all are when no server answered for as many rounds.

    Args:
        servers: all of them serve the same model.
        requests: read as they are needed.
        concurrency: the most requests of one server at a time.

    Yields:
        Each request with its answer, or with the error for which it was given up. Requests that were never
        sent, because no server answered any more, do not occur.
    """
    return _Queue(servers, requests, concurrency).answers()


class _Queue:
    """The requests that wait, and the threads that have one each. All but ``_send`` runs in one thread."""

    def __init__(self, servers: Sequence[Server], requests: Iterable[Request], concurrency: int):
        self.servers, self.concurrency = servers, concurrency
        for server in servers:  # one that was given up before has one more round
            server.failures = min(server.failures, ATTEMPTS - 1)
        self.source = iter(requests)
        self.upcoming = next(self.source, None)
        self.failed: list[Request] = []  # to send again
        self.replies: SimpleQueue[tuple[Request, Server, float, Reply | BaseException]] = SimpleQueue()

    def answers(self) -> Iterator[tuple[Request, Reply | ServerError]]:
        """See :func:`ask_all`."""
        while self.upcoming or self.failed or self._pending():
            lost = all(server.failures >= ATTEMPTS for server in self.servers)
            if lost and not self._pending():
                yield from ((request, request.error) for request in self.failed if request.error)
                return
            now = time.monotonic()  # one for both: what is not ready to be sent is waited for
            while not lost and (pair := self._next(now)) is not None:
                self._send(*pair)
            try:
                request, server, sent, reply = self.replies.get(timeout=self._wait(now))
            except Empty:  # a pause is over
                continue
            server.pending -= 1
            if not isinstance(reply, Reply | ServerError):
                raise reply
            if isinstance(reply, ServerError) and reply.again:
                if self._failed_again(request, server, sent, reply):
                    yield request, reply
            else:  # a server that refuses a request is healthy, too
                server.failures, server.ready = 0, 0.0
                yield request, reply

    def _pending(self) -> bool:
        return any(server.pending for server in self.servers)

    def _next(self, now: float) -> tuple[Server, Request] | None:
        """The next request to send, and the least busy server that may have it."""
        for server in sorted(self.servers, key=lambda server: server.pending):
            if server.pending >= self.concurrency or server.ready > now:
                continue
            # After a failure a new request shows whether the server is healthy. Otherwise one that fails
            # on every server would make all of them look dead.
            request = self._failed_for(server, now) if server.failures == 0 else None
            request = request or self._new() or self._failed_for(server, now)
            if request is not None:
                return server, request
        return None

    def _new(self) -> Request | None:
        """The next request that was never sent."""
        request = self.upcoming
        if request is not None:
            self.upcoming = next(self.source, None)
        return request

    def _failed_for(self, server: Server, now: float) -> Request | None:
        """A failed request whose pause is over; one of this server's only if no other is healthy."""
        others = any(other.failures == 0 for other in self.servers if other is not server)
        for request in self.failed:
            if request.ready <= now and not (others and request.failed_on is server):
                self.failed.remove(request)
                return request
        return None

    def _send(self, server: Server, request: Request) -> None:
        """Send a request in a thread of its own, which does not outlive the process."""
        sent = time.monotonic()

        def run() -> None:
            try:
                reply = server.chat(request.body)
            except BaseException as error:  # the other thread raises it
                reply = error
            self.replies.put((request, server, sent, reply))

        server.pending += 1
        threading.Thread(target=run, daemon=True).start()

    def _failed_again(self, request: Request, server: Server, sent: float, error: ServerError) -> bool:
        """Note a failure; returns whether the request is given up."""
        now = time.monotonic()
        if sent >= server.ready:  # the first failure of a round: the others were sent before it was known
            server.failures += 1
            server.ready = now + _pause(server.failures)
        request.failures += 1
        request.ready = now + _pause(request.failures)
        request.failed_on, request.error = server, error
        if request.failures >= ATTEMPTS:
            return True
        self.failed.append(request)
        return False

    def _wait(self, now: float) -> float | None:
        """Seconds until the next pause is over; ``None`` where there is none."""
        ends = [waiting.ready - now for waiting in (*self.servers, *self.failed) if waiting.ready > now]
        return min(ends, default=None)


def _pause(failures: int) -> float:
    """Seconds to wait after a number of failures in a row."""
    return PAUSE * min(2 ** (failures - 1), LONGEST)
