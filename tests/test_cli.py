"""The command line: quick help, options that agree with the configurations, clear endings."""

import dataclasses
import errno
import inspect
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from tokensel import cli
from tokensel.benchmarks.config import EvalConfig
from tokensel.profiling.config import CostConfig
from tokensel.serving.config import ServeConfig
from tokensel.training.config import AnswersConfig, DyRateConfig, TrainConfig
from tokensel.training.finetune_config import FinetuneConfig
from tokensel.utils.errors import TokenselError

COMMANDS = ("train", "train-answers", "dyrate", "evaluate", "cost", "serve", "doctor")
HELP = {"TERM": "dumb", "COLUMNS": "200"}


def run(*arguments: str):
    return CliRunner(env=HELP).invoke(cli.app, list(arguments), prog_name="python -m tokensel")


def ended(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run ``main`` in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["tokensel", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return (exit_info.value.code or 0, *capsys.readouterr())


def test_help_lists_the_commands_without_loading_torch():
    code = "import sys; from tokensel import cli; sys.argv[1:] = ['--help']\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in (*COMMANDS, "mini", "book"):
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_line_of_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    parameters = typer.main.get_command(cli.app).commands[command].params
    for parameter in parameters:
        assert parameter.help and parameter.help.endswith("."), parameter.name
        assert parameter.opts[0] in result.output


@pytest.mark.parametrize("command", ["mini", "book"])
def test_the_mounted_commands_show_their_own_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0, result.output
    assert f"python -m tokensel {command}" in result.output
    assert "--install-completion" not in result.output
    inner = run(command, next(iter(inner_commands(command))), "--help")
    assert inner.exit_code == 0, inner.output


def inner_commands(command: str) -> dict:
    module = {"mini": "tokensel.book.mini.cli", "book": "tokensel.book.site.cli"}[command]
    return typer.main.get_group(__import__(module, fromlist=["app"]).app).commands


@pytest.mark.parametrize(
    "command", ["train", "train-answers", "dyrate", "finetune", "evaluate", "cost", "doctor", "mini", "book"]
)
def test_unknown_options_are_refused(command, monkeypatch, capsys):
    code, _, told = ended(monkeypatch, capsys, command, "--no-such-option", "1")
    assert code == 2 and "--no-such-option" in told


@pytest.mark.parametrize(
    ("command", "config", "renamed"),
    [
        (cli.train, TrainConfig, {"ps"}),
        (cli.train_answers, AnswersConfig, set()),
        (cli.dyrate, DyRateConfig, set()),
        (cli.finetune, FinetuneConfig, set()),
        (cli.evaluate, EvalConfig, {"whole", "progress"}),
        (cli.cost, CostConfig, {"training", "serving", "progress"}),
        (cli.serve, ServeConfig, {"engine"}),
    ],
)
def test_options_and_defaults_are_those_of_the_configuration(command, config, renamed):
    options = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    assert options.keys() - renamed == fields.keys()
    for name, default in options.items():
        if name in renamed or default is inspect.Parameter.empty:
            continue
        if isinstance(fields[name], tuple):
            kind = type(fields[name][0]) if fields[name] else str
            default = cli._list(name, default, kind)
        assert default == fields[name], name


def test_what_the_command_does_not_know_is_passed_on_to_the_engine(monkeypatch):
    seen = []
    monkeypatch.setattr("tokensel.serving.launch.serve", lambda *given: seen.append(given))
    known, others = ["--model", "tiny", "--keep", "0.3"], ["--port", "8000", "--enforce-eager"]
    assert run("serve", *others, *known, "--", "--seed", "3").exit_code == 0
    assert seen == [(ServeConfig("tiny", keep=0.3), [*others, "--seed", "3"])]


def test_values_reach_the_configuration(monkeypatch):
    seen = []

    def evaluate(config, progress):
        seen.append((config, progress))
        raise TokenselError("enough")

    monkeypatch.setattr("tokensel.benchmarks.runner.evaluate", evaluate)
    arguments = "--model m --suite s --methods random,norm --keeps 0.1,.5 --seeds 3,4 --benchmarks a --n 7"
    result = run("evaluate", *arguments.split(), "--newline", "row", "--no-progress")
    assert isinstance(result.exception, TokenselError)
    given = dict(
        model="m",
        suite="s",
        methods=("random", "norm"),
        keeps=(0.1, 0.5),
        seeds=(3, 4),
        benchmarks=("a",),
        n=7,
    )
    assert seen == [(EvalConfig(**given, newline="row"), False)]
    run("evaluate", "--model", "m", "--suite", "s", "--methods", "full", "--all")
    assert seen[1][0].n is None and seen[1][1]


def test_several_p_are_trained_one_after_the_other(monkeypatch):
    seen = []
    monkeypatch.setattr("tokensel.training.train.train", seen.append)
    result = run("train", "--images", "i", "--encoder", "e", "--out", "o", "--ps", "0.1,.5", "--steps", "7")
    assert [(config.p, config.out, config.steps) for config in seen] == [
        (0.1, "o/p-0.1", 7),
        (0.5, "o/p-0.5", 7),
    ]
    assert result.output.split()[1::2] == [
        f"o/p-{p}/{name}" for p in (0.1, 0.5) for name in ("selector", "reconstructor")
    ]
    result = run("train", "--images", "i", "--encoder", "e", "--out", "o", "--ps", "0.1,2")
    assert isinstance(result.exception, TokenselError) and len(seen) == 2


def test_an_error_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raises(TokenselError("keep is 0:\n  give more")))
    assert ended(monkeypatch, capsys) == (1, "", "error: keep is 0: give more\n")


def test_a_full_disk_is_one_line_wherever_it_shows(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raises(OSError(errno.ENOSPC, "No space left on device", "/data/x")))
    code, _, told = ended(monkeypatch, capsys)
    assert code == 1 and told.startswith("error: /data/x: no space left") and told.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "app", raises(OSError(errno.EACCES, "denied")))
    with pytest.raises(OSError, match="denied"):
        cli.main()


