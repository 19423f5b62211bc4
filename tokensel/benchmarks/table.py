"""What is evaluated: a benchmark is one row of a table, a suite is a module with such a table."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokensel.benchmarks.metrics import METRICS
from tokensel.utils.errors import TokenselError, reason

__all__ = ["AGGREGATES", "COLUMNS", "GROUPS", "Benchmark", "load_suite"]

GROUPS = ("reading", "general", "long")
AGGREGATES = ("mean", "all", "macro")
COLUMNS = ("image", "question", "answers", "question_id")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its questions come from, how they become prompts, how answers are scored.

    Attributes:
        name: its name in tables and records.
        group: ``reading`` and ``general`` are the two groups of the paper (Figs. 4 and 5); ``long`` has long
            answers.
        metric: a key of :data:`tokensel.benchmarks.metrics.METRICS`.
        max_new_tokens: most tokens of an answer.
        load: ``load(split, n)`` gives the first ``n`` questions of a split (``None``: all) as a
            ``datasets.Dataset`` with the columns ``image`` (one image, a list of several, or ``None``),
            ``question``, ``answers`` (list of text), ``question_id`` (text, unique) and, if it has them,
            ``options`` (list of text, for multiple choice), ``category`` (text; scores are also reported by
            category) and ``cluster`` (text).
        prompt: ``prompt(row)`` gives the model's prompt, without chat template or image placeholder.
        aggregate: how the scores of questions are combined. ``mean``: their mean. ``all``: the rows of a
            cluster are one question asked in several ways, right only if all are right (MMBench's circular
            rule). ``macro``: the mean of the clusters' means.
    """

    name: str
    group: str
    metric: str
    max_new_tokens: int
    load: Callable[[str, int | None], Any]
    prompt: Callable[[Mapping[str, Any]], str]
    aggregate: str = "mean"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise TokenselError(
                f"benchmark {self.name}: group is {self.group!r}: choose from {', '.join(GROUPS)}"
            )
        if self.metric not in METRICS:
            raise TokenselError(
                f"benchmark {self.name}: metric is {self.metric!r}: choose from {', '.join(METRICS)}"
            )
        if self.aggregate not in AGGREGATES:
            raise TokenselError(
                f"benchmark {self.name}: aggregate is {self.aggregate!r}: choose from {', '.join(AGGREGATES)}"
            )
        if self.max_new_tokens < 1:
            raise TokenselError(
                f"benchmark {self.name}: max_new_tokens is {self.max_new_tokens}: give at least 1"
            )


def load_suite(suite: str, names: Iterable[str] = (), data: str | None = None) -> dict[str, Benchmark]:
    """The benchmarks of a suite, in the suite's order.

    Args:
        suite: dotted name of a module with ``BENCHMARKS: dict[str, Benchmark]``.
        names: the benchmarks to take; empty means all.
        data: folder to read the questions from, for suites that would download them from the Hub
            (see :class:`tokensel.benchmarks.hub.HubData`).

    Raises:
        TokenselError: no such module, no ``BENCHMARKS`` in it, an unknown name, or a folder for a suite that
            reads none.
    """
    try:
        table = importlib.import_module(suite).BENCHMARKS
    except ModuleNotFoundError as error:
        raise TokenselError(
            f"suite {suite}: no module named {error.name}; give the dotted name of a module"
        ) from None
    except ValueError:  # an empty name
        raise TokenselError(f"suite is {suite!r}: give the dotted name of a module") from None
    except AttributeError:
        raise TokenselError(f"suite {suite}: the module has no table BENCHMARKS") from None
    except TypeError as error:  # a Benchmark with a field that is missing or unknown
        raise TokenselError(f"suite {suite}: {reason(error)}; see tokensel.benchmarks.Benchmark") from None
    if not isinstance(table, Mapping) or not all(isinstance(row, Benchmark) for row in table.values()):
        raise TokenselError(f"suite {suite}: BENCHMARKS has to be a dictionary from names to Benchmark rows")
    names = tuple(names)
    if unknown := [name for name in names if name not in table]:
        raise TokenselError(f"benchmark {unknown[0]}: not in {suite}, which has {', '.join(table)}")
    chosen = {name: benchmark for name, benchmark in table.items() if not names or name in names}
    if data is None:
        return chosen
    if any(not hasattr(benchmark.load, "below") for benchmark in chosen.values()):
        raise TokenselError(f"data is {data!r}: the suite {suite} reads no folder; leave it out")
    return {name: replace(row, load=row.load.below(data, name)) for name, row in chosen.items()}
