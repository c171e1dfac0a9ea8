"""The command line, with the other modules of this wing the only place that prints."""

import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from causalprune import __version__
from causalprune.cli import circuits, correcting, looking, measuring, pruning, removing, reporting, shipping
from causalprune.cli import options as opt
from causalprune.cli.groups import ready
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, console, document, say, voice
from causalprune.core import CausalPruneError

COMMANDS = (
    looking,
    measuring,
    circuits,
    pruning,
    removing,
    correcting,
    shipping,
    reporting,
)  # importing them adds their commands
STOPPED = 130
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
"""What a bad option raises: newer releases of typer carry their own click, older ones import it."""


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress and no tables: errors, warnings and files only.")
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-file", help="Add progress, warnings and errors to this file too, as lines with the time."
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Options of every command, before its name or after."""
    voice.begin(quiet, log_file)


@app.command(name="run")
def run_recipe(
    recipe: Annotated[
        str, typer.Argument(help="YAML file, or the name of a recipe that comes with causalprune.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/RECIPE).")
    ] = None,
    data_dir: opt.DataDir = None,
    full: Annotated[bool, typer.Option("--full", help="Measure on all examples: drop the counts.")] = False,
    seeds: Annotated[
        int,
        typer.Option(
            help="Draws of the calibration examples: a run for each, in a folder of its own, and means with their spread.",
            min=1,
        ),
    ] = 1,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run code that comes with the model, and scorers of the recipe."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, load no weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: dense and every method × sparsity on every task, resumable, results in one folder."""
    ready()
    from causalprune.cli import tables
    from causalprune.runs import find_recipe, plan, read_recipe, run, run_draws, times, without_limits

    path = find_recipe(recipe)
    wanted = read_recipe(path, trust_remote_code=trust_remote_code)
    wanted = without_limits(wanted) if full else wanted
    folder = output or Path("runs") / path.stem
    if dry_run:
        planned = times(plan(wanted, folder, data_dir=data_dir), seeds)
        console.print(tables.plan(planned))
        document(as_json, plan=planned)
        return
    words = typed(recipe, folder, data_dir, full=full, seeds=seeds)
    command = shlex.join([*words, *(["--trust-remote-code"] if trust_remote_code else [])])
    if seeds == 1:
        record = run(wanted, folder, data_dir=data_dir, stage=voice.stage, command=command)
        _print_run(record, folder, data_dir, as_json)
    else:
        found = run_draws(wanted, seeds, folder, data_dir=data_dir, stage=voice.stage, command=command)
        _print_draws(found, folder, as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Prune the embedded model on generated problems and compare the methods: no download but the model."""
    from causalprune.reports import CHECKPOINTS

    run_recipe("demo", output, as_json=as_json)
    kept = [str(path) for path in sorted((output / CHECKPOINTS).iterdir())]
    say(f"kept models: {' and '.join(kept)}\nthree commands to go on with:")
    answers = ("evaluate", kept[-1], "--on", "gsm_symbolic_answers:8", "-o", f"{output}/answers.json")
    sits = (
        "attribute",
        "embedded",
        "-o",
        f"{output}/effects",
        "-t",
        "gsm_symbolic:12",
        "--estimator",
        "gradient",
    )
    for words in (("compare", str(output)), answers, sits):
        say(shlex.join(["causalprune", *words]))


def _print_run(record: dict[str, Any], folder: Path, data_dir: Path | None, as_json: bool) -> None:
    from causalprune.cli import tables
    from causalprune.evaluation import RESULTS, rows_of
    from causalprune.reports import REPORT, report, verdict
    from causalprune.runs import next_command, outcome_of

    rows, found = rows_of(record), verdict(record)
    console.print(tables.comparison(rows, sizes=tables.sizes(record)))
    say(tables.verdict(found), "green" if found.holds else None)
    with voice.stage("report"):
        (page,) = report([folder], folder / REPORT)
    say(f"results: {folder / RESULTS}\nreport: {page}")
    made = outcome_of(record, folder, found.label, next_command(record, folder, found, data_dir))
    if made is not None:
        say(tables.outcome(made))
    files = {"results": folder / RESULTS, "report": page}
    document(as_json, **files, rows=tables.figures(rows), verdict=found, outcome=made)


def _print_draws(record: dict[str, Any], folder: Path, as_json: bool) -> None:
    from causalprune.cli import tables
    from causalprune.evaluation import DRAWS, rows_of
    from causalprune.reports import REPORT, report

    rows = rows_of(record)
    console.print(tables.comparison(rows))
    console.print(f"means over {len(record['draws'])} draws: {folder / DRAWS}", soft_wrap=True)
    with voice.stage("report"):
        (page,) = report([folder / name for name in record["draws"]], folder / REPORT)
    console.print(f"report: {page}", soft_wrap=True)
    document(as_json, results=folder / DRAWS, report=page, rows=tables.figures(rows))


def typed(recipe: str, folder: Path, data_dir: Path | str | None, *, full: bool, seeds: int) -> list[str]:
    """Return the words of a `run` command with everything that was left to defaults or the environment."""
    words = ["causalprune", "run", recipe, "-o", str(folder)]
    words += [] if data_dir is None else ["--data-dir", str(data_dir)]
    words += ["--seeds", str(seeds)] if seeds > 1 else []
    return words + (["--full"] if full else [])


def one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return a warning as the command line shows it, once and without its place in the code; the log has it too."""
    text = f"warning: {' '.join(str(message).split())}"
    if text in voice.told:  # by every model of a run, say
        return ""
    voice.told.add(text)
    voice.log(text)
    return f"{text}\n"


def in_front(words: Iterable[str]) -> list[str]:
    """Return the words of a command with the options of every command first, wherever they were typed."""
    left, front, rest = iter(words), list[str](), list[str]()
    for word in left:
        name, value, _ = word.partition("=")
        if name not in ("--debug", "--quiet", "--log-file"):
            rest.append(word)
            continue
        front.append(word)
        front += itertools.islice(left, int(name == "--log-file" and not value))
    return front + rest


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line: errors on one line with exit code 2, Ctrl-C with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")  # asks a bot on the Hub for other weights
    warnings.formatwarning = one_line
    # of packages that are compiled when they are first imported: nothing that a user could mend
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*(site|dist)-packages")
    given = in_front(sys.argv[1:] if arguments is None else arguments)
    voice.begin()
    voice.command = shlex.join(["causalprune", *given])
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
        code = 2 if isinstance(error, CausalPruneError) else 1
        voice.tell(f"error: {_told(error)}")
    if code == STOPPED:  # some releases of typer answer Ctrl-C with this code themselves
        voice.tell("stopped; finished measurements are on disk: the same command goes on from there")
    sys.exit(code)


def _told(error: Exception) -> str:
    """Return an error on one line, with what to do about one that was not foreseen."""
    text = " ".join(str(error).split())
    if isinstance(error, CausalPruneError):
        return text
    hint = "unexpected: run again as `causalprune --debug …` to see where"
    if isinstance(error, RuntimeError):
        from causalprune.core import out_of_memory

        if out_of_memory(error):
            hint = (
                "fewer --batch-tokens, batch_tokens in a recipe, take less, and so does --dtype bfloat16, or from files a "
                "smaller --cache-gib"
            )
    return f"{type(error).__name__}: {text} ({hint})"
