"""The part of a suite that chapters can draw: its questions about exactly one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokensel.utils.errors import TokenselError

if TYPE_CHECKING:
    from datasets import Dataset

    from tokensel.benchmarks.table import Benchmark


def illustrated(
    benchmarks: Mapping[str, Benchmark],
    split: str = "test",
    page: str | None = None,
    group: str | None = None,
) -> dict[str, Benchmark]:
    """The benchmarks of a suite with only those of their questions that come with one image.

    A suite may have questions without an image and with several. ``load(split, n)`` of what is returned
    gives the first ``n`` of the others, each with an image instead of a list; for a suite that has no such
    questions it gives what it always gave. Benchmarks without any are left out.

    Args:
        benchmarks: from :func:`tokensel.benchmarks.table.load_suite`.
        split: in which a benchmark needs at least one question about one image.
        page: a benchmark that the chapter cannot do without, its parameter of this name.
        group: only benchmarks of this group are wanted, the chapter's parameter of this name.

    Raises:
        TokenselError: nothing is left, not the benchmark ``page``, or none of ``group``.
    """
    groups = sorted({benchmark.group for benchmark in benchmarks.values()})
    if group is not None and group not in groups:
        raise TokenselError(
            f"group is '{group}': the suite has no benchmarks of that group; give group one of "
            f"{', '.join(groups)}"
        )
    if group is not None:
        benchmarks = {name: benchmark for name, benchmark in benchmarks.items() if benchmark.group == group}
    chosen = {
        name: replace(benchmark, load=_OneImage(benchmark.load)) for name, benchmark in benchmarks.items()
    }
    chosen = {name: benchmark for name, benchmark in chosen.items() if len(benchmark.load(split, 1))}
    if not chosen:
        raise TokenselError(
            f"the suite has no question about exactly one image in its split '{split}' "
            f"({', '.join(benchmarks)}): this chapter needs one to draw"
        )
    if page is not None and page not in chosen:
        raise TokenselError(
            f"page is '{page}': the suite has no questions about one image of that name; give page one of "
            f"{', '.join(chosen)}"
        )
    return chosen


class _OneImage:
    """``load`` of a benchmark, questions without exactly one image left out."""

    def __init__(self, load: Any) -> None:
        self.load = load

    def __call__(self, split: str, n: int | None) -> Dataset:
        wanted, several = n, False
        while True:
            rows = self.load(split, wanted)
            several = hasattr(rows.features["image"], "feature")  # a list of images
            places = _with_one_image(rows, several)
            # a suite is read as far as needed, since it may be large
            if wanted is None or len(places) >= (n or 0) or len(rows) < wanted:
                break
            wanted *= 4
        places = places if n is None else places[:n]
        if len(places) < len(rows):
            rows = rows.select(places)
        return _single(rows) if several else rows


def _with_one_image(rows: Dataset, several: bool) -> list[int]:
    images = rows.with_format("arrow")[:]["image"]  # without decoding them
    if several:
        return [place for place, image in enumerate(images) if image.is_valid and len(image) == 1]
    return [place for place, there in enumerate(images.is_valid().to_pylist()) if there]


def _single(rows: Dataset) -> Dataset:
    from datasets import Dataset, Image

    features = rows.features.copy()
    features["image"] = Image()
    columns = {name: list(rows[name]) for name in rows.column_names if name != "image"}
    return Dataset.from_dict(columns | {"image": [image[0] for image in rows["image"]]}, features=features)
