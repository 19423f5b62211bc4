"""Chapters draw the questions of any suite that come with one image."""

import string
from dataclasses import replace

import pytest
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from tokensel.benchmarks import Benchmark
from tokensel.book import illustrated
from tokensel.book.mini.suite import BENCHMARKS
from tokensel.utils.errors import TokenselError


def dataset(counts: list[int | None], several: bool) -> Dataset:
    """A row for each count of images; None for a row whose column is empty."""
    rows = []
    for number, count in enumerate(counts):
        images = [Pillow.new("RGB", (2, 2), (number, 0, 0)) for _ in range(count or 0)]
        image = None if count is None else images if several else (images[0] if images else None)
        rows.append({"image": image, "question": "q", "answers": ["a"], "question_id": str(number)})
    texts = {"question": Value("string"), "answers": List(Value("string")), "question_id": Value("string")}
    return Dataset.from_list(rows, features=Features(image=List(Image()) if several else Image(), **texts))


def suite(*datasets: Dataset) -> dict[str, Benchmark]:
    def loader(rows: Dataset):
        return lambda split, n: rows.select(range(len(rows) if n is None else min(n, len(rows))))

    return {
        name: Benchmark(name, "reading", "anls", 3, loader(rows), lambda row: row["question"])
        for name, rows in zip(string.ascii_lowercase, datasets)
    }


@settings(max_examples=40, deadline=None)
@given(
    st.booleans(),
    st.lists(st.sampled_from([None, 0, 1, 1, 2, 3]), min_size=1, max_size=12),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_the_first_rows_with_one_image_are_given_whatever_the_others_have(several, counts, n):
    if not several:
        counts = [count and 1 for count in counts]
    right = [str(number) for number, count in enumerate(counts) if count == 1][:n]
    benchmarks = suite(dataset(counts, several))
    if not right:
        with pytest.raises(TokenselError, match=r"no question about exactly one image .*\(a\)"):
            illustrated(benchmarks)
        return
    rows = illustrated(benchmarks)["a"].load("test", n)
    assert list(rows["question_id"]) == right
    assert [image.getpixel((0, 0))[0] for image in rows["image"]] == [int(name) for name in right]
    assert list(rows[0]["answers"]) == ["a"]


def test_a_page_that_the_suite_lacks_is_one_line():
    benchmarks = suite(dataset([1], False), dataset([2], True))
    assert list(illustrated(benchmarks, page="a")) == ["a"]
    for page in ("forms", "b"):
        with pytest.raises(TokenselError, match=f"page is '{page}': .* give page one of a"):
            illustrated(benchmarks, page=page)


def test_only_the_benchmarks_of_a_group_are_given_and_a_group_that_the_suite_lacks_is_one_line():
    benchmarks = suite(dataset([1], False), dataset([1], False))
    benchmarks["b"] = replace(benchmarks["b"], group="long")
    assert list(illustrated(benchmarks, group="long")) == ["b"]
    assert list(illustrated(benchmarks)) == ["a", "b"]
    with pytest.raises(TokenselError, match=r"group is 'general': .* give group one of long, reading"):
        illustrated(benchmarks, group="general")


def test_the_suite_of_the_book_stays_as_it_is():
    few = {name: BENCHMARKS[name] for name in ("forms", "transcribe")}
    for name, benchmark in illustrated(few, page="forms").items():
        ours, theirs = benchmark.load("test", 3), BENCHMARKS[name].load("test", 3)
        assert ours.features == theirs.features and ours.with_format("arrow")[:].equals(
            theirs.with_format("arrow")[:]
        )
