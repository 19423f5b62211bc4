"""Loading from a folder or the Hugging Face Hub: which options to pass, and quietly."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from transformers.utils import logging

from tokensel.utils.errors import HubError, check_type, reason


class _Quiet:
    """The contexts of :func:`quiet` that are open in all threads, and what the last one restores."""

    def __init__(self) -> None:
        self.lock, self.open = Lock(), 0
        self.verbosity, self.bars = 0, True

    def enter(self) -> None:
        with self.lock:
            if self.open == 0:
                self.verbosity, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
                logging.set_verbosity_error()
                logging.disable_progress_bar()
            self.open += 1

    def leave(self) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                logging.set_verbosity(self.verbosity)
                if self.bars:
                    logging.enable_progress_bar()


_QUIET = _Quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and load reports of transformers, which are noise for files this small.

    transformers has one verbosity for the whole process, so other threads are quiet for as long. The first of
    several contexts, nested or in several threads, saves the verbosity and the last one restores it.
    """
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()


def hub_options(
    name: str | os.PathLike,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Options for every ``from_pretrained`` of one model; the cache alone if the Hub is out of reach.

    One request to the Hub decides. Without it, loading would retry each file for half a minute.

    Args:
        name: folder or hub id.
        token: for private or gated models; by default the one that ``hf auth login`` stored.
        revision: branch, tag or commit.
        local_files_only: use the cache and ask the Hub nothing.
        cache_dir: where downloads are kept, in place of the default cache.

    Raises:
        HubError: no folder, not in the cache, and not on the Hub or the Hub out of reach.
    """
    check_type("the name", name, (str, os.PathLike), "a folder or Hub id")
    given = {"token": token, "revision": revision, "cache_dir": cache_dir}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if local_files_only:
        options["local_files_only"] = True
    if os.path.isdir(name) or local_files_only:  # False, and no error, for a name that is no path
        return options
    try:
        HfApi().model_info(str(name), timeout=10, token=token, revision=revision)
        return options
    except Exception as error:  # the classes of the client's connection errors differ by version
        if not isinstance(error, ValueError):  # a name that no hub model can have is in no cache either
            cached = try_to_load_from_cache(
                str(name), "config.json", revision=revision, cache_dir=Path(cache_dir) if cache_dir else None
            )
            if isinstance(cached, str):
                return options | {"local_files_only": True}
        raise HubError(
            f"'{name}': no such folder, not in the cache, and could not be downloaded from the Hub "
            f"({reason(error)}); give a local folder or a hub id, or run `hf download {name}` while online"
        ) from None


def split_hub_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of :func:`hub_options`, and all others."""
    names = inspect.signature(hub_options).parameters
    hub = {key: value for key, value in options.items() if key in names and key != "name"}
    return hub, {key: value for key, value in options.items() if key not in hub}
