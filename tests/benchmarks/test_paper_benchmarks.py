"""The paper's ten benchmarks from parquet files with the Hub's columns, compared with lmms-eval 0.7.3."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import suite_tiny
from tiny import noise_image

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.hub import HubData
from tokensel.benchmarks.letters import ranked_letter
from tokensel.benchmarks.metrics import METRICS
from tokensel.benchmarks.paper import BENCHMARKS
from tokensel.benchmarks.questions import image_digest, load_questions
from tokensel.benchmarks.results import ScoreTable, category_rows, score_rows
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.table import load_suite
from tokensel.utils.errors import TokenselError

DATA = Path(__file__).parent / "lmms_eval"
SCORES = json.loads((DATA / "lmms_eval_scores.json").read_text(encoding="utf-8"))
PROMPTS = json.loads((DATA / "lmms_eval_prompts.json").read_text(encoding="utf-8"))
SUITE = "tokensel.benchmarks.paper"


def encoded(seed: int) -> dict:
    file = io.BytesIO()
    noise_image(20 + seed, 30, seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_parquet(file: Path, rows: list[dict], images: tuple[str, ...]) -> None:
    """As on the hub: image columns marked as such in the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    for name in images:
        data = data.cast_column(name, datasets.Image(decode=False))
    data.to_parquet(file)


def write_benchmark(folder: Path, name: str, rows: list[dict]) -> None:
    load = BENCHMARKS[name].load
    if name == "mmmu":
        named = [
            {f"image_{k}": encoded(10 * i + k) if k < 4 else None for k in range(1, 8)}
            for i in range(len(rows))
        ]
        rows = [row | more for row, more in zip(rows, named)]
        write_parquet(
            folder / "validation-00000-of-00001.parquet", rows, tuple(f"image_{k}" for k in range(1, 8))
        )
    elif name == "gqa":
        write_parquet(folder / load.config / "testdev-00000-of-00001.parquet", rows, ())
        pictures = [
            {"id": key, "image": encoded(i)} for i, key in enumerate(("n161313", "n235859", "unused"))
        ]
        write_parquet(folder / load.images / "testdev-00000-of-00001.parquet", pictures, ("image",))
    else:
        rows = [row | {"image": encoded(i)} for i, row in enumerate(rows)]
        half = len(rows) // 2  # in two files, as large data sets come
        for part, each in enumerate((rows[:half], rows[half:])):
            if each:
                file = folder / (load.config or "data") / f"{load.split}-0000{part}-of-00002.parquet"
                write_parquet(file, each, ("image",))
        write_parquet(folder / (load.config or "data") / "other-00000-of-00001.parquet", rows[:1], ("image",))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, each in PROMPTS.items():
        write_benchmark(folder / name, name, [question["row"] for question in each])
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def questions(data: Path, name: str, n: int | None = None):
    return load_questions(load_suite(SUITE, [name], str(data))[name], "test", n)


# Prompts and scores


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_are_those_of_lmms_eval(data, name):
    loaded = questions(data, name)
    assert loaded.prompts == [question["prompt"] for question in PROMPTS[name]]
    assert len(set(loaded.ids)) == len(loaded)
    assert str(data) in loaded.source


@pytest.mark.parametrize("metric", SCORES)
def test_scores_are_those_of_lmms_eval(metric):
    table = SCORES[metric]
    assert len(table) >= 200 and 0.05 < np.mean([score for *_, score in table]) < 0.95
    for prediction, answers, options, score in table:
        assert METRICS[metric](prediction, answers, options) == pytest.approx(score, abs=1e-5), (
            prediction,
            answers,
            options,
        )


