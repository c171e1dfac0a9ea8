"""Commands that look at a model, measure it and compare what was measured."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from causalprune.cli import options as opt
from causalprune.cli.options import app, console
from causalprune.core import OptionError

if TYPE_CHECKING:
    from causalprune.runs import ModelSpec


@app.command()
@opt.of_model
def inspect(
    spec: "ModelSpec",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what was found in a model: layers, heads, what is prunable, what is left out and why."""
    from causalprune.cli import tables
    from causalprune.models import summary
    from causalprune.runs import load

    found = summary(load(spec))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(tables.inspection(spec.name, found))


@app.command()
@opt.of_model
def attribute(
    spec: "ModelSpec",
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
    shard: opt.Shard = None,
    executor: opt.Executor = "serial",
    workers: opt.Workers = 2,
    address: opt.Address = None,
) -> None:
    """Measure every attention head (or other units): how much does the loss rise when it is removed?

    Every finished job is on disk at once: a run that was stopped goes on where it was.
    """
    from causalprune.attribution import Cluster
    from causalprune.cli import tables
    from causalprune.core import shown
    from causalprune.runs import AttributionSpec, CalibrationSpec, Options
    from causalprune.runs import attribute as measure

    calibration = CalibrationSpec(tuple(task), n, subsets, seed, max_tokens, chat)
    name = estimator or ("adaptive" if budget or until_certain else "exact")
    wanted = AttributionSpec(
        tuple(units), effect, ablation, name, _times(budget), until_certain, seed=seed, cache_gib=cache_gib
    )
    cluster = Cluster(workers, address) if executor == "ray" else None
    options = Options(data_dir, batch_tokens, stage=shown, share=_share(shard), cluster=cluster)
    effects = measure(spec, calibration, output, options, wanted)
    file = output / options.named("effects.json")
    if shard:
        console.print(f"share {shard}: {file}; `causalprune merge` joins it with the others")
        return
    console.print(tables.strongest(effects))
    console.print(f"effects of {len(effects.units)} units: {file}")


@app.command()
def merge(
    shares: Annotated[list[Path], typer.Argument(help="Effects of all shares, as effects.1-of-4.json …")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the effects of the whole run.")],
    overwrite: opt.Overwrite = False,
) -> None:
    """Join the shares of `attribute --shard` to the effects of the whole run, bit for bit those of a run alone."""
    from causalprune.attribution import merge as join
    from causalprune.checkpoints import load_effects, save_effects
    from causalprune.cli import tables

    if output.exists() and not overwrite:
        raise OptionError(f"{output} exists: choose another name, or pass --overwrite")
    effects = join([load_effects(path) for path in shares])
    save_effects(effects, output)
    console.print(tables.strongest(effects))
    console.print(f"effects of {len(effects.units)} units: {output}")


@app.command()
@opt.of_model
def stability(
    spec: "ModelSpec",
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
) -> None:
    """Show how far effects can be trusted: between draws, tasks and plain text, and for pairs of units."""
    from causalprune.cli import tables
    from causalprune.core import shown
    from causalprune.runs import AttributionSpec, CalibrationSpec, Options, check_stability

    calibration = CalibrationSpec(tuple(task), n, seed=seed, max_tokens=max_tokens, chat=chat)
    wanted = AttributionSpec(tuple(units), effect)
    found = check_stability(
        spec, calibration, output, Options(data_dir, batch_tokens, stage=shown), wanted, top
    )
    for table in tables.stability(found):
        console.print(table)
    console.print(f"all numbers: {output / 'stability.json'}")


@app.command()
@opt.of_model
def evaluate(
    spec: "ModelSpec",
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
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure a model on tasks, and keep the value of every example."""
    from causalprune.cli import tables
    from causalprune.core import shown
    from causalprune.evaluation import Settings
    from causalprune.runs import Options, evaluate_model

    settings = Settings(limit, data_dir, seed, max_tokens, chat=chat, batch_tokens=batch_tokens)
    results = evaluate_model(spec, tuple(task), settings, output, Options(overwrite=overwrite, stage=shown))
    console.print(tables.comparison([(spec.name, results)]))
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
    from causalprune.cli import tables
    from causalprune.evaluation import load_rows

    rows = [row for path in results for row in load_rows(path)]
    table = tables.comparison(rows, against=against)
    if markdown:
        print(tables.to_markdown(table))
    else:
        console.print(table)


def _times(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise OptionError(
            f"a budget is written as 20x, a twentieth of the naive cost, not {text!r}"
        ) from None


def _share(text: str | None) -> tuple[int, int]:
    try:
        index, parts = map(int, (text or "1/1").split("/"))
    except ValueError:
        raise OptionError(f"a share is written as 2/4, the second of four, not {text!r}") from None
    return index, parts
