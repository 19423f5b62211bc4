"""``python -m tokensel mini``: draw the small world, train the small model."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The small world and the small models that ship with the book.", no_args_is_help=True)


@app.command()
def train(
    out: Annotated[
        Path, typer.Option(help="folder for the checkpoint, the history and the finished model/")
    ] = Path("_build/mini"),
    seed: Annotated[int, typer.Option(help="seed of weights, images and order")] = 0,
    times: Annotated[float, typer.Option(min=0.01, help="multiply the number of steps")] = 1.0,
    batch: Annotated[float, typer.Option(min=0.1, help="multiply the number of pages per step")] = 1.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes that share each batch; by default 2 on a CPU, 1 on a GPU"),
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="steps between checkpoints")] = 100,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--fp32", help="precision; by default bfloat16 where the processor supports it"),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="finished model to continue from, such as data/mini/llava-next; by default none"),
    ] = None,
    kind: Annotated[str, typer.Option(help="llava-next or llava-onevision")] = "llava-next",
    recipe: Annotated[
        Path | None, typer.Option(help="recipe.json of a small model to train by; then without --seed")
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="store the model in bfloat16, but for its tower")
    ] = False,
) -> None:
    """Train the small model; after a kill, the same command resumes."""
    from tokensel.book.mini.recipe import Recipe
    from tokensel.book.mini.train import train_mini

    steps = (Recipe.load(recipe) if recipe else Recipe(seed=seed)).scaled(times, batch)
    options = {"start": start, "kind": kind, "half": half}
    typer.echo(f"finished: {train_mini(out, steps, save_every, device, workers, bf16, **options)}")


@app.command()
def selectors(
    studies: Annotated[list[str], typer.Argument(help="metrics, gates, budgets, length")],
    table: Annotated[Path, typer.Option(help="CSV file to write; its provenance beside it")],
    out: Annotated[Path, typer.Option(help="folder for pages, features, trainings and answers")] = Path(
        "_build/selectors"
    ),
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 100,
    split: Annotated[str, typer.Option(help="validation or test")] = "validation",
    towers: Annotated[str, typer.Option(help="comma-separated")] = "clip,siglip,outliers,unlabelled",
    unlabelled: Annotated[
        Path | None, typer.Option(help="model whose tower has learned without labels; without it, none")
    ] = None,
) -> None:
    """Train selectors in many ways, judge them alike and write the table; after a kill, it resumes."""
    from tokensel.book.mini.selectors import record

    record(studies, out, table, n, split, [tower.strip() for tower in towers.split(",")], unlabelled)
    typer.echo(f"finished: {table}")


@app.command("imitate")
def imitate_model(
    start: Annotated[
        Path, typer.Option(help="model whose tower learns, such as one of `mini train --recipe`")
    ],
    out: Annotated[Path, typer.Option(help="folder for the checkpoint and the finished model/")],
    teacher: Annotated[Path, typer.Option(help="finished model whose language model is kept")] = Path(
        "data/mini/llava-next"
    ),
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 9000,
    seed: Annotated[int, typer.Option(help="seed of the pages")] = 0,
) -> None:
    """Teach a tower, without labels, to give what a model's projector gives; after a kill, it resumes."""
    from tokensel.book.mini.imitate import imitate

    typer.echo(f"finished: {imitate(start, teacher, out, steps, seed=seed)}")


@app.command("counts")
def counts(
    table: Annotated[Path, typer.Option(help="CSV file to write; its provenance beside it")],
    out: Annotated[Path, typer.Option(help="folder of `mini selectors`; what it lacks is made")] = Path(
        "_build/selectors"
    ),
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 400,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
) -> None:
    """Compare a count for each image with an equal share of every image; after a kill, it resumes."""
    from tokensel.book.mini.selectors import record_counts

    record_counts(out, table, n, split)
    typer.echo(f"finished: {table}")


@app.command("counting")
def counting(
    table: Annotated[Path, typer.Option(help="CSV file to write; its provenance beside it")],
    model: Annotated[Path, typer.Option(help="the small model")] = Path("data/mini/llava-next"),
    selector: Annotated[Path, typer.Option(help="a selector for it")] = Path("data/mini/selector"),
    n: Annotated[int, typer.Option(min=1, help="questions")] = 400,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
) -> None:
    """Measure whether a model counts too many or too few when parts of the image are gone."""
    from tokensel.book.mini.counting import record_counting

    typer.echo(f"finished: {record_counting(model, selector, table, n, split)}")


