"""A plugin of pytest that notes which functions of the library each test runs on the stand-in device."""

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import pytest
from stand_in import count_operations

REACHED: dict[str, str] = {}
"""Functions during which the device computed something, by qualified name, and the first such test."""


@pytest.fixture(autouse=True)
def note_reached(request: pytest.FixtureRequest) -> Iterator[None]:
    """Watch the calls of one test."""
    done: set[CodeType] = set()

    def watch(frame: FrameType, _event: str, _argument: Any) -> Callable | None:
        code = frame.f_code
        if code in done:
            return None
        name = f"{frame.f_globals.get('__name__', '')}.{code.co_qualname}"
        if not name.startswith("tokensel."):
            done.add(code)
            return None
        before = count_operations()
        frame.f_trace_lines = False

        def leave(_frame: FrameType, event: str, _argument: Any) -> Callable:
            if event == "return" and count_operations() > before:
                done.add(code)
                REACHED.setdefault(name, request.node.name)
            return leave

        return leave

    outer = sys.gettrace()
    sys.settrace(watch)
    yield
    sys.settrace(outer)
