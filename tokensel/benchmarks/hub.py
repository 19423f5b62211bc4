"""Benchmarks on the Hub: streamed once, only as many questions as are needed, into a memory-mapped file."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from tokensel.utils.errors import TokenselError, needs, reason
from tokensel.utils.files import write_atomic
from tokensel.utils.provenance import json_digest

with needs("eval"):
    import datasets
    import datasets.config
    from datasets.arrow_writer import ArrowWriter
    from filelock import FileLock

__all__ = ["TEST", "HubData"]

TEST = "test"  # the split that is scored, whatever its own name
_ROWS = 16  # rows in memory while writing: a scanned page takes a megabyte or more


@dataclass(frozen=True)
class HubData:
    """The ``load`` of a benchmark on the Hub, or of the same parquet files in a folder.

    Attributes:
        path: id of the dataset.
        config: its configuration, where it has several.
        split: the one that has answers, which ``"test"`` stands for (some benchmarks keep the answers of
            their test split secret).
        columns: the columns that ``read`` needs.
        read: from a row and its number to ``question``, ``answers``, ``question_id``, ``image`` (encoded; a
            list where a question may have several) and, if there are any, ``options``, ``category`` and
            ``cluster``.
        several: whether ``image`` is a list.
        images: configuration with the images by ``id``, where the rows have only an ``imageId`` (GQA).
        circular: ``n`` counts clusters, each with all its rows, instead of rows (MMBench).
        folder: a local copy to read instead; see :meth:`below`.
        revision: commit on the Hub; by default the newest, which is then recorded.
    """

    path: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], int], dict[str, Any]]
    several: bool = False
    images: str | None = None
    circular: bool = False
    folder: Path | None = None
    revision: str | None = None

    def below(self, data: str, name: str) -> "HubData":
        """The same benchmark, read from parquet files as on the Hub.

        They lie in ``data/<name>`` or ``data/<last part of the Hub id>``.

        Raises:
            TokenselError: neither folder exists.
        """
        folders = [Path(data) / name, Path(data) / self.path.split("/")[-1]]
        for folder in folders:
            if folder.is_dir():
                return replace(self, folder=folder)
        raise TokenselError(
            f"benchmark {name}: no folder {folders[0]}; "
            f"fill it with `hf download {self.path} --repo-type dataset --local-dir {folders[0]}`"
        )

    def __call__(self, split: str = TEST, n: int | None = None) -> datasets.Dataset:
        """The first ``n`` questions of a split, memory-mapped; ``None`` for all. Downloaded once.

        Raises:
            TokenselError: the Hub cannot be reached and no folder was given, no such split, or rows in
                another format.
        """
        if not (self.folder or self.revision):
            return replace(self, revision=self._newest_revision())(split, n)
        split = self.split if split == TEST else split
        source = self._source(split)
        # a change of the module that reads the rows makes a new file
        module = Path(inspect.getfile(self.read)).read_text(encoding="utf-8")
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "tokensel"
        file = cache / f"{json_digest([source, n, module])}.arrow"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):  # one process downloads, the others wait
                if not file.exists():
                    write_atomic(file, lambda part: self._write(part, split, n))
        rows = datasets.Dataset.from_file(str(file))
        rows.info.description = source
        return rows

    def _source(self, split: str) -> str:
        """Where the rows come from: the commit on the Hub, or the files of the folder."""
        if self.folder:
            files = [
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for file in self._files(self.config, split)
            ]
            return f"{self.folder} {self.config or ''} {split} {json_digest(files)}"
        return f"{self.path} {self.config or ''} {split} {self.revision}"

    def _newest_revision(self) -> str:
        try:
            return HfApi().dataset_info(self.path, timeout=10).sha or "main"
        except (
            Exception
        ) as error:  # the classes of the client's connection errors differ between its versions
            raise self._missing(error) from None

    def _missing(self, error: Exception) -> TokenselError:
        return TokenselError(
            f"'{self.path}': could not be downloaded from the Hub ({reason(error)}); "
            f"run `hf download {self.path} --repo-type dataset "
            f"--local-dir FOLDER/{self.path.split('/')[-1].lower()}` while online and give --data FOLDER"
        )

    def _files(self, config: str | None, split: str) -> list[Path]:
        """The parquet files whose names begin with the split's, as on the Hub; all files where none does."""
        assert self.folder is not None
        inner = self.folder / config if config and (self.folder / config).is_dir() else self.folder
        files = sorted(inner.rglob("*.parquet"))
        if not files:
            raise TokenselError(f"{inner}: no parquet files; fill it with a copy of {self.path} from the Hub")
        return [file for file in files if file.name.startswith(split)] or files

    def _stream(self, config: str | None, split: str) -> datasets.IterableDataset:
        """The rows as they are stored, images still encoded."""
        if self.folder:
            files = [str(file) for file in self._files(config, split)]
            # by default whole row groups are read; with scanned pages one is a gigabyte
            rows = datasets.load_dataset(
                "parquet", data_files=files, split="train", streaming=True, batch_size=_ROWS
            )
        else:
            rows = datasets.load_dataset(
                self.path, config, split=split, revision=self.revision, streaming=True
            )
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows

    def _write(self, file: Path, split: str, n: int | None) -> None:
        image, text = datasets.Image(decode=True), datasets.Value("string")
        names = ("question", "question_id", "category", "cluster")
        features = datasets.Features(
            {
                "image": datasets.List(image) if self.several else image,
                "answers": datasets.List(text),
                "options": datasets.List(text),
                **dict.fromkeys(names, text),
            }
        )
        with ArrowWriter(path=str(file), features=features, writer_batch_size=_ROWS) as writer:
            for row in self._rows(split, n):
                writer.write({"options": [], "category": "", "cluster": ""} | row)
            writer.finalize()

    def _rows(self, split: str, n: int | None) -> Iterator[dict[str, Any]]:
        try:
            rows = self._stream(self.config, split)
            if rows.column_names is not None:
                if missing := [name for name in self.columns if name not in rows.column_names]:
                    source = self.folder or self.path
                    raise TokenselError(
                        f"{source}: its rows have no {missing[0]!r}, only {rows.column_names}"
                    )
                rows = rows.select_columns(list(self.columns))
            if n is not None and not self.circular:
                rows = rows.take(n)
            images = self._stream(self.images, split) if self.images else ()
            by_id = {row["id"]: row["image"] for row in images}
            clusters: set[str] = set()
            for number, row in enumerate(rows):
                if self.images:
                    row = row | {"image": by_id[row["imageId"]]}
                question = self.read(row, number)
                if self.circular and n is not None:
                    if len(clusters) >= n and question["cluster"] not in clusters:
                        continue
                    clusters.add(question["cluster"])
                yield question
        except TokenselError:
            raise
        except Exception as error:  # network, parquet reader and Hub client each have classes of their own
            if self.folder:
                raise TokenselError(
                    f"{self.folder}: cannot be read ({reason(error)}); copy it from the Hub again"
                ) from None
            raise self._missing(error) from None
