"""What users get wrong, through the command line: one clear line on stderr, exit status 1, no traceback."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import suite_tiny
from datasets import Dataset, Image
from drawn_inputs import Draws
from little import clip_tower, cut, save_images
from tiny import WIDTH

from tokensel import cli
from tokensel.benchmarks.records import append_records, read_records
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.utils.errors import TokenselError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return suite_tiny.save_models(tmp_path_factory.mktemp("models")).parent


@pytest.fixture
def tokensel(monkeypatch, capsys):
    """Run the command line in this process: exit status, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokensel", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return (exit_info.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def refused(tokensel):
    """Run the command line on bad input; returns its one line."""

    def run(*arguments) -> str:
        status, _, told = tokensel(*arguments)
        assert status == 1, told
        assert told.startswith("error: ") and told.count("\n") == 1, told
        return told

    return run


def evaluation(models: Path, out: Path, *more) -> list:
    command = [
        "evaluate",
        "--model",
        models / "tiny-llava",
        "--selector",
        models / "selector",
        "--suite",
        "suite_tiny",
    ]
    return [
        *command,
        "--benchmarks",
        "page",
        "--keeps",
        "0.5",
        "--n",
        4,
        "--out",
        out,
        "--no-progress",
        *more,
    ]


def training(images: Path, encoder: Path, out: Path, *more) -> list:
    command = [
        "train",
        "--images",
        images,
        "--encoder",
        encoder,
        "--out",
        out,
        "--steps",
        2,
        "--batch-size",
        2,
    ]
    return [*command, "--layers", 1, "--statistics-tiles", 4, "--no-progress", *more]


@pytest.mark.parametrize(
    ("keep", "value"), [("0", "0.0"), ("1.5", "1.5"), ("nan", "nan"), ("-0.1", "-0.1"), ("0.3,0", "0.0")]
)
def test_keep_out_of_range(keep, value, models, tmp_path, refused):
    line = refused(*evaluation(models, tmp_path, "--keeps", keep))
    assert f"keep is {value}" in line and "such as 0.3" in line


def test_keep_that_is_no_number(models, tmp_path, refused):
    assert "keeps is 'half'" in refused(*evaluation(models, tmp_path, "--keeps", "half"))


def test_p_out_of_range(models, tmp_path, refused):
    for value in ("1.5", "nan", "-1"):
        assert f"p is {float(value)}" in refused(*training(tmp_path, models, tmp_path, "--p", value))


def test_unknown_chapter_parameter(tokensel, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    status, _, told = tokensel("book", "run", "-p", "kepe=0.3")
    assert status == 1 and "kepe" in told and "Traceback" not in told


def test_missing_hub_model_while_offline(models, tmp_path, refused):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    name = "nobody/no-such-model"
    assert name in refused(*evaluation(models, tmp_path, "--model", name))
    assert name in refused(*evaluation(models, tmp_path, "--selector", name))
    folder = save_images(tmp_path / "images")
    assert name in refused(*training(folder, name, tmp_path / "out"))


def test_a_folder_without_images(models, tmp_path, refused):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("nothing to see")
    assert str(empty) in refused(*training(empty, models / "tiny-llava", tmp_path / "out"))


def test_a_truncated_jpeg_among_good_ones_is_skipped_named_and_counted(tokensel, monkeypatch, tmp_path):
    folder = save_images(tmp_path / "images", 6)
    cut(folder / "2.jpg")
    clip_tower(tmp_path / "tower")
    status, out, told = tokensel(*training(folder, tmp_path / "tower", tmp_path / "out", "--steps", 6))
    assert status == 0, told
    assert "selector" in out
    assert "2.jpg" in told and "skipped 1 " in told
    TokenSelector.from_pretrained(tmp_path / "out" / "selector")


def test_an_unreadable_picture_in_a_benchmark_is_not_passed_over(models, tmp_path, refused, monkeypatch):
    page = suite_tiny.BENCHMARKS["page"]

    def load(split, n):
        rows = page.load(split, n).cast_column("image", Image(decode=False)).to_list()
        rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:40]
        return Dataset.from_list(rows, features=suite_tiny.COLUMNS)

    monkeypatch.setitem(suite_tiny.BENCHMARKS, "page", replace(page, load=load))
    line = refused(*evaluation(models, tmp_path))
    assert "page, question test-2: its image cannot be read" in line


def test_a_selector_whose_width_does_not_fit(models, tmp_path, refused):
    TokenSelector(SelectorConfig(width=2 * WIDTH, layers=1, heads=2)).save_pretrained(tmp_path / "wide")
    line = refused(*evaluation(models, tmp_path / "out", "--selector", tmp_path / "wide"))
    assert str(WIDTH) in line and str(2 * WIDTH) in line and "wide" in line
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("which", ["tiny-llava", "selector"])
def test_a_checkpoint_cut_short(which, models, tmp_path, refused):
    shutil.copytree(models / which, tmp_path / which)
    cut(tmp_path / which / "model.safetensors")
    option = "--model" if which == "tiny-llava" else "--selector"
    line = refused(*evaluation(models, tmp_path / "out", option, tmp_path / which))
    assert str(tmp_path / which) in line and "cut short" in line


def test_a_training_checkpoint_cut_short(models, tmp_path, tokensel, refused):
    folder = save_images(tmp_path / "images")
    command = training(folder, models / "tiny-llava", tmp_path / "out")
    assert tokensel(*command)[0] == 0
    checkpoint = next(path for path in (tmp_path / "out").glob("*.safetensors"))
    cut(checkpoint)
    assert checkpoint.name in refused(*command)