def test_every_benchmark_has_a_metric_that_was_compared():
    assert {benchmark.metric for benchmark in BENCHMARKS.values()} == set(SCORES)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("docvqa", "0.28", "1975"),
        ("infovqa", "Pinterest", "facebook"),
        ("chartqa", "14.5", "15"),
        ("textvqa", "Dakota", "canon"),
        ("mmbench", "B", "A"),
        ("ai2d", "B. D", "A. c"),
        ("gqa", "No.", "yes"),
        ("mmmu", "(B)", "(A)"),
        ("mmstar", "A", "B"),
        ("scienceqa", "B.", "A."),
    ],
)
def test_the_right_answer_of_the_first_row_scores_and_a_wrong_one_does_not(data, name, right, wrong):
    loaded = questions(data, name)
    assert loaded.score(0, right) == 1.0 and loaded.score(0, wrong) == 0.0
    assert loaded.score(0, "") == 0.0


def test_limits_and_groups_of_the_table():
    limits = {name: benchmark.max_new_tokens for name, benchmark in BENCHMARKS.items()}
    assert limits == dict(
        docvqa=32,
        chartqa=16,
        infovqa=32,
        textvqa=1024,
        mmbench=1024,
        ai2d=16,
        gqa=16,
        mmmu=128,
        mmstar=1024,
        scienceqa=16,
    )
    groups = [name for name, benchmark in BENCHMARKS.items() if benchmark.group == "reading"]
    assert groups == ["docvqa", "chartqa", "infovqa", "textvqa", "mmbench"]  # Fig. 4 of the paper


def test_open_mmmu_answers_are_each_accepted(data):
    loaded = questions(data, "mmmu")
    assert loaded.answers[2] == ["6", "six"] and loaded.options[2] == []
    assert loaded.score(2, "There are six.") == loaded.score(2, "so it is 6") == 1.0
    assert loaded.score(2, "There are 66") == 0.0  # numbers are compared as numbers
    assert loaded.score(3, "It is a minor third") == 1.0


def test_nothing_is_drawn_by_chance():
    assert METRICS["mmmu_answer"]("no idea", ["A"], ["x", "y"]) == 0.0
    assert ranked_letter("...", "ABCD") is None and ranked_letter("nothing here", "ABCD") is None


# Pictures


def test_pictures_arrive_as_they_are_and_several_where_the_question_names_several(data):
    loaded = questions(data, "docvqa")
    for i in range(len(loaded)):
        wanted = noise_image(20 + i, 30, i)
        assert image_digest(loaded.image(i)) == image_digest(wanted) and loaded.size(i) == [wanted.size]
    several = questions(data, "mmmu")
    assert [len(several.image(i)) for i in range(4)] == [1, 3, 1, 1]
    assert image_digest(several.image(1)) == image_digest(
        [noise_image(20 + seed, 30, seed) for seed in (11, 12, 13)]
    )
    assert image_digest(several.image(0)) == image_digest(noise_image(21, 30, 1))
    joined = questions(data, "gqa")
    digests = [image_digest(joined.image(i)) for i in range(3)]
    assert digests[0] == digests[2] == image_digest(noise_image(20, 30, 0)) != digests[1]


def test_a_question_without_a_picture_is_asked_without_one(tmp_path, data):
    rows = [
        question["row"] | {"image": encoded(i) if i else None}
        for i, question in enumerate(PROMPTS["scienceqa"])
    ]
    write_parquet(tmp_path / "scienceqa" / "test-0.parquet", rows, ("image",))
    loaded = questions(tmp_path, "scienceqa")
    assert loaded.image(0) is None and loaded.size(0) == [] and image_digest(None) is None
    assert loaded.image(1) is not None


# Loading


