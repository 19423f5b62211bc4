"""What an evaluation is asked to do, checked before anything heavy is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, no_type_check

from tokensel.benchmarks.conditions import SERVED, Condition, check_served, parse_pairs
from tokensel.benchmarks.server import parse_body, parse_url
from tokensel.benchmarks.shards import Shard
from tokensel.benchmarks.table import Benchmark, load_suite
from tokensel.utils.errors import TokenselError, check_names
from tokensel.utils.options import SEED_MOST, Option, check_fields, fields_of, revision_option

KEEPS = tuple(round(0.1 * i, 1) for i in range(1, 10))
SHORT_KEEPS = KEEPS[:6]
SEED = "{seed}"  # in the name of a trained part

# headings under which the command line lists the options
DATA, MODEL, RUNNING, INSIDE = "Data", "Model", "Running", "Inside the language model"
BEFORE, TABLES, SERVERS = "Before the language model", "Tables", "Servers instead of a model"
# what a server decides, so that an evaluation through servers cannot
_OF_THE_MODEL = (MODEL, INSIDE, BEFORE)
_OF_THE_PROCESS = ("batch_size", "seeds")


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class EvalConfig:
    """One evaluation: benchmark x method x keep; each field says what it means and what it may hold.

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    suite: Annotated[
        str,
        Option("Module with a table BENCHMARKS; the paper's ten are tokensel.benchmarks.paper.", DATA),
    ]
    model: Annotated[
        str | None, Option("Vision-language model: folder or Hub id; or give --server.", MODEL)
    ] = None
    revision: Annotated[str | None, revision_option(MODEL)] = None
    data: Annotated[
        str | None,
        Option("Folder with a folder of parquet files for each benchmark, instead of the Hub.", DATA),
    ] = None
    benchmarks: Annotated[
        tuple[str, ...], Option("Benchmarks of the suite, comma-separated; all by default.", DATA)
    ] = ()
    # with servers: full, none and served, see tokensel.benchmarks.served
    # full, none, vtw, dyrate and sparsevlm leave no choice of a keep and are run once, the others per keep
    methods: Annotated[
        tuple[str, ...],
        Option(
            "Comma-separated: full, none, selector, random, uniform, norm, cls, diversity, dart, hired, "
            "apet, visionzip, cdpruner, scope, diffprune, visionselector, any of these with lowest- before "
            "it, asked, downsample, pool, native; inside the language model fastv, vtw, dyrate, fixed, "
            "exponential, pyramiddrop, feather, sparsevlm, priortr, clse, random-cut, fastocr; both in turn, "
            "as selector+fastv. With --server: full, none, served.",
            RUNNING,
        ),
    ] = ("full", "none", "random", "selector")
    # 0.1 to 0.6 where the model's own packing interpolates (Sec. 5.2 of the paper: answers got worse where
    # the context outgrew the model's own)
    keeps: Annotated[
        tuple[float, ...],
        Option(
            "Fractions of the visual tokens to keep, comma-separated; by default 0.1 to 0.9, OneVision 0.6.",
            RUNNING,
            above=0,
            most=1,
            example="0.3",
        ),
    ] = ()
    n: Annotated[int | None, Option("Questions a benchmark, the first of the split.", DATA, least=1)] = 400
    split: Annotated[
        str, Option("Split of every benchmark; test stands for the split that is scored.", DATA)
    ] = "test"
    seed: Annotated[
        int, Option("Seed of random selection and of the bootstrap.", RUNNING, least=0, most=SEED_MOST)
    ] = 0
    seeds: Annotated[
        tuple[int, ...],
        Option(
            "Several seeds of random selection, and of trained parts with {seed} in their name, "
            "comma-separated, a row each.",
            RUNNING,
            least=0,
            most=SEED_MOST,
        ),
    ] = ()
    selector: Annotated[
        str | None, Option("Trained selector: folder or Hub id; {seed} in it stands for each seed.", MODEL)
    ] = None
    diffprune: Annotated[str | None, Option("Trained DiffPrune: folder or Hub id.", MODEL)] = None
    visionselector: Annotated[str | None, Option("Trained VisionSelector: folder or Hub id.", MODEL)] = None
    inside: Annotated[
        float,
        Option(
            "Fraction that a schedule keeps of the tokens chosen before, as in selector+fastv.",
            INSIDE,
            above=0,
            most=1,
            example="0.5",
        ),
    ] = 0.5
    layer: Annotated[
        int,
        Option(
            "First layer at which fastv, fixed, exponential, priortr, random-cut and fastocr drop tokens.",
            INSIDE,
            least=1,
        ),
    ] = 2
    # half of the layers, as in its paper
    vtw_layer: Annotated[
        int | None,
        Option(
            "First layer without visual tokens under vtw; half of the layers by default.", INSIDE, least=1
        ),
    ] = None
    sparsevlm_scale: Annotated[
        float,
        Option(
            "Share of the tokens beyond the rank that sparsevlm drops at each cut.",
            INSIDE,
            least=0,
            most=1,
            example="0.5",
        ),
    ] = 0.5
    sparsevlm_recycling: Annotated[
        float,
        Option(
            "Share of the dropped tokens that sparsevlm clusters, to keep a token for about ten of them.",
            INSIDE,
            least=0,
            most=1,
            example="0.3",
        ),
    ] = 0.0
    priortr_prior: Annotated[
        Literal["token", "forward"],
        Option("What priortr knows without the question: a token's attention, or a second pass's.", INSIDE),
    ] = "token"
    clse_lowest: Annotated[
        bool, Option("Let clse keep what changes least, a control that should fail.", INSIDE)
    ] = False
    dyrate: Annotated[str | None, Option("Trained rate predictor of DyRate: folder or Hub id.", MODEL)] = None
    batch_size: Annotated[
        int, Option("Questions at a time; changes the speed, not the scores.", RUNNING, least=1)
    ] = 32
    device: Annotated[str, Option("cpu, cuda, cuda:1 ...; auto: a GPU if there is one.", MODEL)] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("auto: float32 on a CPU, the checkpoint's own on a GPU.", MODEL),
    ] = "auto"
    # these eight are explained in tokensel.vlm.choose.Choices
    budget: Annotated[
        Literal["image", "tile", "threshold"],
        Option(
            "Keep the fraction of each image, of each tile, or on average, by one threshold for all images.",
            BEFORE,
        ),
    ] = "image"
    thumbnail: Annotated[
        Literal["compete", "keep", "last", "drop"],
        Option("Tokens of the thumbnail tile compete, come first, come last, or are dropped.", BEFORE),
    ] = "compete"
    # of schedules too
    newline: Annotated[
        Literal["keep", "drop", "row"],
        Option("Newline tokens: keep all, drop all, or keep those of rows with a kept token.", BEFORE),
    ] = "keep"
    positions: Annotated[
        Literal["compact", "original"],
        Option("Renumber the positions of the kept tokens, or keep the original ones.", BEFORE),
    ] = "original"
    attention: Annotated[
        Literal["plain", "proportional", "uniform"],
        Option("Kept tokens count once, for the dropped ones most like them, or for equally many.", BEFORE),
    ] = "plain"
    strength: Annotated[
        float,
        Option("Factor of what such attention adds: 0 for nothing.", BEFORE, least=0, example="0.5"),
    ] = 1.0
    dropped: Annotated[
        Literal["removed", "masked", "blank", "copied"],
        Option("Remove dropped tokens; or, to study it, mask them or fill their places.", BEFORE),
    ] = "removed"
    neighbours: Annotated[
        int,
        Option("Cells to each side in its row that each brings along; the budget stays.", BEFORE, least=0),
    ] = 0
    server: Annotated[
        tuple[str, ...],
        Option(
            "OpenAI-compatible servers of one model, comma-separated URLs; they share the questions. An API "
            "key is read from OPENAI_API_KEY.",
            SERVERS,
        ),
    ] = ()
    concurrency: Annotated[
        int, Option("Requests that each server has at a time; changes the speed.", SERVERS, least=1)
    ] = 32
    server_keep: Annotated[
        float | None,
        Option(
            "Fraction that the servers keep of every image, where requests cannot choose it; 1 where they "
            "drop nothing. By default each request names its keep, in mm_processor_kwargs as vLLM takes it.",
            SERVERS,
            above=0,
            most=1,
            example="0.5",
        ),
    ] = None
    body: Annotated[
        str | None,
        Option('Fields to add to every request, as JSON, such as {"add_special_tokens": true}.', SERVERS),
    ] = None
    # at every keep that the two share or, written method@keep, at the one that is named
    compare: Annotated[
        tuple[str, ...],
        Option("Paired differences as method:against or fastv@0.3:random@0.3, comma-separated.", TABLES),
    ] = ("selector:random",)
    shard: Annotated[
        str, Option("Part i of n of the sweep, as i/n, for several jobs or machines.", RUNNING)
    ] = "1/1"
    out: Annotated[str, Option("Folder of the tables, records below it.", TABLES)] = "_build/results"
    name: Annotated[str, Option("File name of the tables, without ending.", TABLES)] = "evaluate"

    def __post_init__(self) -> None:
        check_fields(self)
        parse_pairs(self.compare)
        Shard.of(self.shard)
        if not self.methods:
            raise TokenselError("methods is empty: give at least one, such as full")
        self._check_place()
        if self.server:
            check_served(self.methods, self.keeps, self.server_keep)
            for url in self.server:
                parse_url(url)
            parse_body(self.body)
            return
        from tokensel.methods import check_method  # after what needs no heavy import

        for method in self.methods:
            row = check_method(method)
            if row.learned is not None and getattr(self, row.learned) is None:
                raise TokenselError(
                    f"method {method}: give the folder or Hub id of a trained {row.learned} with "
                    f"--{row.learned}"
                )
            studied = self.attention != "plain" or self.dropped != "removed"
            if studied and row.chooses and (row.scorer is None or row.schedule):
                raise TokenselError(
                    f"method {method}: attention '{self.attention}' and dropped '{self.dropped}' are for "
                    "what a scorer drops, without a schedule; leave the method out"
                )
            if self.dyrate is None and row.uses_predictor:
                raise TokenselError(
                    f"method {method}: give the folder or Hub id of a trained predictor with --dyrate"
                )

    def _check_place(self) -> None:
        """Raise unless the model is either here or on servers, with the options of that place alone."""
        if not self.server and self.model is None:
            raise TokenselError("no model: give --model, a folder or Hub id, or --server, a URL")
        for field in fields_of(self):
            value, panel, name = getattr(self, field.name), field.option.panel, field.name.replace("_", "-")
            if value == field.default:
                continue
            if self.server and (panel in _OF_THE_MODEL or field.name in _OF_THE_PROCESS):
                raise TokenselError(
                    f"{field.name} is {value!r} and --server is given: the model is on the server, so leave "
                    f"--{name} out, or leave --server out"
                )
            if not self.server and panel == SERVERS:
                raise TokenselError(
                    f"{field.name} is {value!r} without --server: give --server, or leave --{name} out"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvalConfig":
        """A configuration from plain JSON values.

        Raises:
            TokenselError: an unknown key, or a value out of range.
        """
        check_names(values, [field.name for field in fields(cls)])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which :meth:`from_dict` builds the same configuration."""
        return asdict(self)

    def choices(self) -> dict[str, Any]:
        """The fields of :class:`~tokensel.vlm.choose.Choices`."""
        return {
            "budget": self.budget,
            "thumbnail": self.thumbnail,
            "newline": self.newline,
            "positions": self.positions,
            "attention": self.attention,
            "strength": self.strength,
            "dropped": self.dropped,
            "neighbours": self.neighbours,
        }

    def learned(self, option: str, seed: int) -> str:
        """The folder or Hub id of a trained part, under a seed."""
        return getattr(self, option).replace(SEED, str(seed))

    def suite_benchmarks(self) -> dict[str, Benchmark]:
        """The benchmarks to evaluate on; raises ``TokenselError`` for an unknown suite or name."""
        return load_suite(self.suite, self.benchmarks, self.data)

    def conditions(self) -> list[Condition]:
        """Every way in which each question is asked, in the order of the table.

        A method that leaves no choice of a budget has one row: ``none`` at keep 0, the others at keep 1.
        """
        if self.server:
            keeps = {method: self.keeps if fixed is None else (fixed,) for method, fixed in SERVED.items()}
            rows = [Condition(method, float(k), self.seed) for method in self.methods for k in keeps[method]]
            return list(dict.fromkeys(rows))
        from tokensel.methods import check_method

        conditions = []
        for method in self.methods:
            row = check_method(method)
            keeps = self.keeps if row.uses_keep else (0.0 if method == "none" else 1.0,)
            trained = row.learned is not None and SEED in (getattr(self, row.learned) or "")
            seeds = (self.seeds or (self.seed,)) if row.uses_seed or trained else (self.seed,)
            conditions += [Condition(method, float(keep), seed) for keep in keeps for seed in seeds]
        return list(dict.fromkeys(conditions))
