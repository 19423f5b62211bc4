"""A progress bar that can be read in a terminal, in a notebook and in a log file."""

import sys
from typing import TextIO

from tqdm import tqdm


class _Lines:
    """A stream that ends each state of a bar with a new line, where a terminal would go back to its start."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        # tqdm writes "\r<bar>"; closing the bar writes a bare "\n" after it
        if line := text.strip("\r\n").rstrip():
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(total: int, *, done: int = 0, unit: str = "it", shown: bool = True) -> tqdm:
    """A bar on stderr: how much is done, how much is left, how fast; in a log, a line every half minute.

    Args:
        total: number of steps, those done by an earlier run included.
        done: how many an earlier run has done.
        unit: what one step is called.
        shown: ``False`` for silence.
    """
    terminal = sys.stderr.isatty()
    redrawn = terminal or type(sys.stderr).__module__.startswith(
        "ipykernel"
    )  # a notebook goes back to the line's start, too
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
