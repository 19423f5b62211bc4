"""Records on disk: JSON lines that only grow, and that survive SIGKILL."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tokensel.benchmarks.shards import Shard
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import no_space

Record = dict[str, Any]


def read_records(path: str | Path, *, mine: bool = True) -> dict[str, Record]:
    """The whole records of a file by question id; none where there is no file.

    A last line that was cut short, as a kill or a full disk leaves it, is cut off the file; unless the file is not ``mine``
    (not held by ``sole_writer``): then another process may be in the middle of writing that line.

    Raises:
        TokenselError: a line in the middle is not a record, so the file was changed by other hands.
    """
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    whole = data.rfind(b"\n") + 1
    if whole < len(data) and mine:
        os.truncate(path, whole)
    records: dict[str, Record] = {}
    for number, line in enumerate(data[:whole].splitlines(), start=1):
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
        raise no_space(error, path) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error


@contextmanager
def sole_writer(
    lock: str | Path, shard: Shard = Shard(), waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold ``lock`` for this process, so that two evaluations do not write the same records; wait while another does.

    Parts of one sweep share the lock with each other, but neither with an evaluation of the whole nor with themselves.
    The system lets go of it when the process ends, however it ends.

    Args:
        lock: a file beside the records, which is made.
        shard: which part of a sweep is to write.
        waiting: called once before each wait.

    Raises:
        TokenselError: nothing can be written there.
    """
    lock = Path(lock)
    wanted = [(lock, fcntl.LOCK_SH if shard.name else fcntl.LOCK_EX)]
    if shard.name:
        wanted.append((lock.with_name(f"{lock.name}{shard.name}"), fcntl.LOCK_EX))
    with ExitStack() as files:
        for path, kind in wanted:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = files.enter_context(path.open("w"))
            except OSError as error:
                raise TokenselError(
                    f"{path.parent}: cannot write here ({error.strerror}); give another --out"
                ) from None
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, kind)
        yield
