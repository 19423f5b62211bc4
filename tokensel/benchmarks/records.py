"""Records on disk: JSON lines that only grow and survive SIGKILL, and the locks of those who write them."""

import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tokensel.benchmarks.shards import WHOLE, Shard
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import no_space

__all__ = ["Record", "append_records", "read_records", "sole_writer"]

Record = dict[str, Any]
_POLL = 0.05  # seconds between two attempts to take a lock


def read_records(path: str | Path, *, locked: bool = True) -> dict[str, Record]:
    """The complete records of a file by question id; empty where there is no file.

    Args:
        path: the file.
        locked: whether this process holds the file's lock, see :func:`sole_writer`. If so, an incomplete last
            line is left from a kill or a full disk, and is cut off. If not, another process may be writing
            that line right now, and the file stays as it is.

    Raises:
        TokenselError: a line in the middle is not a record, so something else has changed the file.
    """
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    complete = data.rfind(b"\n") + 1
    if complete < len(data) and locked:
        os.truncate(path, complete)
    records: dict[str, Record] = {}
    for number, line in enumerate(data[:complete].splitlines(), start=1):
        try:
            record = json.loads(line)
            records.setdefault(record["question_id"], record)
        except (ValueError, KeyError, TypeError):
            raise TokenselError(
                f"{path}, line {number}: not a record; delete the file to compute it again"
            ) from None
    return records


def append_records(path: str | Path, records: Iterable[Record]) -> None:
    """Add ``records`` at the end of the file and wait until they are on the disk.

    Raises:
        TokenselError: no space left on the device; what was there before stays readable.
    """
    path = Path(path)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(error, path) from error
        raise


@contextmanager
def sole_writer(
    lock: str | Path, shard: Shard = WHOLE, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold ``lock`` for this process: no other evaluation writes the same records. Wait while another does.

    A whole evaluation excludes everyone else. Shards work side by side, each in files of its own, but a shard
    excludes itself and a whole evaluation. Every writer has one lock file: ``lock`` for a whole evaluation,
    ``lock`` with the shard's name behind it for a shard. The operating system releases the locks of a process
    when it ends, however it ends; the empty files stay.

    Args:
        lock: a file beside the records; it is created.
        shard: the part of the evaluation that is going to write.
        waiting: called before a wait.

    Raises:
        TokenselError: the lock file cannot be created.
    """
    lock = Path(lock)
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            if shard.name:
                _hold_shard(held, lock, shard, waiting)
            else:
                _hold_whole(held, lock, waiting)
        except OSError as error:
            raise TokenselError(
                f"{lock.parent}: cannot write here ({error.strerror}); give another --out"
            ) from None
        yield


def _hold_whole(held: ExitStack, lock: Path, waiting: Callable[[], None]) -> None:
    """Take the evaluation's own lock, then that of every shard that is at work."""
    _acquire(held, lock, waiting)
    # No further shard can start now: it would have to take ``lock`` for a moment.
    for path in sorted(lock.parent.glob(f"{lock.name}.*-of-*")):
        _acquire(held, path, waiting)


def _hold_shard(held: ExitStack, lock: Path, shard: Shard, waiting: Callable[[], None]) -> None:
    """Take the shard's own lock at a moment when no whole evaluation holds ``lock``."""
    own = FileLock(f"{lock}{shard.name}")
    while True:
        with ExitStack() as gate:
            _acquire(gate, lock, waiting)
            try:
                own.acquire(blocking=False)
            except Timeout:
                pass
            else:
                held.callback(own.release)
                return
        # The same shard runs in another process. Wait without ``lock``, so that other shards can start.
        waiting()
        time.sleep(_POLL)


def _acquire(held: ExitStack, path: Path, waiting: Callable[[], None]) -> None:
    file = FileLock(path)
    try:
        file.acquire(blocking=False)
    except Timeout:
        waiting()
        file.acquire()
    held.callback(file.release)
