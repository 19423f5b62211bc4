"""Laws of addresses and of many requests over several servers, whatever the servers answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.benchmarks import dispatch
from tokensel.benchmarks.dispatch import Request, ask_all
from tokensel.benchmarks.server import Reply, Server, ServerError, parse_url
from tokensel.utils.errors import TokenselError


@given(st.text() | st.from_regex(r"https?://[a-z0-9:@?#/\[\].-]*", fullmatch=True))
@settings(deadline=None)
def test_an_address_is_one_that_can_be_asked_or_one_line(text):
    try:
        url = parse_url(text)
    except TokenselError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert (
            url.lower().startswith(("http://", "https://")) and url.endswith("/v1") and parse_url(url) == url
        )


class Drawn(Server):
    """A server whose answers are drawn: True is an answer, False passes, None is a refusal."""

    def __init__(self, url, outcomes):
        super().__init__(url)
        self.outcomes, self.most = list(outcomes), 0

    def chat(self, body):
        self.most = max(self.most, self.pending)
        outcome = self.outcomes.pop() if self.outcomes else True
        if outcome:
            return Reply(str(body["number"]), None, None, self.url)
        raise ServerError("drawn", again=outcome is not None)


OUTCOMES = st.lists(st.sampled_from([True, False, None]), max_size=40)


@given(st.lists(OUTCOMES, min_size=1, max_size=3), st.integers(0, 30), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_every_request_is_answered_or_given_up_once(drawn, count, concurrency):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "PAUSE", 1e-5)
        servers = [Drawn(str(i), outcomes) for i, outcomes in enumerate(drawn)]
        outcomes = list(ask_all(servers, (Request({"number": i}, i) for i in range(count)), concurrency))
    ended = [request.subject for request, _ in outcomes]
    assert len(set(ended)) == len(ended)
    for request, reply in outcomes:
        if isinstance(reply, Reply):
            assert reply.text == str(request.subject)
        else:
            assert not reply.again or request.failures <= dispatch.ATTEMPTS
    lost = all(one.failures >= dispatch.ATTEMPTS for one in servers)
    assert len(ended) == count or lost
    assert not any(one.pending for one in servers)
    assert all(one.most <= concurrency for one in servers)
