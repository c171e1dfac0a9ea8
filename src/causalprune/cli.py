"""The command line: the only place that prints, and where options turn into plain values."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from causalprune import __version__
from causalprune import options as opt
from causalprune.errors import CausalPruneError, OptionError

app = typer.Typer(
    help="Prune language models by what their attention heads are measured to do, and see what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
console = Console()

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


@app.command()
def inspect(
    model: opt.Model,
    revision: opt.Revision = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    device_map: opt.DeviceMap = None,
    trust_remote_code: opt.Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what was found in a model: layers, heads, what is prunable, what is left out and why."""
    from causalprune import tables
    from causalprune.anatomy import summary
    from causalprune.recipe import ModelSpec
    from causalprune.run import load

    found = summary(load(ModelSpec(model, revision, dtype, device, device_map, trust_remote_code)))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(tables.inspection(model, found))


@app.command()
def attribute(
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for effects.json and the ledger.")],
    task: opt.Task = ["gsm8k"],  # noqa: B006
    n: opt.N = 128,
    subsets: opt.Subsets = 3,
    seed: opt.Seed = 0,
    max_tokens: opt.MaxTokens = 512,
    chat: opt.Chat = "auto",
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = 2048,
    units: opt.Units = ["heads"],  # noqa: B006
    effect: opt.EffectName = "ce",
    ablation: opt.AblationName = "zero",
    estimator: opt.EstimatorName = None,
    budget: opt.Budget = None,
    until_certain: opt.UntilCertain = False,
    cache_gib: opt.CacheGib = 1.0,
    revision: opt.Revision = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    device_map: opt.DeviceMap = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Measure every attention head (or other units): how much does the loss rise when it is removed?

    Every finished job is on disk at once: a run that was stopped goes on where it was.
    """
    from causalprune import tables
    from causalprune.progress import shown
    from causalprune.recipe import AttributionSpec, CalibrationSpec, ModelSpec
    from causalprune.run import Options
    from causalprune.run import attribute as measure

    spec = ModelSpec(model, revision, dtype, device, device_map, trust_remote_code)
    calibration = CalibrationSpec(tuple(task), n, subsets, seed, max_tokens, chat)
    name = estimator or ("adaptive" if budget or until_certain else "exact")
    wanted = AttributionSpec(
        tuple(units), effect, ablation, name, _times(budget), until_certain, seed=seed, cache_gib=cache_gib
    )
    effects = measure(spec, calibration, output, Options(data_dir, batch_tokens, stage=shown), wanted)
    console.print(tables.strongest(effects))
    console.print(f"effects of {len(effects.units)} units: {output / 'effects.json'}")


@app.command()
def stability(
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for stability.json and ledgers.")],
    task: Annotated[
        list[str],
        typer.Option("--task", "-t", help="Sources; the first is compared with the others."),
    ] = ["gsm8k", "arc_challenge", "wikitext2"],  # noqa: B006
    n: Annotated[int, typer.Option("-n", help="Examples in each of five draws.", min=1)] = 8,
    seed: opt.Seed = 0,
    max_tokens: opt.MaxTokens = 512,
    chat: opt.Chat = "auto",
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = 2048,
    units: opt.Units = ["heads"],  # noqa: B006
    effect: opt.EffectName = "ce",
    top: Annotated[int, typer.Option(help="Strongest units that are removed in pairs.", min=2)] = 20,
    revision: opt.Revision = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    device_map: opt.DeviceMap = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Show how far effects can be trusted: between draws, tasks and plain text, and for pairs of units."""
    from causalprune import tables
    from causalprune.progress import shown
    from causalprune.recipe import AttributionSpec, CalibrationSpec, ModelSpec
    from causalprune.run import Options, check_stability

    spec = ModelSpec(model, revision, dtype, device, device_map, trust_remote_code)
    calibration = CalibrationSpec(tuple(task), n, seed=seed, max_tokens=max_tokens, chat=chat)
    wanted = AttributionSpec(tuple(units), effect)
    found = check_stability(
        spec, calibration, output, Options(data_dir, batch_tokens, stage=shown), wanted, top
    )
    for table in tables.stability(found):
        console.print(table)
    console.print(f"all numbers: {output / 'stability.json'}")


@app.command()
def prune(
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pruned checkpoint.")],
    method: Annotated[
        str,
        typer.Option(
            help="sparsegpt, wanda, magnitude, cap or random; with a scope as in magnitude:global or a pattern "
            "as in wanda:2:4; with an update of the kept weights (obs, refit, distill) as in sparsegpt+distill."
        ),
    ] = "cap",
    sparsity: Annotated[
        str | None,
        typer.Option(help="Share of the prunable weights set to zero (default 0.2, or the pattern's own)."),
    ] = None,
    effects: Annotated[
        Path | None, typer.Option(help="effects.json of `attribute` (cap; else measured first).")
    ] = None,
    task: opt.Task = ["gsm8k"],  # noqa: B006
    n: opt.N = 128,
    subsets: opt.Subsets = 3,
    seed: opt.Seed = 0,
    max_tokens: opt.MaxTokens = 512,
    chat: opt.Chat = "auto",
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = 2048,
    revision: opt.Revision = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    device_map: opt.DeviceMap = None,
    trust_remote_code: opt.Trust = False,
    overwrite: opt.Overwrite = False,
    stream: opt.Stream = False,
) -> None:
    """Prune a model and save it as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    With `cap` and no `--effects`, the heads are measured first; that part survives a kill.
    """
    from causalprune import tables
    from causalprune.progress import shown
    from causalprune.recipe import CalibrationSpec, ModelSpec, parse_method
    from causalprune.run import Options, prune_checkpoint, prune_streamed

    spec = ModelSpec(model, revision, dtype, device, device_map, trust_remote_code)
    calibration = CalibrationSpec(tuple(task), n, subsets, seed, max_tokens, chat)
    wanted = parse_method(method, _sparsity(sparsity), seed)
    options = Options(data_dir, batch_tokens, overwrite, shown)
    if stream:
        done = prune_streamed(spec, wanted, output, effects, options)
        achieved = tables.sparsity(done.weights, done.zeros, ())
    else:
        pruned = prune_checkpoint(spec, wanted, output, calibration, effects, options)
        zeros = sum(int((~keep).sum()) for keep in pruned.keep.values())
        weights = sum(keep.numel() for keep in pruned.keep.values())
        achieved = tables.sparsity(weights, zeros, pruned.unrouted)
    console.print(achieved, highlight=False)
    console.print(f"saved: {output}")


@app.command()
def evaluate(
    model: opt.Model,
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            help="gsm8k_cot, gsm8k_nll:200, arc_challenge:500, wikitext2_ppl:40000, …; repeatable.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file for the results, with per-example values.")
    ],
    limit: Annotated[
        int | None,
        typer.Option(help="Problems per task (tokens for perplexity) where the task names none.", min=1),
    ] = None,
    seed: opt.Seed = 0,
    max_tokens: opt.MaxTokens = 512,
    chat: opt.Chat = "auto",
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = 4096,
    revision: opt.Revision = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    device_map: opt.DeviceMap = None,
    trust_remote_code: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure a model on tasks, and keep the value of every example."""
    from causalprune import tables
    from causalprune.evaluation import Settings
    from causalprune.progress import shown
    from causalprune.recipe import ModelSpec
    from causalprune.run import Options, evaluate_model

    spec = ModelSpec(model, revision, dtype, device, device_map, trust_remote_code)
    settings = Settings(limit, data_dir, seed, max_tokens, chat=chat, batch_tokens=batch_tokens)
    results = evaluate_model(spec, tuple(task), settings, output, Options(overwrite=overwrite, stage=shown))
    console.print(tables.comparison([(model, results)]))
    console.print(f"results: {output}")


@app.command()
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(help="Run folders or result files; the first row is what others are compared with."),
    ],
    against: Annotated[
        str | None, typer.Option(help="Row to compare with, instead of the first (as wanda-row-0.5).")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Compare results example by example: paired differences with 95 % bootstrap intervals."""
    from causalprune import tables
    from causalprune.results import load_rows

    rows = [row for path in results for row in load_rows(path)]
    table = tables.comparison(rows, against=against)
    if markdown:
        print(tables.to_markdown(table))
    else:
        console.print(table)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A checkpoint written by causalprune.")]) -> None:
    """Recount the zeros of a checkpoint against its manifest; exit code 1 if any were lost."""
    from causalprune import tables
    from causalprune.verification import verify as check

    report = check(folder)
    print(tables.verification(report))
    if not report.sparsity_holds:
        raise typer.Exit(1)