@app.command("together")
def together(
    models: Annotated[
        list[str],
        typer.Argument(help="name=folder of each model; the others are compared with the first"),
    ],
    table: Annotated[Path, typer.Option(help="CSV file to write; its provenance beside it")],
    selector: Annotated[Path, typer.Option(help="a selector for them")] = Path("data/mini/selector"),
    out: Annotated[Path, typer.Option(help="folder for the answers")] = Path("_build/together/answers"),
    methods: Annotated[str, typer.Option(help="comma-separated")] = "full,selector",
    keeps: Annotated[str, typer.Option(help="comma-separated")] = ".1,.3,.5",
    neighbours: Annotated[
        int, typer.Option(min=0, help="cells to each side in its row that each token brings along")
    ] = 0,
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 400,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
    controls: Annotated[
        str, typer.Option(help="comma-separated model=control, both among the names of the models")
    ] = "",
) -> None:
    """Compare fine-tuned models with what they come from, question by question; after a kill, it resumes."""
    from tokensel.book.mini.together import parse_models, record_together, together_config

    asked = together_config(
        "", selector, out, [float(keep) for keep in keeps.split(",")], n, split=split,
        methods=tuple(methods.split(",")), neighbours=neighbours,
    )  # fmt: skip
    pairs = parse_models(controls.split(",")) if controls else {}
    typer.echo(f"finished: {record_together(parse_models(models), table, asked, controls=pairs)}")


@app.command("interpolation")
def interpolation(
    table: Annotated[Path, typer.Option(help="CSV file to write; its provenance beside it")],
    model: Annotated[Path, typer.Option(help="the small OneVision")] = Path("data/mini/llava-onevision"),
    selector: Annotated[Path, typer.Option(help="a selector for it")] = Path("data/mini/selector-onevision"),
    keep: Annotated[float, typer.Option(help="fraction of the visual tokens that is left")] = 0.25,
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 400,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
    neighbours: Annotated[
        int, typer.Option(min=0, help="cells to each side in its row that each token brings along")
    ] = 0,
) -> None:
    """Compare interpolation, selection and both together at one number of tokens."""
    from tokensel.book.mini.interpolation import record_interpolation

    written = record_interpolation(model, selector, table, keep, n, split, neighbours)
    typer.echo(f"finished: {written}")


@app.command("mechanism")
def mechanism(
    table: Annotated[Path, typer.Option(help="CSV file to write; the probes and the provenance beside it")],
    model: Annotated[Path, typer.Option(help="the small model")] = Path("data/mini/llava-next"),
    selector: Annotated[Path, typer.Option(help="a selector for it")] = Path("data/mini/selector"),
    out: Annotated[Path, typer.Option(help="folder of what is done already")] = Path("_build/mechanism"),
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 200,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
) -> None:
    """Measure what reading misses in shortened prompts, one change at a time; after a kill, it resumes."""
    from tokensel.book.mini.mechanism import record_mechanism

    typer.echo(f"finished: {record_mechanism(model, selector, table, out, n, split)}")


