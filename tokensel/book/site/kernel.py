"""The kernels that run chapters: their settings, and where their own messages go."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager

# set in the environment of a kernel whose outputs go on a page: progress bars are no part of it
UNWATCHED = "TOKENSEL_UNWATCHED"
_LOG = "TOKENSEL_KERNEL_LOG"


class LoggedKernelManager(AsyncKernelManager):
    """Starts kernels whose own messages, such as a traceback on Ctrl-C, go to a file instead of the terminal.

    What a cell prints is not concerned: that goes into its outputs.
    """

    async def start_kernel(self, **options: Any) -> None:
        with open(os.environ[_LOG], "ab") as log:
            await super()._async_start_kernel(stderr=log, **options)


@contextmanager
def unwatched(log: Path) -> Iterator[None]:
    """Kernels started meanwhile show no progress bars, and draw for a page whatever MPLBACKEND says here.

    Args:
        log: the file for their own messages, see :class:`LoggedKernelManager`.
    """
    inline = "module://matplotlib_inline.backend_inline"
    settings = {UNWATCHED: "1", "MPLBACKEND": inline, _LOG: str(log)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