@app.command()
def reapply(
    pruned: Annotated[Path, typer.Argument(help="A checkpoint written by causalprune: where the zeros are.")],
    model: Annotated[Path, typer.Argument(help="The same model after fine-tuning or merging, as a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint with its zeros.")],
    overwrite: opt.Overwrite = False,
) -> None:
    """Set what is zero in PRUNED to zero in MODEL again, after adapters were merged or zeros were lost in training."""
    from causalprune.kept import reapply as restore

    restored = restore(pruned, model, output, overwrite=overwrite)
    console.print(f"{restored:,} weights set back to zero", highlight=False)
    console.print(f"saved: {output}")


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
    from causalprune import tables
    from causalprune.plan import plan
    from causalprune.progress import shown
    from causalprune.recipe import find_recipe, read_recipe, without_limits
    from causalprune.run import run

    path = find_recipe(recipe)
    wanted = without_limits(read_recipe(path)) if full else read_recipe(path)
    folder = output or Path("runs") / path.stem
    if dry_run:
        console.print(tables.plan(plan(wanted, folder, data_dir=data_dir)))
        return
    record = run(wanted, folder, data_dir=data_dir, stage=shown)
    _print_run(record, folder)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
) -> None:
    """Prune the embedded model on generated problems and compare the methods: no download but the model."""
    run_recipe("demo", output)


def _print_run(record: dict[str, Any], folder: Path) -> None:
    from causalprune import tables
    from causalprune.results import rows_of

    console.print(tables.comparison(rows_of(record)))
    console.print(f"results: {folder / 'results.json'}")


def _sparsity(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"sparsity must be a number between 0 and 1 such as 0.2, not {text!r}") from None


def _times(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise OptionError(
            f"a budget is written as 20x, a twentieth of the naive cost, not {text!r}"
        ) from None


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line: errors on one line with exit code 2, Ctrl-C with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
        print(f"error: {name}{' '.join(str(error).split())}{hint}", file=sys.stderr)
        code = 2 if known else 1
    if code == STOPPED:  # some releases of typer answer Ctrl-C with this code themselves
        print("stopped; what was finished is on disk: the same command goes on from there", file=sys.stderr)
    sys.exit(code)
