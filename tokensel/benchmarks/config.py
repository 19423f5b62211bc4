"""What an evaluation is asked to do, checked before anything heavy is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tokensel.benchmarks.results import Condition, parse_pairs
from tokensel.benchmarks.shards import Shard
from tokensel.benchmarks.table import Benchmark, load_suite
from tokensel.utils.errors import TokenselError, check_keep, check_names

KEEPS = tuple(round(0.1 * i, 1) for i in range(1, 10))
SHORT_KEEPS = KEEPS[:6]
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation: benchmark x method x keep.

    Attributes:
        model: folder or hub id of the vision-language model.
        suite: dotted name of a module with a table ``BENCHMARKS``; ``tokensel.benchmarks.paper`` has the paper's ten.
        data: folder with the questions, for a suite that would fetch them from the hub.
        benchmarks: names from the suite; empty means all.
        methods: names that :func:`tokensel.methods.check_method` knows. Those that leave no choice of a budget
            (``full``, ``none``, ``vtw``, ``dyrate``) are run once, the others per keep.
        keeps: fractions of the visual tokens to keep, each in (0, 1], by what chooses them before the language model, or
            where nothing does, by the schedule inside; none means those of the paper for the model: 0.1 to 0.9, and 0.1 to
            0.6 where the model's own packing interpolates (Sec. 5.2: answers got worse where the context outgrew the
            model's own).
        inside: the fraction that a schedule keeps of what was chosen before, as FastV in ``selector+fastv``.
        layer: the first layer that FastV and the fixed and exponential rates shorten.
        vtw_layer: the first layer that sees no image under VTW; half of the layers by default, as in its paper.
        dyrate: folder or hub id of the trained rate predictor, for the method ``dyrate``.
        n: questions a benchmark, from the front of the split; ``None`` means all.
        split: split of every benchmark; ``test`` is the one that is scored, whatever its own name.
        seed: of the bootstrap, and of ``random`` where ``seeds`` is empty.
        seeds: seeds of ``random``, each a row of its own.
        selector: folder or hub id of the trained selector, for the scorer of that name.
        batch_size: questions at a time; changes the speed, not the scores.
        device, dtype: of the model; ``auto`` takes a GPU and its 16-bit floats where there is one.
        budget, thumbnail, newline, positions: the choices of the seam, see :mod:`tokensel.vlm`.
        compare: pairs ``method:against`` for the table of paired differences, each at every keep it shares with
            the other or, written ``method@keep``, at the one that is named.
        shard: ``i/n`` for part ``i`` of a sweep that ``n`` machines or jobs share.
        out: folder of the tables; the records lie below it.
        name: file name of the tables, without ending.
    """

    model: str
    suite: str
    data: str | None = None
    benchmarks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("full", "none", "random", "selector")
    keeps: tuple[float, ...] = ()
    n: int | None = 400
    split: str = "test"
    seed: int = 0
    seeds: tuple[int, ...] = ()
    selector: str | None = None
    inside: float = 0.5
    layer: int = 2
    vtw_layer: int | None = None
    dyrate: str | None = None
    batch_size: int = 32
    device: str = "auto"
    dtype: str = "auto"
    budget: str = "image"
    thumbnail: str = "last"
    newline: str = "keep"
    positions: str = "original"
    compare: tuple[str, ...] = ("selector:random",)
    shard: str = "1/1"
    out: str = "_build/results"
    name: str = "evaluate"

    def __post_init__(self) -> None:
        from tokensel.methods import check_method
        from tokensel.vlm import Choices

        rows = [check_method(method) for method in self.methods]
        for keep in (*self.keeps, self.inside):
            check_keep(keep)
        Choices.of(self.choices())
        if self.dtype not in DTYPES:
            raise TokenselError(f"dtype is {self.dtype!r}: choose from {', '.join(DTYPES)}")
        for name in ("n", "batch_size", "layer", "vtw_layer"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise TokenselError(f"{name} is {value}: give at least 1")
        if self.selector is None and any(row.uses_selector for row in rows):
            raise TokenselError("method selector: give the folder or hub id of a trained one with --selector")
        if self.dyrate is None and any(row.schedule == "dyrate" for row in rows):
            raise TokenselError(
                "method dyrate: give the folder or hub id of a trained predictor with --dyrate"
            )
        parse_pairs(self.compare)
        Shard.of(self.shard)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvalConfig":
        """A configuration from plain JSON values.

        Raises:
            TokenselError: a key that is no option, or a value out of range.
        """
        check_names(values, [field.name for field in fields(cls)])
        return cls(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which :meth:`from_dict` builds the same configuration."""
        return asdict(self)

    def choices(self) -> dict[str, str]:
        """The choices of the seam."""
        return {
            "budget": self.budget,
            "thumbnail": self.thumbnail,
            "newline": self.newline,
            "positions": self.positions,
        }

    def suite_benchmarks(self) -> dict[str, Benchmark]:
        """The benchmarks asked for; raises ``TokenselError`` for an unknown suite or name."""
        return load_suite(self.suite, self.benchmarks, self.data)

    def conditions(self) -> list[Condition]:
        """Every way in which each question is asked, in the order of the table.

        A method that leaves no choice of a budget has one row: ``none`` at keep 0, the others at keep 1.
        """
        from tokensel.methods import check_method

        found = []
        for method in self.methods:
            row = check_method(method)
            keeps = self.keeps if row.uses_keep else (0.0 if method == "none" else 1.0,)
            seeds = (self.seeds or (self.seed,)) if row.uses_seed else (self.seed,)
            found += [Condition(method, float(keep), seed) for keep in keeps for seed in seeds]
        return list(dict.fromkeys(found))