def test_a_disk_without_space_keeps_what_is_there(models, tmp_path, tokensel, refused, monkeypatch):
    command = evaluation(models, tmp_path / "out", "--batch-size", 2)
    status, _, told = tokensel(*evaluation(models, tmp_path / "whole", "--batch-size", 2))
    assert status == 0, told
    sync, done = os.fsync, []

    def fsync(handle: int) -> None:
        done.append(handle)
        if len(done) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr("tokensel.benchmarks.records.os.fsync", fsync)
    assert "no space left" in refused(*command)
    assert not (tmp_path / "out" / "evaluate.csv").exists()
    monkeypatch.setattr("tokensel.benchmarks.records.os.fsync", sync)
    status, _, told = tokensel(*command)
    assert status == 0, told
    assert (tmp_path / "out" / "evaluate.csv").read_bytes() == (
        tmp_path / "whole" / "evaluate.csv"
    ).read_bytes()
    told = json.loads((tmp_path / "out" / "evaluate.provenance.json").read_text())
    assert 0 < told["answers_computed_now"] < told["answers"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_that_is_really_full(tmp_path):
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    with pytest.raises(TokenselError, match="no space left"):
        append_records(tmp_path / "records.jsonl", [{"question_id": "a"}])


def test_unknown_suite_and_benchmark(models, tmp_path, refused):
    assert "no module named no_such" in refused(*evaluation(models, tmp_path, "--suite", "no_such"))
    assert "benchmark pages" in refused(*evaluation(models, tmp_path, "--benchmarks", "pages"))


def test_a_place_where_nothing_can_be_written(models, tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert "cannot write here" in refused(*evaluation(models, tmp_path / "file"))


def test_records_changed_by_other_hands(models, tmp_path, tokensel, refused):
    command = evaluation(models, tmp_path)
    assert tokensel(*command)[0] == 0
    path = next(tmp_path.rglob("*.jsonl"))
    path.write_text("rubbish\n" + path.read_text())
    assert "line 1: not a record" in refused(*command)
    path.unlink()
    assert tokensel(*command)[0] == 0
    assert len(read_records(path)) == 4


@pytest.mark.parametrize("command", ["evaluate", "dyrate", "train-answers"])
def test_a_question_with_a_placeholder_of_an_image_is_named(command, models, tmp_path, refused, monkeypatch):
    page = suite_tiny.BENCHMARKS["page"]
    asked = replace(page, prompt=lambda row: "is there an <image> tag?")
    monkeypatch.setitem(suite_tiny.BENCHMARKS, "page", asked)
    if command == "evaluate":
        line = refused(*evaluation(models, tmp_path))
    else:
        words = [command, "--model", models / "tiny-llava", "--suite", "suite_tiny", "--out", tmp_path]
        words += ["--layer", 1] if command == "dyrate" else []
        line = refused(*words, "--benchmarks", "page", "--n", 2, "--steps", 1, "--no-progress")
    assert "is there an <image> tag?" in line and "stands for an image" in line


@pytest.mark.parametrize("options", [(), ("--random-weights",)])
def test_an_attention_whose_package_is_missing_is_named(options, models, tmp_path, refused):
    words = ("cost", "--model", models / "tiny-llava", "--out", tmp_path, "--attn", "flash_attention_2")
    assert "flash" in refused(*words, *options).lower()


def test_more_threads_than_cores_are_refused_at_once(models, tmp_path, refused):
    words = ("cost", "--model", models / "tiny-llava", "--out", tmp_path, "--threads", 9999)
    assert "threads is 9999: give at most" in refused(*words)


@pytest.mark.parametrize("methods", ["", ",", " , "])
def test_no_method_leaves_the_table_of_before(methods, models, tmp_path, tokensel, refused):
    assert tokensel(*evaluation(models, tmp_path, "--methods", "full"))[0] == 0
    before = (tmp_path / "evaluate.csv").read_bytes()
    assert "methods is empty" in refused(*evaluation(models, tmp_path, "--methods", methods))
    assert (tmp_path / "evaluate.csv").read_bytes() == before


def test_a_seed_below_0_is_refused_before_any_question(models, tmp_path, refused):
    assert "seed is -1: give a whole number" in refused(*evaluation(models, tmp_path, "--seed", -1))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_beams_that_the_checkpoint_sets_are_not_searched(models, tmp_path, tokensel):
    """They would reorder the cache under a schedule, and change the answers of a method without one."""
    shutil.copytree(models / "tiny-llava", tmp_path / "beams")
    file = tmp_path / "beams" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 3}))
    options = ("--methods", "full,fastv", "--layer", 1)
    for name, out in ((models / "tiny-llava", "greedy"), (tmp_path / "beams", "searched")):
        status, _, told = tokensel(*evaluation(models, tmp_path / out, *options, "--model", name))
        assert status == 0, told
    one, two = (suite_tiny.answers(tmp_path / out) for out in ("greedy", "searched"))
    predictions = [{key: record["prediction"] for key, record in part.items()} for part in (one, two)]
    assert predictions[0] == predictions[1] and len(predictions[0]) == 2 * 4


def test_drawn_inputs_are_refused_in_one_line(tmp_path):
    """500 bad inputs to command line and library; their kinds are the methods of ``drawn_inputs.Draws``."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, folder / "drawn_inputs.py", tmp_path, "500"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == []
    assert sum(report["drawn"].values()) == 500 and min(report["drawn"].values()) >= 15
    assert len(report["drawn"]) == len([name for name in dir(Draws) if name.startswith(("cli_", "lib_"))])
