"""The `book` command: list, run and build. Heavy imports wait until a command needs them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Run the chapters and build the book from them.")

Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter", "-p", metavar="NAME=VALUE", help="Override a parameter, such as -p keep=0.3."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Run chapters that are up to date, too.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Chapters at a time, which share the cores. By default two, or one on a machine with a GPU.",
    ),
]
Chapters = Annotated[
    list[str] | None, typer.Argument(help="Names such as 03 or 03_selector; by default all.")
]


@app.command("list")
def list_command() -> None:
    """List the chapters, their state and their parameters."""
    from tokensel.book.site import run
    from tokensel.book.site.chapter import find_root

    root = find_root()
    for path in run.chapter_paths(root):
        state = "up to date" if run.is_current(root, path, {}) else "to run"
        typer.echo(f"{path.stem}  ({state})")
        for name, about in run.parameters_of(path).items():
            typer.echo(f"    {name} = {about['default']}" + (f"   {about['help']}" if about["help"] else ""))


@app.command("run")
def run_command(
    chapters: Chapters = None, parameter: Parameters = None, force: Force = False, jobs: Jobs = None
) -> None:
    """Run the chapters that are not up to date; results go to _build/chapters and _build/results."""
    from tokensel.book.site import run
    from tokensel.book.site.chapter import find_root
    from tokensel.book.site.parameters import parse_parameters

    given, jobs = parse_parameters(parameter or []), jobs or run.default_jobs()
    run.run_chapters(find_root(), chapters or [], given, force=force, jobs=jobs, here=Path.cwd())


@app.command("build")
def build_command(parameter: Parameters = None, force: Force = False, jobs: Jobs = None) -> None:
    """Run the chapters that are not up to date, then build the pages in _build/html."""
    from tokensel.book.site import build as site
    from tokensel.book.site import run
    from tokensel.book.site.chapter import find_root
    from tokensel.book.site.parameters import parse_parameters

    root = find_root()
    given, jobs = parse_parameters(parameter or []), jobs or run.default_jobs()
    run.run_chapters(root, [], given, force=force, jobs=jobs, here=Path.cwd())
    index: Path = site.build(root)
    typer.echo(f"the book: {index}")


@app.command("links")
def links_command() -> None:
    """Check every link that leaves the book; needs a network and executed chapters."""
    from tokensel.book.site import build as site
    from tokensel.book.site.chapter import find_root

    typer.echo(f"{site.check_links(find_root())} addresses answer")


@app.command("readme")
def readme_command(
    results: Annotated[Path, typer.Argument(help="The recorded table, from evaluate.")] = Path(
        "data/results/sweep.csv"
    ),
) -> None:
    """Write the recorded results into the table of README.md."""
    from tokensel.book.site import readme
    from tokensel.book.site.chapter import find_root

    readme.write(find_root() / "README.md", results)
