"""Loading from a folder or the Hugging Face Hub: which options to pass, and quietly."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from transformers.utils import logging

from tokensel.utils.errors import TokenselError, reason


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers: for files this small they say nothing of use."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def hub_options(name: str | os.PathLike) -> dict[str, bool]:
    """Options for loading ``name``: none for a folder or a hub model, the cache alone where the hub is away.

    One question to the hub decides. Left to itself, loading would try each file for half a minute.

    Raises:
        TokenselError: no folder, not in the cache, and not on the hub or the hub out of reach.
    """
    if Path(name).is_dir():
        return {}
    try:
        HfApi().model_info(str(name), timeout=10)
        return {}
    except Exception as error:  # the client's connection errors have other classes in each of its versions
        if not isinstance(error, ValueError):  # a name that no hub model can have is in no cache either
            if isinstance(try_to_load_from_cache(str(name), "config.json"), str):
                return {"local_files_only": True}
        raise TokenselError(
            f"'{name}': no such folder, not in the cache, nor to be had from the hub ({reason(error)}); "
            f"give a local folder or a hub id, or run `hf download {name}` while online"
        ) from None
