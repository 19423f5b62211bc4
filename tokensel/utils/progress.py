"""A progress bar for terminals, notebooks and log files."""

import sys
from typing import Any

from tqdm import tqdm


class _Lines:
    """A stream for logs: each state of a bar becomes a line, instead of overwriting the last one."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        # tqdm writes "\r<bar>"; closing the bar writes a bare "\n" after it
        if line := text.strip("\r\n").rstrip():
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(total: int, *, done: int = 0, unit: str = "it", shown: bool = True) -> tqdm:
    """A bar on stderr: how much is done, how much is left, how fast; in a log, one line every half minute.

    Args:
        total: number of steps, those done by an earlier run included.
        done: steps done by an earlier run.
        unit: name of one step.
        shown: ``False`` prints nothing.
    """
    terminal = sys.stderr.isatty()
    # a notebook overwrites its line, too
    redrawn = terminal or type(sys.stderr).__module__.startswith("ipykernel")
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        disable=not shown,
        file=sys.stderr if redrawn else _Lines(sys.stderr),
        mininterval=0.5 if redrawn else 30,
        ascii=not terminal,
        dynamic_ncols=terminal,
        ncols=None if terminal else 120,
        leave=True,
    )
