"""The command line, with the other modules of this wing the only place that prints."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from causalprune import __version__
from causalprune.cli import measuring, pruning, reporting
from causalprune.cli import options as opt
from causalprune.cli.options import app, console
from causalprune.core import CausalPruneError

COMMANDS = (measuring, pruning, reporting)  # importing them adds their commands
STOPPED = 130
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
"""What a bad option raises: newer releases of typer carry their own click, older ones import it."""


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Options of every command."""
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command(name="run")
def run_recipe(
    recipe: Annotated[
        str, typer.Argument(help="YAML file, or the name of a recipe that comes with causalprune.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/RECIPE).")
    ] = None,
    data_dir: opt.DataDir = None,
    full: Annotated[bool, typer.Option("--full", help="Drop the limits of all tasks.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, load no weights.")
    ] = False,
) -> None:
    """Run a recipe: dense and every method × sparsity on every task, resumable, results in one folder."""
    from causalprune.cli import tables
    from causalprune.core import shown
    from causalprune.runs import find_recipe, plan, read_recipe, run, without_limits

    path = find_recipe(recipe)
    wanted = without_limits(read_recipe(path)) if full else read_recipe(path)
    folder = output or Path("runs") / path.stem
    if dry_run:
        console.print(tables.plan(plan(wanted, folder, data_dir=data_dir)))
        return
    command = shlex.join(typed(recipe, folder, data_dir, full=full))
    record = run(wanted, folder, data_dir=data_dir, stage=shown, command=command)
    _print_run(record, folder)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
) -> None:
    """Prune the embedded model on generated problems and compare the methods: no download but the model."""
    run_recipe("demo", output)


def _print_run(record: dict[str, Any], folder: Path) -> None:
    from causalprune.cli import tables
    from causalprune.evaluation import rows_of
    from causalprune.reports import REPORT, report, verdict
    from causalprune.runs import next_command, outcome_of

    console.print(tables.comparison(rows_of(record), sizes=tables.sizes(record)))
    found = verdict(record)
    opt.say(tables.verdict(found), "green" if found.holds else None)
    (page,) = report([folder], folder / REPORT)
    opt.say(f"results: {folder / 'results.json'}\nreport: {page}")
    if (made := outcome_of(record, folder, found.label, next_command(record, folder, found))) is not None:
        opt.say(tables.outcome(made))


def typed(recipe: str, folder: Path, data_dir: Path | None, *, full: bool) -> list[str]:
    """Return the words of a `run` command with everything that was left to defaults or the environment."""
    words = ["causalprune", "run", recipe, "-o", str(folder)]
    words += [] if data_dir is None else ["--data-dir", str(data_dir)]
    return words + (["--full"] if full else [])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line: errors on one line with exit code 2, Ctrl-C with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")  # asks a bot on the Hub for other weights
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(given, standalone_mode=False)
    except USAGE_ERROR as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        if "--debug" in given:
            raise
        known = isinstance(error, CausalPruneError)
        hint = "" if known else " (unexpected: run again as `causalprune --debug …` to see where)"
        name = "" if known else f"{type(error).__name__}: "
        if isinstance(error, RuntimeError):
            from causalprune.core import out_of_memory

            if out_of_memory(error):
                hint = " (fewer --batch-tokens, batch_tokens in a recipe, take less, and so does --dtype bfloat16)"
        print(f"error: {name}{' '.join(str(error).split())}{hint}", file=sys.stderr)
        code = 2 if known else 1
    if code == STOPPED:  # some releases of typer answer Ctrl-C with this code themselves
        print(
            "stopped; finished measurements are on disk: the same command goes on from there", file=sys.stderr
        )
    sys.exit(code)