@app.command("field")
def field(
    table: Annotated[
        Path, typer.Option(help="CSV file to write; four more tables and the provenance beside it")
    ],
    out: Annotated[Path, typer.Option(help="folder for the answers")] = Path("_build/field"),
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 400,
    methods: Annotated[
        str | None, typer.Option(help="comma-separated; by default all whose trained parts are given")
    ] = None,
    selector: Annotated[str, typer.Option(help="folder of the selector")] = "data/mini/selector",
    dyrate: Annotated[str, typer.Option(help="folder of DyRate's predictor")] = "data/mini/dyrate",
    diffprune: Annotated[str | None, typer.Option(help="folder of a trained DiffPrune")] = None,
    visionselector: Annotated[str | None, typer.Option(help="folder of a trained VisionSelector")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions at a time")] = 40,
    shard: Annotated[str, typer.Option(help="part i of n, as i/n, for several processes")] = "1/1",
) -> None:
    """Record every method with the controls that critics ask for; after a kill, it resumes."""
    from tokensel.book.mini.field import field_config, record_field

    parts = {"selector": selector, "dyrate": dyrate, "diffprune": diffprune, "visionselector": visionselector}
    chosen = () if methods is None else tuple(name.strip() for name in methods.split(","))
    config = field_config(out, n, parts, methods=chosen, batch_size=batch_size, shard=shard)
    written = record_field(config, table)
    typer.echo("answers are left to other shards" if written is None else f"finished: {written}")


@app.command("equal-cost")
def equal_cost(
    table: Annotated[
        Path, typer.Option(help="CSV file to write; a table of the predictors and the provenance beside it")
    ],
    dyrate: Annotated[list[str], typer.Option(help="folder of a predictor of DyRate; several times")],
    out: Annotated[Path, typer.Option(help="folder for the answers")] = Path("_build/equal_cost"),
    model: Annotated[str, typer.Option(help="the language model that the predictors are for")] = (
        "data/mini/llava-next"
    ),
    suite: Annotated[str, typer.Option(help="module with the benchmarks")] = "tokensel.book.mini.long",
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 200,
    least: Annotated[float, typer.Option(help="the smallest fraction that a rival keeps")] = 0.1,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
    rivals: Annotated[
        str, typer.Option(help="comma-separated: fastv, fixed, exponential, vtw")
    ] = "fastv,fixed,exponential,vtw",
    batch_size: Annotated[int, typer.Option(min=1, help="questions at a time")] = 40,
) -> None:
    """Record DyRate against schedules that cost the same; after a kill, it resumes."""
    from tokensel.benchmarks.config import EvalConfig
    from tokensel.book.mini.equal_cost import record_equal_cost

    values = {"model": model, "suite": suite, "n": n, "keeps": (least,), "split": split, "out": str(out)}
    values |= {"methods": ("full",), "compare": (), "thumbnail": "last", "batch_size": batch_size}
    config = EvalConfig.from_dict(values | {"name": "equal_cost"})
    typer.echo(f"finished: {record_equal_cost(config, dyrate, table, rivals.split(','))}")


@app.command("evidence")
def record_evidence_table(
    table: Annotated[Path, typer.Option(help="CSV file to write; its provenance beside it")],
    out: Annotated[Path, typer.Option(help="folder for the answers")] = Path("_build/evidence"),
    model: Annotated[Path, typer.Option(help="a small model that was taught the large tasks")] = Path(
        "data/mini/llava-next-large"
    ),
    selector: Annotated[Path, typer.Option(help="a selector for its tower")] = Path("data/mini/selector"),
    n: Annotated[int, typer.Option(min=1, help="questions a task")] = 400,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
    methods: Annotated[str, typer.Option(help="what ranks the tokens")] = "random,uniform,selector",
    keeps: Annotated[str, typer.Option(help="fractions of the visual tokens kept")] = ".1,.2,.3,.5,.7",
    shard: Annotated[str, typer.Option(help="part i of n, as i/n, for several processes")] = "1/1",
) -> None:
    """Record how often answers are right, by evidence and by what is kept of it; after a kill, it resumes."""
    from tokensel.book.mini.evidence_table import evidence_config, record_evidence

    asked = ("full", "none", *methods.split(","))
    budgets = tuple(map(float, keeps.split(",")))
    config = evidence_config(out, model, selector, n, split, methods=asked, keeps=budgets, shard=shard)
    written = record_evidence(config, table)
    typer.echo("answers are left to other shards" if written is None else f"finished: {written}")


@app.command("draw")
def draw_pages(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="forms, charts, posters, scene_text, attributes, ...; by default all"),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    index: Annotated[int, typer.Option(min=0, help="the first page")] = 0,
    count: Annotated[int, typer.Option(min=1, help="pages of each task")] = 1,
    out: Annotated[Path, typer.Option(help="folder for <task>-<split>-<index>.png")] = Path(
        "_build/mini/pages"
    ),
) -> None:
    """Draw pages of the small world into a folder; of a single page, print its questions and answers too."""
    from tokensel.book.mini.world import DRAW, draw_page

    chosen = tasks or list(DRAW)
    for task in chosen:
        for number in range(index, index + count):
            page = draw_page(task, split, number)
            path = page.save(out / f"{task}-{split}-{number}.png")
            if len(chosen) * count == 1:
                typer.echo(f"{path}: {page.image.width}x{page.image.height} pixels")
                for qa in page.questions:
                    typer.echo(f"  {qa.question}  ->  {qa.answers[0]}")
    if len(chosen) * count > 1:
        typer.echo(f"{out}: {len(chosen) * count} pages")
