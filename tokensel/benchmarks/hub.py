"""Benchmarks that are kept on the hub: streamed once, only as many questions as are asked, into a file that is read in place."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from tokensel.utils.errors import TokenselError, needs, reason
from tokensel.utils.files import write_atomic
from tokensel.utils.provenance import digest

with needs("eval"):
    import datasets
    from datasets.arrow_writer import ArrowWriter
    from filelock import FileLock

TEST = "test"  # the split that is scored, whatever its own name
_ROWS = 16  # rows held back while writing: pages of documents have a megabyte and more


@dataclass(frozen=True)
class HubData:
    """The ``load`` of a benchmark on the hub, or of the same parquet files in a folder.

    Attributes:
        path: id of the dataset.
        config: its configuration, where it has several.
        split: the one that has answers, asked for as ``"test"`` (some benchmarks keep the answers of their test split secret).
        columns: what ``read`` reads.
        read: from a row and its number to ``question``, ``answers``, ``question_id``, ``image`` (encoded; a list where a
            question may have several) and, if there are any, ``options``, ``category`` and ``cluster``.
        several: whether ``image`` is a list.
        pictures: configuration that holds the pictures by their ``id``, where the rows have only an ``imageId`` (GQA).
        circles: ``n`` counts clusters, each with all its rows, and not rows (MMBench).
        folder: a local copy to read instead; see :meth:`below`.
        revision: commit on the hub; by default the newest, which is then recorded.
    """

    path: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], int], dict[str, Any]]
    several: bool = False
    pictures: str | None = None
    circles: bool = False
    folder: Path | None = None
    revision: str | None = None

    def below(self, data: str, name: str) -> "HubData":
        """The same benchmark, read from ``data/<name>`` or ``data/<last part of the hub id>``: parquet files as on the hub.

        Raises:
            TokenselError: neither folder is there.
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
        """The first ``n`` questions of a split, memory-mapped; ``None`` for all. Fetched once, then found again.

        Raises:
            TokenselError: the hub is out of reach and no folder was given, no such split, or rows of another making.
        """
        if not (self.folder or self.revision):
            return replace(self, revision=self._newest())(split, n)
        split = self.split if split == TEST else split
        source = self._source(split)
        module = inspect.getsource(inspect.getmodule(self.read))
        file = Path(datasets.config.HF_DATASETS_CACHE) / "tokensel" / f"{digest([source, n, module])}.arrow"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):  # of several processes one fetches
                if not file.exists():
                    write_atomic(file, lambda part: self._write(part, split, n))
        rows = datasets.Dataset.from_file(str(file))
        rows.info.description = source
        return rows

    def _source(self, split: str) -> str:
        """Where the rows come from, to the commit or to the files."""
        if self.folder:
            files = [
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for file in self._files(self.config, split)
            ]
            return f"{self.folder} {self.config or ''} {split} {digest(files)}"
        return f"{self.path} {self.config or ''} {split} {self.revision}"

    def _newest(self) -> str:
        try:
            return HfApi().dataset_info(self.path, timeout=10).sha
        except (
            Exception
        ) as error:  # the client's connection errors have other classes in each of its versions
            raise self._missing(error) from None

    def _missing(self, error: Exception) -> TokenselError:
        return TokenselError(
            f"'{self.path}': not to be had from the hub ({reason(error)}); run `hf download {self.path} --repo-type dataset "
            f"--local-dir FOLDER/{self.path.split('/')[-1].lower()}` while online and give --data FOLDER"
        )

    def _files(self, config: str | None, split: str) -> list[Path]:
        """The parquet files of a split, named after it as on the hub; all, where none is so named."""
        inner = self.folder / config if config and (self.folder / config).is_dir() else self.folder
        files = sorted(inner.rglob("*.parquet"))
        if not files:
            raise TokenselError(f"{inner}: no parquet files; fill it with a copy of {self.path} from the hub")
        return [file for file in files if file.name.startswith(split)] or files

    def _stream(self, config: str | None, split: str) -> datasets.IterableDataset:
        """Raw rows, pictures left encoded."""
        if self.folder:
            files = [str(file) for file in self._files(config, split)]
            # by default whole row groups are read, of which pages of documents make a gigabyte
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
        one = datasets.Image(decode=True)
        text = datasets.Value("string")
        features = datasets.Features(
            image=datasets.List(one) if self.several else one,
            question=text, answers=datasets.List(text), question_id=text,
            options=datasets.List(text), category=text, cluster=text,
        )  # fmt: skip
        with ArrowWriter(path=str(file), features=features, writer_batch_size=_ROWS) as writer:
            for row in self._rows(split, n):
                writer.write({"options": [], "category": "", "cluster": ""} | row)
            writer.finalize()

    def _rows(self, split: str, n: int | None) -> Iterator[dict[str, Any]]:
        try:
            rows = self._stream(self.config, split)
            if rows.column_names is not None:
                if lost := [name for name in self.columns if name not in rows.column_names]:
                    raise TokenselError(
                        f"{self.folder or self.path}: its rows have no {lost[0]!r}, only {rows.column_names}"
                    )
                rows = rows.select_columns(list(self.columns))
            if n is not None and not self.circles:
                rows = rows.take(n)
            by_id = (
                {row["id"]: row["image"] for row in self._stream(self.pictures, split)}
                if self.pictures
                else {}
            )
            circles: set[str] = set()
            for number, row in enumerate(rows):
                if self.pictures:
                    row = row | {"image": by_id[row["imageId"]]}
                found = self.read(row, number)
                if self.circles and n is not None:
                    if len(circles) >= n and found["cluster"] not in circles:
                        continue
                    circles.add(found["cluster"])
                yield found
        except TokenselError:
            raise
        except (
            Exception
        ) as error:  # the network's, the parquet reader's and the hub client's, each of its own kind
            if self.folder:
                raise TokenselError(
                    f"{self.folder}: cannot be read ({reason(error)}); copy it from the hub again"
                ) from None
            raise self._missing(error) from None