@pytest.mark.parametrize(
    ("command", "loader"),
    [
        ("evaluate --model us/model --suite suite_tiny --methods full", "benchmarks.session.load_vlm"),
        ("dyrate --model us/model --suite suite_tiny --out OUT", "training.frozen.load_vlm"),
        ("train-answers --model us/model --suite suite_tiny --out OUT", "training.frozen.load_vlm"),
        ("cost --model us/model --out OUT", "profiling.workload.load_vlm"),
        ("cost --model us/model --out OUT --random-weights", "profiling.workload.hub_options"),
    ],
)
def test_the_revision_of_a_model_reaches_its_loader(command, loader, monkeypatch, capsys, tmp_path):
    def load(name, *_, revision):
        raise TokenselError(f"asked for {name} at {revision}")

    monkeypatch.setattr(f"tokensel.{loader}", load)
    words = command.replace("OUT", str(tmp_path)).split()
    for given, seen in (((), None), (("--revision", "v2"), "v2")):
        code, _, told = ended(monkeypatch, capsys, *words, *given)
        assert code == 1 and told == f"error: asked for us/model at {seen}\n"


def test_interrupted_is_130(monkeypatch, capsys):
    monkeypatch.setattr("tokensel.benchmarks.runner.evaluate", raises(KeyboardInterrupt()))
    assert (
        ended(monkeypatch, capsys, "evaluate", "--model", "m", "--suite", "s", "--methods", "full")[0] == 130
    )


def raises(error: BaseException):
    def call(*_args, **_kwargs):
        raise error

    return call


def test_lists():
    assert cli._list("keeps", " 0.1, .2,", float) == (0.1, 0.2)
    with pytest.raises(TokenselError, match="seeds is '1,x'"):
        cli._list("seeds", "1,x", int)