def test_the_first_questions_are_fetched_once(data, monkeypatch):
    written = []
    write = HubData._write
    monkeypatch.setattr(HubData, "_write", lambda self, *args: written.append(args) or write(self, *args))
    few = questions(data, "chartqa", 2)
    assert few.ids == ["0", "1"] and len(questions(data, "chartqa", 2)) == 2 and len(written) == 1
    assert questions(data, "chartqa").prompts[:2] == few.prompts and len(written) == 2
    # other files under the same names are other questions
    rows = [question["row"] | {"image": encoded(9), "question": "new?"} for question in PROMPTS["chartqa"]]
    for file in (data / "chartqa").rglob("test-*.parquet"):
        write_parquet(file, rows[:2], ("image",))
    assert questions(data, "chartqa", 2).prompts[0].startswith("new?") and len(written) == 3
    write_benchmark(data / "chartqa", "chartqa", [question["row"] for question in PROMPTS["chartqa"]])


def test_from_the_hub_the_newest_commit_is_read_and_recorded(data, monkeypatch):
    load_dataset, asked = datasets.load_dataset, []

    def hub(*names, **options):
        if names[0] == "parquet":
            return load_dataset(*names, **options)
        asked.append((*names, options["split"], options["revision"], options["streaming"]))
        files = sorted(str(file) for file in (data / "gqa" / names[1]).glob("*.parquet"))
        return load_dataset("parquet", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(
        "tokensel.benchmarks.hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha="c0ffee")
    )
    loaded = load_questions(BENCHMARKS["gqa"], "test", 2)
    assert loaded.prompts == [question["prompt"] for question in PROMPTS["gqa"]][:2]
    assert loaded.source == "lmms-lab/GQA testdev_balanced_instructions testdev c0ffee"
    configs = ("testdev_balanced_instructions", "testdev_balanced_images")
    assert asked == [("lmms-lab/GQA", name, "testdev", "c0ffee", True) for name in configs]


def test_a_number_of_mmbench_questions_comes_with_all_their_rotations(data):
    loaded = questions(data, "mmbench", 2)
    assert loaded.ids == ["241", "252", "1000241", "1000252"]
    assert loaded.clusters == ["241", "252", "241", "252"]
    assert loaded.options[1] == ["yes", "no"]  # "nan" is no option


def test_a_folder_of_the_hubs_name_serves_too(tmp_path, data):
    (tmp_path / "DocVQA").symlink_to(data / "docvqa")
    assert len(questions(tmp_path, "docvqa")) == len(PROMPTS["docvqa"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_hub_or_folder_one_line_says_what_to_do(tmp_path, name):
    with pytest.raises(
        TokenselError, match=r"could not be downloaded from the Hub .*hf download .* --data FOLDER"
    ) as caught:
        BENCHMARKS[name].load("test", 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(TokenselError, match=f"benchmark {name}: no folder .*hf download"):
        questions(tmp_path, name)


def test_files_of_another_making_are_refused(tmp_path):
    write_parquet(tmp_path / "ai2d" / "test.parquet", [{"image": encoded(0), "question": "?"}], ("image",))
    with pytest.raises(TokenselError, match="its rows have no 'options'"):
        questions(tmp_path, "ai2d")
    (tmp_path / "ai2d" / "test.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(TokenselError, match="cannot be read"):
        questions(tmp_path, "ai2d")
    (tmp_path / "gqa").mkdir()
    with pytest.raises(TokenselError, match="no parquet files"):
        questions(tmp_path, "gqa")
    with pytest.raises(TokenselError, match="reads no folder"):
        load_suite("suite_tiny", data=str(tmp_path))


# Averages


def test_a_circle_is_right_only_if_all_its_rows_are(data):
    loaded = questions(data, "mmbench")
    scores = {
        Condition("full", 1.0, 0): [1.0, 1.0, 1.0, 0.0, 0.0],
        Condition("none", 0.0, 0): [1.0, 1.0, 1.0, 1.0, 0.0],
    }
    table = ScoreTable.of(loaded.benchmark, scores, loaded.clusters, loaded.categories)
    rows = score_rows("m", loaded.benchmark, table.scores)
    assert [(row["score"], row["n"]) for row in rows] == [
        (pytest.approx(1 / 3), 3),
        (pytest.approx(2 / 3), 3),
    ]
    by_category = {
        (row["category"], row["method"]): row["score"] for row in category_rows("m", loaded.benchmark, table)
    }
    assert by_category == {
        ("attribute_reasoning", "full"): 1.0,
        ("attribute_reasoning", "none"): 1.0,
        ("coarse_perception", "full"): 0.0,
        ("coarse_perception", "none"): 0.5,
    }


def test_mmstar_is_the_mean_of_its_classes_not_of_its_questions(data):
    loaded = questions(data, "mmstar")
    scores = {Condition("full", 1.0, 0): [1.0, 0.0, 1.0, 1.0]}  # classes: one, two, two, three
    table = ScoreTable.of(loaded.benchmark, scores, loaded.clusters, loaded.categories)
    (row,) = score_rows("m", loaded.benchmark, table.scores, strata=table.strata)
    assert row["score"] == pytest.approx((1 + 0.5 + 1) / 3) and row["n"] == 4
    assert row["ci_low"] == pytest.approx(2 / 3) and row["ci_high"] == pytest.approx(1.0)
    rows = category_rows("m", loaded.benchmark, table)
    assert {row["category"]: row["score"] for row in rows} == {
        "instance reasoning": 1.0,
        "math": pytest.approx(0.75),
    }


def test_disciplines_of_mmmu(data):
    wanted = ["Business", "Health and Medicine", "Science", "Art and Design"]
    assert questions(data, "mmmu").categories == wanted


# All ten through the runner


def test_the_ten_are_asked_and_scored(data, tmp_path):
    model = suite_tiny.save_models(tmp_path)
    config = EvalConfig(
        model=str(model),
        suite=SUITE,
        data=str(data),
        methods=("full", "none", "random"),
        keeps=(0.3,),
        compare=("random:none",),
        batch_size=3,
        out=str(tmp_path / "out"),
    )
    done = evaluate(
        replace(
            config, benchmarks=tuple(name for name in BENCHMARKS if BENCHMARKS[name].max_new_tokens < 100)
        ),
        False,
    )
    table = list(csv.DictReader(done.table.read_text().splitlines()))
    assert {row["benchmark"] for row in table} == {"docvqa", "chartqa", "infovqa", "ai2d", "gqa", "scienceqa"}
    assert {(row["benchmark"], int(row["n"])) for row in table} >= {("gqa", 3), ("docvqa", 3)}
    told = json.loads(done.provenance.read_text())
    assert set(told["sources"]) == {row["benchmark"] for row in table} and str(data) in told["sources"]["gqa"]
    kinds = {row["category"] for row in csv.DictReader(done.categories.read_text().splitlines())}
    assert kinds == {"human", "augmented"}
    assert evaluate(replace(config, benchmarks=("gqa",)), False).computed == 0


def test_several_pictures_and_rotations_go_through_the_runner(data, tmp_path, monkeypatch):
    model = suite_tiny.save_models(tmp_path)
    for name in ("mmmu", "mmbench"):
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], max_new_tokens=4))
    done = evaluate(
        EvalConfig(
            model=str(model),
            suite=SUITE,
            data=str(data),
            benchmarks=("mmmu", "mmbench"),
            methods=("full", "random"),
            keeps=(0.3,),
            compare=(),
            batch_size=2,
            out=str(tmp_path / "out"),
        ),
        False,
    )
    table = list(csv.DictReader(done.table.read_text().splitlines()))
    assert [(row["benchmark"], row["n"]) for row in table[::2]] == [("mmbench", "3"), ("mmmu", "4")]
    records = [
        json.loads(line)
        for line in next((tmp_path / "out").rglob("mmmu/full/*.jsonl")).read_text().splitlines()
    ]
    tokens = {record["question_id"]: record["n_visual_full"] for record in records}
    assert tokens["validation_Basic_Medical_Science_12"] > 2 * tokens["validation_Music_4"]
