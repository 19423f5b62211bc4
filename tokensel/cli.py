"""``python -m tokensel``: train, dyrate, evaluate, cost, mini, book. What a command needs is imported when it runs."""

import errno
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

import typer
from typer.main import get_group

from tokensel.utils.errors import TokenselError

app = typer.Typer(
    name="tokensel",
    help="Keep the visual tokens from which the others can be reconstructed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_DATA, _MODEL, _LOSS, _STEPS, _RUN = "Data", "Model", "Objective", "Optimisation", "Running"
_SEAM, _INSIDE, _TABLES = "Choices inside LLaVA-NeXT", "Inside the language model", "Tables"


def _option(text: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and exit status 1, Ctrl-C in 130."""
    try:
        app()
    except TokenselError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        from tokensel.utils.files import no_space

        _fail(no_space(error, error.filename or "output"))


def _fail(error: TokenselError) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(1)


@app.command()
def train(
    images: Annotated[str, _option("Folder, parquet file, or hub dataset as name[:config]:split.", _DATA)],
    encoder: Annotated[str, _option("Vision tower, or LLaVA that holds one: folder or hub id.", _DATA)],
    out: Annotated[str, _option("Folder for checkpoint, history, selector, reconstructor.", _DATA)],
    column: Annotated[str, _option("Dataset column that holds the picture.", _DATA)] = "image",
    streaming: Annotated[
        bool, _option("Read a hub dataset row by row, without fetching it first.", _DATA)
    ] = False,
    limit: Annotated[int | None, _option("Only the first so many pictures.", _DATA)] = None,
    tiles: Annotated[
        Literal["whole", "anyres"],
        _option("Each picture squashed to one tile, or cut as the LLaVA cuts it.", _DATA),
    ] = "whole",
    cache: Annotated[str, _option("Folder for features, to encode each picture only once.", _DATA)] = "",
    layers: Annotated[int, _option("Transformer layers of selector and reconstructor.", _MODEL)] = 3,
    heads: Annotated[int | None, _option("Attention heads; by default 64 channels each.", _MODEL)] = None,
    mlp_ratio: Annotated[float, _option("Inner width of the MLP over the width.", _MODEL)] = 4.0,
    p: Annotated[float, _option("Proportion of tokens below which keeping is free, Eq. (3).", _LOSS)] = 0.3,
    ps: Annotated[
        str,
        _option(
            "Several p, comma-separated: a training each, in <out>/p-<p>; --cache saves encoding anew.", _LOSS
        ),
    ] = "",
    tau_start: Annotated[float, _option("Gumbel-Softmax temperature at the first step.", _LOSS)] = 1.0,
    tau_end: Annotated[float, _option("Gumbel-Softmax temperature at the last step.", _LOSS)] = 0.5,
    steps: Annotated[int, _option("Optimiser steps.", _STEPS)] = 10_000,
    batch_size: Annotated[int, _option("Tiles a step, of all processes together.", _STEPS)] = 64,
    lr: Annotated[float, _option("Peak learning rate.", _STEPS)] = 3e-4,
    warmup: Annotated[
        float, _option("Share of the steps over which the learning rate rises.", _STEPS)
    ] = 0.05,
    weight_decay: Annotated[float, _option("Weight decay of AdamW.", _STEPS)] = 0.01,
    max_grad_norm: Annotated[float, _option("Longest gradient that is not clipped.", _STEPS)] = 1.0,
    statistics_tiles: Annotated[int, _option("Tiles from which mean and spread are measured.", _STEPS)] = 512,
    seed: Annotated[int, _option("Seed of weights, order and noise.", _RUN)] = 0,
    save_every: Annotated[int, _option("Steps between checkpoints.", _RUN)] = 500,
    log_every: Annotated[int, _option("Steps between lines of history.jsonl.", _RUN)] = 10,
    workers: Annotated[int, _option("Threads that decode pictures.", _RUN)] = 2,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], _option("auto: bf16 where the GPU has it.", _RUN)
    ] = "auto",
    device: Annotated[Literal["auto", "cpu"], _option("auto: a GPU if there is one.", _RUN)] = "auto",
    progress: Annotated[bool, _option("Show a progress bar on stderr.", _RUN)] = True,
) -> None:
    """Train a selector and its reconstructor on the features of a frozen encoder (Secs. 3-4 of the paper).

    Run it again with the same options to go on after an interruption. Several processes:
    `accelerate launch -m tokensel train ...`
    """
    values = {key: value for key, value in locals().items() if key != "ps"}
    from tokensel.training.config import TrainConfig

    several = [{"p": each, "out": f"{out}/p-{each:g}"} for each in _list("ps", ps, float)]
    # before the heavy import: bad values are told at once
    configs = [TrainConfig.from_dict(values | each) for each in several or [{}]]
    from tokensel.training.train import train as run

    _quiet()
    for config in configs:
        run(config)
        typer.echo(f"selector: {config.out}/selector\nreconstructor: {config.out}/reconstructor")


@app.command()
def dyrate(
    model: Annotated[str, _option("LLaVA-NeXT, which stays as it is: folder or hub id.", _DATA)],
    suite: Annotated[str, _option("Module with a table BENCHMARKS, by its dotted name.", _DATA)],
    out: Annotated[str, _option("Folder for checkpoint, history and predictor.", _DATA)],
    benchmarks: Annotated[
        str, _option("Benchmarks of the suite, comma-separated; all by default.", _DATA)
    ] = "",
    split: Annotated[str, _option("Split of every benchmark.", _DATA)] = "train",
    n: Annotated[int, _option("Questions a benchmark, from the front of the split.", _DATA)] = 200,
    layer: Annotated[int, _option("First layer that is shortened.", _MODEL)] = 2,
    rates: Annotated[int, _option("How many rates there are to pick from.", _MODEL)] = 10,
    weight: Annotated[
        float, _option("Weight of the visual tokens kept against the cross entropy.", _LOSS)
    ] = 1.0,
    tau_start: Annotated[float, _option("Gumbel-Softmax temperature at the first step.", _LOSS)] = 1.0,
    tau_end: Annotated[float, _option("Gumbel-Softmax temperature at the last step.", _LOSS)] = 0.5,
    steps: Annotated[int, _option("Optimiser steps.", _STEPS)] = 100,
    batch_size: Annotated[int, _option("Questions a step.", _STEPS)] = 8,
    lr: Annotated[float, _option("Peak learning rate.", _STEPS)] = 0.1,
    warmup: Annotated[
        float, _option("Share of the steps over which the learning rate rises.", _STEPS)
    ] = 0.05,
    weight_decay: Annotated[float, _option("Weight decay of AdamW.", _STEPS)] = 0.0,
    max_grad_norm: Annotated[float, _option("Gradients longer than this are cut to it.", _STEPS)] = 1.0,
    seed: Annotated[int, _option("Of the questions drawn and the Gumbel noise.", _RUN)] = 0,
    save_every: Annotated[int, _option("Steps between checkpoints.", _RUN)] = 25,
    device: Annotated[str, _option("cpu, cuda, cuda:1 ...; auto: a GPU if there is one.", _RUN)] = "auto",
    progress: Annotated[bool, _option("Show a progress bar on stderr.", _RUN)] = True,
) -> None:
    """Train the rate predictor of DyRate on a frozen LLaVA-NeXT.

    Run it again with the same options to go on after an interruption.
    """
    values = locals()
    from tokensel.training.dyrate import DyRateConfig, train_dyrate

    _quiet()
    train_dyrate(DyRateConfig.from_dict(values | {"benchmarks": _list("benchmarks", benchmarks, str)}))
    typer.echo(f"predictor: {out}/dyrate")


@app.command()
def evaluate(
    model: Annotated[str, _option("LLaVA-NeXT or LLaVA-OneVision: folder or hub id.", _MODEL)],
    suite: Annotated[
        str, _option("Module with a table BENCHMARKS; the paper's ten are tokensel.benchmarks.paper.", _DATA)
    ],
    selector: Annotated[str | None, _option("Trained selector: folder or hub id.", _MODEL)] = None,
    dyrate: Annotated[
        str | None, _option("Trained rate predictor of DyRate: folder or hub id.", _MODEL)
    ] = None,
    device: Annotated[str, _option("cpu, cuda, cuda:1 ...; auto: a GPU if there is one.", _MODEL)] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _option("auto: float32 on a CPU, the checkpoint's own on a GPU.", _MODEL),
    ] = "auto",
    data: Annotated[
        str | None,
        _option("Folder with a folder of parquet files for each benchmark, instead of the hub.", _DATA),
    ] = None,
    benchmarks: Annotated[
        str, _option("Benchmarks of the suite, comma-separated; all by default.", _DATA)
    ] = "",
    split: Annotated[
        str, _option("Split of every benchmark; test is the one that is scored.", _DATA)
    ] = "test",
    n: Annotated[int, _option("Questions a benchmark, from the front of the split.", _DATA)] = 400,
    whole: Annotated[
        bool, _option("Every question of the split, whatever --n says.", _DATA, "--all")
    ] = False,
    methods: Annotated[
        str,
        _option(
            "Comma-separated: full, none, selector, random, uniform, norm, cls, diversity, downsample, native; inside the "
            "language model fastv, vtw, dyrate, fixed, exponential; both in turn, as selector+fastv.",
            _RUN,
        ),
    ] = "full,none,random,selector",
    keeps: Annotated[
        str,
        _option(
            "Fractions of the visual tokens to keep, comma-separated; by default 0.1 to 0.9, OneVision to 0.6.",
            _RUN,
        ),
    ] = "",
    seed: Annotated[int, _option("Seed of random selection and of the bootstrap.", _RUN)] = 0,
    seeds: Annotated[
        str, _option("Several seeds of random selection, comma-separated, a row each.", _RUN)
    ] = "",
    batch_size: Annotated[int, _option("Questions at a time; changes speed only.", _RUN)] = 32,
    shard: Annotated[
        str, _option("Part i of n of the sweep, as i/n, for several jobs or machines.", _RUN)
    ] = "1/1",
    progress: Annotated[bool, _option("Show a progress bar on stderr.", _RUN)] = True,
    inside: Annotated[
        float, _option("What a schedule keeps of the tokens chosen before, as in selector+fastv.", _INSIDE)
    ] = 0.5,
    layer: Annotated[int, _option("First layer that fastv, fixed and exponential shorten.", _INSIDE)] = 2,
    vtw_layer: Annotated[
        int | None,
        _option("First layer without visual tokens under vtw; half of the layers by default.", _INSIDE),
    ] = None,
    budget: Annotated[Literal["image", "tile"], _option("What the kept fraction is of.", _SEAM)] = "image",
    thumbnail: Annotated[
        Literal["compete", "keep", "last", "drop"],
        _option("Its tokens compete, come first, come last, or are dropped.", _SEAM),
    ] = "last",
    newline: Annotated[
        Literal["keep", "drop", "row"],
        _option("Newline tokens: all, none, or with a token of their row.", _SEAM),
    ] = "keep",
    positions: Annotated[
        Literal["compact", "original"], _option("Number kept tokens anew, or leave their places.", _SEAM)
    ] = "original",
    compare: Annotated[
        str,
        _option("Paired differences as method:against or fastv@0.3:random@0.3, comma-separated.", _TABLES),
    ] = "selector:random",
    out: Annotated[str, _option("Folder of the tables, records below it.", _TABLES)] = "_build/results",
    name: Annotated[str, _option("File name of the tables, without ending.", _TABLES)] = "evaluate",
) -> None:
    """Ask a LLaVA every question under every method and budget; write a long table with intervals.

    Run it again with the same options to go on after an interruption: what is answered is not asked again.
    Several processes: `accelerate launch -m tokensel evaluate ...`; several machines that share --out: --shard.
    """
    values = {key: value for key, value in locals().items() if key not in ("whole", "progress")}
    from tokensel.benchmarks.config import EvalConfig

    kinds = {"benchmarks": str, "methods": str, "keeps": float, "seeds": int, "compare": str}
    values |= {key: _list(key, values[key], kind) for key, kind in kinds.items()}
    _quiet()
    config = EvalConfig.from_dict(values | {"n": None if whole else n})
    from tokensel.benchmarks.runner import evaluate as run

    done = run(config, progress)
    typer.echo(f"{done.computed} answers asked")
    if done.left:
        typer.echo(f"{done.left} answers are left to the other parts; the last part to end writes the tables")
        return
    for path in (done.table, done.differences, done.categories, done.provenance):
        if path:
            typer.echo(path)


@app.command()
def cost(
    model: Annotated[
        str,
        _option(
            "LLaVA-NeXT: folder or hub id; or llava-next-0.5b, llava-next-7b: true size, random weights.",
            _MODEL,
        ),
    ],
    random_weights: Annotated[
        bool,
        _option("Take only the configuration of the model; speed does not depend on its weights.", _MODEL),
    ] = False,
    selector: Annotated[
        str | None, _option("Trained selector: folder or hub id; by default random weights.", _MODEL)
    ] = None,
    selector_layers: Annotated[
        int, _option("Transformer layers of a selector at random weights.", _MODEL)
    ] = 3,
    methods: Annotated[
        str,
        _option(
            "Comma-separated, beside the stock model: selector, random, uniform, norm, cls, diversity, downsample, none, "
            "fastv, vtw.",
            _RUN,
        ),
    ] = "selector",
    keeps: Annotated[
        str, _option("Fractions of the visual tokens to keep, comma-separated.", _RUN)
    ] = "0.5,0.3,0.1",
    batch_sizes: Annotated[str, _option("Questions at a time, comma-separated.", _DATA)] = "1",
    images: Annotated[str, _option("Sizes of pictures as HEIGHTxWIDTH, comma-separated.", _DATA)] = "480x640",
    text: Annotated[int, _option("Tokens of the prompt besides the picture.", _DATA)] = 60,
    new_tokens: Annotated[int, _option("Tokens of an answer.", _DATA)] = 9,
    repetitions: Annotated[int, _option("Rounds of all conditions; 10 at least.", _RUN)] = 10,
    warmup: Annotated[int, _option("Rounds before those that count.", _RUN)] = 1,
    schedule_layer: Annotated[int, _option("Layer at whose entrance fastv or vtw drops.", _RUN)] = 2,
    device: Annotated[str, _option("cpu, cuda, cuda:1 ...; auto: a GPU if there is one.", _MODEL)] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _option("auto: float32 on a CPU, 16 bits on a GPU.", _MODEL),
    ] = "auto",
    attn: Annotated[str, _option("Attention of transformers: sdpa, flash_attention_2 ...", _MODEL)] = "sdpa",
    threads: Annotated[int, _option("Threads of the CPU; 0 leaves them as they are.", _RUN)] = 0,
    seed: Annotated[int, _option("Seed of weights, pictures and random selection.", _RUN)] = 0,
    training: Annotated[
        bool, _option("Measure training a selector for the model's tower, not answering.", _RUN)
    ] = False,
    progress: Annotated[bool, _option("Show a progress bar on stderr.", _RUN)] = True,
    out: Annotated[str, _option("Folder of the results.", _TABLES)] = "_build/results",
    name: Annotated[str, _option("File name of the results, without ending.", _TABLES)] = "cost",
) -> None:
    """Measure time to the first token, time per further token and memory, as ratios to the stock model and to the ideal.

    Run it again with the same options to go on after an interruption: rounds that are done are not run again.
    """
    values = {key: value for key, value in locals().items() if key not in ("training", "progress")}
    from tokensel.profiling.config import CostConfig

    kinds = {"methods": str, "keeps": float, "batch_sizes": int, "images": str}
    values |= {key: _list(key, values[key], kind) for key, kind in kinds.items()}
    _quiet()
    config = CostConfig(**values)
    if training:
        from tokensel.profiling.training import lines, measure
    else:
        from tokensel.profiling.measure import lines, measure
    path = measure(config, progress)
    typer.echo("\n".join([*lines(json.loads(path.read_text(encoding="utf-8"))), str(path)]))


def _list(option: str, text: str, kind: Callable[[str], Any]) -> tuple:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise TokenselError(f"{option} is {text!r}: give numbers with commas between") from None


def _quiet() -> None:
    """Leave stderr to our own bar and lines."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars()  # a download of gigabytes should still show


# every word behind the command, --help too, goes to the application mounted there
_FORWARD = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_Words = Annotated[list[str] | None, typer.Argument(hidden=True)]


@app.command(context_settings=_FORWARD, add_help_option=False)
def mini(words: _Words = None) -> None:
    """The small world that ships with the book: draw its pictures, train its models."""
    _forward("mini", words)


@app.command(context_settings=_FORWARD, add_help_option=False)
def book(words: _Words = None) -> None:
    """Run the chapters and build the book."""
    _forward("book", words)


def _forward(name: str, words: list[str] | None) -> None:
    # the library knows nothing of the book: whoever is installed beside it says what stands behind the word
    (entry,) = entry_points(group="tokensel.commands", name=name)
    inner: typer.Typer = entry.load()
    # get_group leaves out the options for shell completion, which only the outermost command could serve
    get_group(inner)(args=words or [], prog_name=f"python -m tokensel {name}")
