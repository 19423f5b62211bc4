"""``python -m tokensel mini``: draw the small world, train the small model."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The small world and the small LLaVA-NeXT that ships with the book.", no_args_is_help=True)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint, the history and the finished model/")] = Path(
        "_build/mini"
    ),
    seed: Annotated[int, typer.Option(help="seed of weights, pictures and order")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="steps between checkpoints")] = 100,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="arithmetic; by default bfloat16 where the processor has it")
    ] = None,
) -> None:
    """Train the small model from nothing; the same command again goes on where a killed run stopped."""
    from tokensel.mini.recipe import Recipe
    from tokensel.mini.recipe import train as run

    typer.echo(f"finished: {run(out, Recipe(seed=seed), save_every, bf16)}")


@app.command()
def draw(
    task: Annotated[str, typer.Argument(help="forms, charts, posters, scene_text, attributes, science, ...")],
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    index: Annotated[int, typer.Option(min=0, help="which page")] = 0,
    out: Annotated[Path | None, typer.Option(help="file for the picture; by default <task>-<split>-<index>.png")] = None,
) -> None:
    """Draw one page of the small world and print its questions with their answers."""
    from tokensel.mini.world import draw as page_of

    page = page_of(task, split, index)
    path = out or Path(f"{task}-{split}-{index}.png")
    page.image.save(path)
    typer.echo(f"{path}: {page.image.width}x{page.image.height} pixels")
    for qa in page.questions:
        typer.echo(f"  {qa.question}  ->  {qa.answers[0]}")
