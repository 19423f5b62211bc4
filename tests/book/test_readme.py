"""The README keeps its word: its lines of Python run as they stand, and its table is the recorded one."""

import contextlib
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from skimage.data import astronaut
from typer.main import get_command

from tokensel import cli
from tokensel.book.site import readme
from tokensel.figures.curves import COLUMNS
from tokensel.utils.errors import TokenselError

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDED = ROOT / "data" / "results" / "sweep.csv"


def test_the_lines_give_a_shorter_prompt_and_an_answer(monkeypatch, tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    Image.fromarray(astronaut()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1 and "tokensel.book" not in blocks[0]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(blocks[0], "README.md", "exec"), {})
    found = re.fullmatch(r"(\d+) of (\d+) visual tokens: (.+)\n", output.getvalue())
    assert found and int(found[1]) == round(0.3 * int(found[2]))


def test_the_commands_have_options_that_exist():
    commands = re.findall(r"^python -m tokensel (\w+) ((?:.*\\\n)*.*)$", TEXT, re.MULTILINE)
    assert [name for name, _ in commands] == ["train", "evaluate", "cost", "serve"]
    for name, line in commands:
        options = {option for each in get_command(cli.app).commands[name].params for option in each.opts}
        assert set(re.findall(r"--[\w-]+", line)) <= options, name


def test_the_paths_it_names_are_there():
    for name in re.findall(
        r"`((?:[\w.-]+/)*[\w-]+\.(?:md|cff|yml|lock)|[\w-]+/)`|\]\((?!http)([^)]+)\)", TEXT
    ):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_the_table_is_the_recorded_one():
    table = TEXT.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert readme.results_table(pd.read_csv(RECORDED)) in table, "python -m tokensel book readme"
    runs = pd.read_csv(RECORDED.with_name("neighbours.csv"))
    assert f" {readme.runs_sentence(runs)} (" in table, "python -m tokensel book readme"


def long_table() -> pd.DataFrame:
    scores = {("full", 1.0): 0.8, ("none", 0.0): 0.1}
    scores |= {
        (method, keep): keep / 2 + 0.25 * (method == "selector")
        for method in readme.METHODS
        for keep in (0.3, 0.5)
    }
    rows = [
        (
            "m",
            task,
            group,
            method,
            keep,
            "anls",
            mean := score + 0.1 * (task == "charts"),
            mean - 0.03,
            mean + 0.03,
            9,
            0,
        )
        for group, task in (("reading", "forms"), ("reading", "charts"), ("general", "science"))
        for (method, keep), score in scores.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_table_has_a_row_a_group_and_replaces_the_old_one(tmp_path):
    results, page = tmp_path / "sweep.csv", tmp_path / "README.md"
    long_table().to_csv(results, index=False)
    made = {
        "model": {"name": "data/m", "dtype": "torch.float32"},
        "seed": 0,
        "date": "2026-11-21T20:15",
        "device": "cpu (two)",
    }
    results.with_suffix(".provenance.json").write_text(json.dumps(made))
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    readme.write(page, results)
    readme.write(page, results)
    text = page.read_text(encoding="utf-8")
    assert (
        "| tasks | all tokens | selector, 50 % | random, 50 % | selector, 30 % | random, 30 % | no image |"
        in text
    )
    assert (
        "| reading (2) | 85.0 ± 2.1 | 55.0 ± 2.1 | 30.0 ± 2.1 |" in text
        and "| general (1) | 80.0 ± 3.0 |" in text
    )
    assert (
        "`data/m` on its own tasks" in text
        and "recorded 2026-11-21 on cpu (two), torch.float32, in `" in text
    )
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count(readme.BEGIN) == 1 and "9 questions a task, seed 0;" in text
    long_table().to_csv(tmp_path / "neighbours.csv", index=False)
    readme.write(page, results)
    text = page.read_text(encoding="utf-8")
    assert " reading 55.0 ± 2.1 at 50 % and 45.0 ± 2.1 at 30 %; general 50.0 ± 3.0 at 50 % and " in text
    once = long_table()
    more = [once, *(once[once["method"] == "selector"].assign(seed=seed) for seed in (1, 2))]
    pd.concat(more).to_csv(results, index=False)
    readme.write(page, results)
    text = page.read_text(encoding="utf-8")
    assert "9 questions a task, seeds 0, 1, 2;" in text and "55.0 ± 2.1" in text


def test_what_cannot_be_written_is_refused(tmp_path):
    page = tmp_path / "README.md"
    with pytest.raises(TokenselError, match=r"none\.csv: no such file"):
        readme.write(page, tmp_path / "none.csv")
    with pytest.raises(TokenselError, match="no results for random, 30 % on reading"):
        readme.results_table(long_table().query("not (method == 'random' and keep == 0.3)"))
    long_table().to_csv(tmp_path / "sweep.csv", index=False)
    with pytest.raises(TokenselError, match=r"sweep\.provenance\.json: no such file"):
        readme.write(page, tmp_path / "sweep.csv")
    (tmp_path / "sweep.provenance.json").write_text("{}")
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(TokenselError, match="has no <!-- results"):
        readme.write(page, tmp_path / "sweep.csv")
