"""A sweep in parts: as many processes as one likes, the same records and tables as one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import suite_tiny
from suite_tiny import answers

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.records import append_records, read_records, sole_writer
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.shards import Shard, is_first_here, local_device
from tokensel.utils.errors import TokenselError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[EvalConfig, bytes]:
    """An evaluation in one process, and its table."""
    folder = tmp_path_factory.mktemp("whole")
    config = EvalConfig(
        model=str(suite_tiny.save_models(folder)),
        suite="suite_tiny",
        benchmarks=("page", "choice"),
        methods=("full", "none", "random"),
        keeps=(0.3,),
        compare=("random:none",),
        n=11,
        batch_size=2,
        out=str(folder / "out"),
    )
    return config, evaluate(config, progress=False).table.read_bytes()


def test_parts_name_themselves_and_split_the_batches(monkeypatch):
    parts = [Shard.of(f"{i}/3") for i in (1, 2, 3)]
    assert [part.name for part in parts] == [".1-of-3", ".2-of-3", ".3-of-3"] and Shard.of("1/1").name == ""
    assert [sum(part.holds(batch) for part in parts) for batch in range(20)] == [1] * 20
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (Shard.of("1/1"), Shard.of("2/3")) == (Shard(1, 2), Shard(3, 6))
    assert not is_first_here() and local_device("cpu") == "cpu"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(TokenselError, match=r"shard is .*such as 1/4"):
        EvalConfig(model="m", suite="s", methods=("full",), shard=text)


def test_parts_one_after_the_other_end_where_one_process_does(whole, tmp_path):
    config, table = whole
    parts = [replace(config, shard=f"{i}/3", out=str(tmp_path)) for i in (2, 3, 1)]
    done = [evaluate(part, progress=False) for part in parts]
    assert done[0].table is done[1].table is None and done[0].left > done[1].left > done[2].left == 0
    assert done[2].table.read_bytes() == table
    assert answers(tmp_path) == answers(config.out)
    assert sum(each.computed for each in done) == len(answers(config.out))
    assert all(each.computed for each in done)


def test_a_part_that_is_lost_is_made_up_for_by_any_number_of_others(whole, tmp_path):
    config, table = whole
    evaluate(replace(config, shard="1/2", out=str(tmp_path)), progress=False)
    file = max(tmp_path.rglob("*.1-of-2.jsonl"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-5])  # killed in the middle of a line
    again = evaluate(replace(config, out=str(tmp_path)), progress=False)
    assert again.table.read_bytes() == table and answers_of_whole_lines(tmp_path) == answers(config.out)


def answers_of_whole_lines(out: Path) -> dict:
    for path in out.rglob("*.jsonl"):
        read_records(path)  # cuts off what is no whole line
    return answers(out)


def test_two_processes_at_once(whole, tmp_path):
    """``accelerate launch`` starts them as for two GPUs; they work on the processor."""
    config, table = whole
    launch = (
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port 0"
    )
    evaluation = (
        "-m tokensel evaluate --suite suite_tiny --benchmarks page,choice --methods full,none,random "
        "--keeps 0.3 --compare random:none --n 11 --batch-size 2 --device cpu --no-progress"
    )
    command = [
        sys.executable,
        *launch.split(),
        *evaluation.split(),
        "--model",
        config.model,
        "--out",
        tmp_path,
    ]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "evaluate.csv").read_bytes() == table
    assert answers(tmp_path) == answers(config.out)
    assert {path.name.split(".")[-2] for path in tmp_path.rglob("*.jsonl")} == {"1-of-2", "2-of-2"}


def test_a_line_that_another_process_is_writing_is_left_alone(tmp_path):
    path = tmp_path / "a.1-of-2.jsonl"
    append_records(path, [{"question_id": "a"}])
    path.write_bytes(path.read_bytes() + b'{"question')
    before = path.read_bytes()
    assert list(read_records(path, locked=False)) == ["a"] and path.read_bytes() == before


def test_parts_share_a_lock_but_not_with_themselves_or_the_whole(tmp_path):
    class Waits(Exception):
        pass

    def wait():
        raise Waits

    lock = tmp_path / ".lock"
    with sole_writer(lock, Shard(0, 2), wait), sole_writer(lock, Shard(1, 2), wait):
        for other in (Shard(0, 2), Shard()):
            with pytest.raises(Waits), sole_writer(lock, other, wait):
                pass
    with sole_writer(lock, waiting=wait), pytest.raises(Waits), sole_writer(lock, Shard(1, 2), wait):
        pass
