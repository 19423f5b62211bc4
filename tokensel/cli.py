"""``python -m tokensel``: train, train-answers, dyrate, finetune, evaluate, cost, serve, doctor, mini, book.

The options of a command are the fields of its configuration. Heavy packages are imported when a command runs.
"""

import errno
import inspect
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.main import get_group

from tokensel.benchmarks import config as evaluation
from tokensel.benchmarks.config import EvalConfig
from tokensel.profiling import config as profiling
from tokensel.profiling.config import DATA, MODEL, RUNNING, CostConfig
from tokensel.serving.config import ServeConfig
from tokensel.training.config import OBJECTIVE, AnswersConfig, DyRateConfig, TrainConfig
from tokensel.training.finetune_config import FinetuneConfig
from tokensel.utils.errors import TokenselError
from tokensel.utils.options import Field, fields_of, revision_option

app = typer.Typer(
    name="tokensel",
    help="Keep the visual tokens from which the others can be reconstructed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


_Progress = Annotated[bool, _option("Show a progress bar on stderr.", evaluation.RUNNING)]


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


def _command(
    config: type, *required: str, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command whose options are the fields of ``config`` and its own parameters.

    The function is called with a dictionary of the fields' values, then with its own parameters.

    Args:
        config: a configuration, see :mod:`tokensel.utils.options`.
        required: fields that the command line must name although they have a default.
        settings: of click's context, for a command that reads it.
    """
    fields = fields_of(config)

    def register(run: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            values = {field.name: _value(field, given.pop(field.name)) for field in fields}
            run(values, **given)

        own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(inspect.signature(run).parameters.values())[1:]]
        parameters = [_parameter(field, field.required or field.name in required) for field in fields] + own
        # typer reads names, types and defaults from here
        command.__signature__ = inspect.Signature(parameters)
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return app.command(context_settings=settings)(command)

    return register


def _parameter(field: Field, required: bool) -> inspect.Parameter:
    """The field as typer takes it: a list as text with commas between its entries."""
    kind = str if field.many else field.kind | None if field.default is None else field.kind
    default: Any = field.default
    if field.many and not field.required:
        default = ",".join(map(str, default))
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind, _option(field.option.help, field.option.panel)],
    )


def _value(field: Field, given: Any) -> Any:
    return _list(field.name, given, field.kind) if field.many else given


def _list(option: str, text: str, kind: Callable[[str], Any]) -> tuple:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise TokenselError(f"{option} is {text!r}: give numbers with commas between") from None


@_command(TrainConfig, "images", "encoder", "out")
def train(
    values: dict[str, Any],
    ps: Annotated[
        str,
        _option(
            "Several p, comma-separated: a selector each, in <out>/p-<p>; --cache encodes images once.",
            OBJECTIVE,
        ),
    ] = "",
) -> None:
    """Train a selector and its reconstructor on the features of a frozen encoder (Secs. 3-4 of the paper).

    Run it again with the same options to go on after an interruption. Several processes:
    `accelerate launch -m tokensel train ...`
    """
    several = [{"p": p, "out": f"{values['out']}/p-{p:g}"} for p in _list("ps", ps, float)]
    # before the heavy import: bad values are reported at once
    configs = [TrainConfig.from_dict(values | changed) for changed in several or [{}]]
    from tokensel.training.train import train as run

    _quiet()
    for config in configs:
        run(config)
        typer.echo(f"selector: {config.out}/selector\nreconstructor: {config.out}/reconstructor")


@_command(DyRateConfig, "out")
def dyrate(values: dict[str, Any]) -> None:
    """Train the rate predictor of DyRate on a frozen vision-language model.

    Run it again with the same options to go on after an interruption.
    """
    config = DyRateConfig.from_dict(values)
    from tokensel.training.dyrate import train_dyrate

    _quiet()
    train_dyrate(config)
    typer.echo(f"predictor: {config.out}/dyrate")


@_command(AnswersConfig, "out")
def train_answers(values: dict[str, Any]) -> None:
    """Train DiffPrune or VisionSelector by the answers of a frozen LLaVA-NeXT or LLaVA-OneVision.

    Run it again with the same options to go on after an interruption.
    """
    config = AnswersConfig.from_dict(values)
    from tokensel.training.answers import train_answers as run

    _quiet()
    run(config)
    typer.echo(f"{config.scorer}: {config.out}/{config.scorer}")


@_command(FinetuneConfig, "out")
def finetune(values: dict[str, Any]) -> None:
    """Fine-tune the language model of a vision-language model with dropped visual tokens in sight.

    Run it again with the same options to go on after an interruption.
    """
    config = FinetuneConfig.from_dict(values)
    from tokensel.training.finetune import finetune as run

    _quiet()
    run(config)
    adapter = "" if config.lora is None else f"\nadapter: {config.out}/adapter"
    typer.echo(f"model: {config.out}/model{adapter}")


@_command(EvalConfig)
def evaluate(
    values: dict[str, Any],
    whole: Annotated[
        bool, _option("Every question of the split, whatever --n says.", evaluation.DATA, "--all")
    ] = False,
    progress: _Progress = True,
) -> None:
    """Ask a model every question under every method and budget; write a long table with intervals.

    Run it again with the same options to go on after an interruption: what is answered is not asked again.
    Several processes: `accelerate launch -m tokensel evaluate ...`; several machines, one --out: --shard.
    """
    config = EvalConfig.from_dict(values | ({"n": None} if whole else {}))
    from tokensel.benchmarks.runner import evaluate as run

    _quiet()
    done = run(config, progress)
    typer.echo(f"{done.computed} answers asked")
    if done.left:
        typer.echo(f"{done.left} answers are left to the other parts; the last part to end writes the tables")
        return
    for path in (done.table, done.differences, done.categories, done.provenance):
        if path:
            typer.echo(path)


@_command(CostConfig)
def cost(
    values: dict[str, Any],
    training: Annotated[
        bool, _option("Measure training a selector for the model's tower, not answering.", evaluation.RUNNING)
    ] = False,
    serving: Annotated[
        bool, _option("Measure running servers, as their users do.", profiling.SERVING)
    ] = False,
    progress: _Progress = True,
) -> None:
    """Measure time to the first token, time per further token and memory, relative to the stock model.

    Run it again with the same options to go on after an interruption: rounds that are done are not run again.
    """
    config = CostConfig(**values)
    if training and serving:
        raise TokenselError("training and serving are measured one at a time: leave one out")
    if config.server and not serving:
        raise TokenselError("server is asked only with --serving: give that, too")
    if serving:
        from tokensel.profiling.served import measure_served as measure
        from tokensel.profiling.served import served_lines as lines
    elif training:
        from tokensel.profiling.training import measure_training as measure
        from tokensel.profiling.training import training_lines as lines
    else:
        from tokensel.profiling.inference import inference_lines as lines
        from tokensel.profiling.inference import measure_inference as measure
    _quiet()
    path = measure(config, progress)
    typer.echo("\n".join([*lines(json.loads(path.read_text(encoding="utf-8"))), str(path)]))


@_command(ServeConfig, ignore_unknown_options=True)
def serve(
    values: dict[str, Any],
    engine: Annotated[
        list[str] | None,
        typer.Argument(help="Options of vLLM's server, such as --port 8000; after --, all words are its."),
    ] = None,
) -> None:
    """Start vLLM's OpenAI-compatible server for a model, with fewer visual tokens of every image.

    Options that are not listed here are passed on to vLLM. With its `--trust-request-mm-kwargs` a request may
    name a keep of its own: `"mm_processor_kwargs": {"keep": 0.3}`.
    """
    config = ServeConfig(**values)
    from tokensel.serving.launch import serve as run

    _quiet()
    run(config, engine or [])


@app.command()
def doctor(
    model: Annotated[str, _option("Vision-language model: folder or Hub id.", MODEL)],
    image: Annotated[
        str | None, _option("Image file to try the methods on; by default a drawn one.", DATA)
    ] = None,
    keep: Annotated[float, _option("Fraction of the visual tokens to keep.", RUNNING)] = 0.3,
    device: Annotated[str | None, _option("Device; by default a GPU if there is one.", RUNNING)] = None,
    attn: Annotated[str | None, _option("Attention implementation of transformers.", RUNNING)] = None,
    revision: Annotated[str | None, _option(revision_option(MODEL).help, MODEL)] = None,
) -> None:
    """Print what would happen to an image in a model: its tokens, and which methods fit."""
    from tokensel.doctor import examine
    from tokensel.vlm import load_vlm

    _quiet()
    for line in examine(load_vlm(model, device, attn=attn, revision=revision), image, keep):
        typer.echo(line)


def _quiet() -> None:
    """Leave stderr to our own progress bar and messages."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars()  # a download of gigabytes should still show


# every word after the command, --help too, goes to the application mounted there
_FORWARD = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_Words = Annotated[list[str] | None, typer.Argument(hidden=True)]


@app.command(context_settings=_FORWARD, add_help_option=False)
def mini(words: _Words = None) -> None:
    """The small world that ships with the book: draw its images, train its models."""
    _forward("mini", words)


@app.command(context_settings=_FORWARD, add_help_option=False)
def book(words: _Words = None) -> None:
    """Run the chapters and build the book."""
    _forward("book", words)


def _forward(name: str, words: list[str] | None) -> None:
    # the library does not import the book: the package's entry points say which application has this name
    (entry,) = entry_points(group="tokensel.commands", name=name)
    inner: typer.Typer = entry.load()
    # get_group leaves out the options for shell completion, which only the outermost command could serve
    get_group(inner)(args=words or [], prog_name=f"python -m tokensel {name}")
