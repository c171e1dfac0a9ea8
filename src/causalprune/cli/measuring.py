"""Commands that look at a model, measure it and compare what was measured."""

import contextlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, console, document, voice
from causalprune.core import ModelError, OptionError

if TYPE_CHECKING:
    from causalprune.core import Effects
    from causalprune.runs import AttributionSpec, ModelSpec, Options


@dataclass(frozen=True)
class EstimateOptions(opt.EffectOptions):
    """What is measured of a model, and how it is estimated."""

    ablation: Annotated[
        Literal["zero", "mean", "resample", "counterfactual"],
        typer.Option(
            help="What takes the place of a removed unit; resample: what another example has there; counterfactual: what "
            "the example's own has there, which every line of a file must have then (or -t ioi)."
        ),
    ] = "zero"
    estimator: Annotated[
        Literal["exact", "gradient", "adaptive", "integrated", "relevance"] | None,
        typer.Option(
            help="exact (default), gradient (a few passes in all), integrated (gradients at five gates), adaptive (default with "
            "a budget), relevance (AttnLRP, in logits; LRP is patented, and whether that matters is yours to judge)."
        ),
    ] = None
    budget: Annotated[
        str | None, typer.Option(help="Cost: `20x` is a twentieth of a whole pass per unit and example.")
    ] = None
    until_certain: Annotated[
        bool, typer.Option("--until-certain", help="Stop when the top fifth of the units is settled at 95 %.")
    ] = False

    def spec(self, seed: int = 0, cache_gib: float = 1.0) -> "AttributionSpec":
        """Return what is measured, and how, as runs take it."""
        from causalprune.runs import AttributionSpec

        name = self.estimator or ("adaptive" if self.budget or self.until_certain else "exact")
        return AttributionSpec(
            tuple(self.units),
            self.effect,
            self.ablation,
            name,
            _times(self.budget),
            self.until_certain,
            seed=seed,
            cache_gib=cache_gib,
        )


@dataclass(frozen=True)
class SpreadOptions(opt.RunningOptions):
    """How an attribution is done, and who shares its jobs."""

    cache_gib: Annotated[
        float, typer.Option(help="Memory for inputs of layers; what does not fit is computed again.", min=0)
    ] = 1.0
    shard: Annotated[
        str | None,
        typer.Option(
            help="`2/4` does the second quarter of the jobs: for machines side by side, joined by `merge`."
        ),
    ] = None
    executor: Annotated[
        Literal["serial", "ray"],
        typer.Option(help="ray: spread the jobs over processes or machines (needs causalprune[ray])."),
    ] = "serial"
    workers: Annotated[
        int | None,
        typer.Option(help="Processes of the executor `ray`, each with a model.", min=1, show_default="2"),
    ] = None
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, as auto; else one on this machine.")
    ] = None

    def options(self, data_dir: Path | str | None = None, *, overwrite: bool = False) -> "Options":
        """Return how the work is done as runs take it."""
        from causalprune.attribution import Cluster

        if self.address and self.executor != "ray":
            raise OptionError(f"--address {self.address} is of a Ray cluster: pass --executor ray too")
        if self.workers and self.executor != "ray":
            raise OptionError(f"--workers {self.workers} are of the executor ray: pass --executor ray too")
        cluster = Cluster(self.workers or 2, self.address) if self.executor == "ray" else None
        return replace(
            super().options(data_dir, overwrite=overwrite), share=_share(self.shard), cluster=cluster
        )


@dataclass(frozen=True)
class DrawOptions(opt.CalibrationOptions):
    """Which examples are drawn, five times of each source."""

    task: Annotated[
        list[str], typer.Option("--task", "-t", help="Sources; the first is compared with the others.")
    ] = field(default_factory=lambda: ["gsm8k", "arc_challenge", "wikitext2"])
    n: Annotated[int, typer.Option("-n", help="Examples in each of five draws.", min=1)] = 8


@app.command()
@grouped
def inspect(
    model: opt.ModelOptions,
    weights: Annotated[
        bool, typer.Option("--weights", help="Load the model too, count its zeros and show its fingerprint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what was found in a model: layers, units, what is prunable, what is left out and why, what pruning takes.

    Reads the configuration alone, unless --weights is given. Of a GGUF file it shows what is in that: types, bytes, zeros.
    """
    from causalprune.checkpoints import count_zeros, unknown_tensors
    from causalprune.cli import tables
    from causalprune.models import summary
    from causalprune.runs import load, outlined

    spec = model.spec()
    if spec.name.endswith(".gguf"):
        _show_file(spec, weights, as_json)
        return
    decoder = load(spec) if weights else outlined(spec)
    found = summary(decoder)
    if weights:
        counted = count_zeros(decoder)
        found["zeros"], found["sparsity"] = counted["zeros"], round(counted["sparsity"], 6)
    if unknown := unknown_tensors(decoder):
        sizes = {"parameters": len(unknown), "weights": sum(math.prod(entry.shape) for entry in unknown)}
        found["left_out"]["unknown to the class"] = sizes
    console.print(tables.inspection(spec.name, found))
    document(as_json, **found)


def _show_file(spec: "ModelSpec", weights: bool, as_json: bool) -> None:
    """Show what is in a GGUF file, and what can be pruned in it where transformers reads it."""
    from causalprune.cli import tables
    from causalprune.models import summary
    from causalprune.runs import outlined
    from causalprune.shipping import looked_into

    with voice.stage("reading") as progress:
        held = looked_into(Path(spec.name).expanduser(), zeros=weights, progress=progress)
    with contextlib.suppress(ModelError):  # llama.cpp runs more than transformers reads
        held = summary(outlined(spec)) | held
    console.print(tables.inspection(spec.name, {k: v for k, v in held.items() if k != "tensors"}))
    document(as_json, **held)


@app.command()
@grouped
def attribute(
    model: opt.ModelOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for effects.json and the ledger.")],
    data: opt.CalibrationOptions,
    method: EstimateOptions,
    running: SpreadOptions,
    subsets: opt.Subsets = 3,
    as_json: AsJson = False,
) -> None:
    """Measure every attention head (or other units): how much does the loss rise when it is removed?

    Every finished job is on disk at once: a run that was stopped goes on where it was.
    """
    from causalprune.runs import attribute as measure

    calibration = data.spec(subsets)
    wanted = method.spec(data.reading.seed, running.cache_gib)
    options = running.options(data.reading.data_dir)
    effects = measure(model.spec(), calibration, output, options, wanted)
    file = output / options.named("effects.json")
    if running.shard:
        console.print(f"share {running.shard}: {file}; `causalprune merge` joins it with the others")
        document(as_json, effects=file, share=running.shard)
        return
    _print_effects(effects, file, as_json)


@app.command()
def merge(
    shares: Annotated[list[Path], typer.Argument(help="Effects of all shares, as effects.1-of-4.json …")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the effects of the whole run.")],
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Join the shares of `attribute --shard` to the effects of the whole run, bit for bit those of a run alone."""
    from causalprune.attribution import merge as join
    from causalprune.checkpoints import load_effects, save_effects

    if output.exists() and not overwrite:
        raise OptionError(f"{output} exists: choose another name, or pass --overwrite")
    effects = join([load_effects(path) for path in shares])
    save_effects(effects, output)
    _print_effects(effects, output, as_json)


def _print_effects(effects: "Effects", file: Path, as_json: bool) -> None:
    from causalprune.cli import tables

    console.print(tables.strongest(effects))
    if (effects.description.get("estimator") or {}).get("name") == "relevance":
        console.print("relevance is in logits of the targets, not in nats")
    console.print(f"effects of {len(effects.units)} units: {file}")
    document(as_json, effects=file, **tables.effects(effects))


@app.command()
@grouped
def stability(
    model: opt.ModelOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for stability.json and ledgers.")],
    data: DrawOptions,
    method: opt.EffectOptions,
    running: opt.RunningOptions,
    top: Annotated[int, typer.Option(help="Strongest units that are removed in pairs.", min=2)] = 20,
    as_json: AsJson = False,
) -> None:
    """Show how far effects can be trusted: between draws, tasks and plain text, and for pairs of units."""
    from causalprune.cli import tables
    from causalprune.runs import check_stability

    options = running.options(data.reading.data_dir)
    found = check_stability(model.spec(), data.spec(), output, options, method.spec(), top)
    for table in tables.stability(found):
        console.print(table)
    console.print(f"all numbers: {output / 'stability.json'}")
    document(as_json, stability=output / "stability.json", **found)


@app.command()
@grouped
def evaluate(
    *,
    model: opt.ModelOptions,
    on: opt.On = [],  # noqa: B006 (typer copies it)
    task: Annotated[list[str], typer.Option("--task", "-t", hidden=True)] = [],  # noqa: B006
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file for the results, with per-example values.")
    ],
    reading: opt.ReadingOptions,
    answers: opt.AnswerOptions,
    limit: Annotated[
        int | None, typer.Option(help="Examples (tokens for `_ppl` and `_kl`) of what names no count.", min=1)
    ] = None,
    phrases: Annotated[
        Path | None, typer.Option(help="List of phrases, one a line, that SOURCE_phrases looks for.")
    ] = None,
    running: opt.RunningOptions = opt.RunningOptions(batch_tokens=4096),
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model, and keep the value of every example."""
    from causalprune.cli import tables
    from causalprune.evaluation import load_scorers, read_phrases
    from causalprune.runs import evaluate_model

    measures, spec = (*on, *task), model.spec()
    if not measures:
        raise OptionError("nothing to measure: say what with --on, as in --on gsm8k_nll:200")
    settings = reading.spec(["gsm8k"]).settings(
        reading.data_dir,
        limit=limit,
        batch_tokens=running.batch_tokens,
        max_new_tokens=answers.max_new_tokens,
        answer=answers.answer,
        scorers=load_scorers(answers.scorer),
        phrases=() if phrases is None else read_phrases(phrases),
    )
    options = running.options(reading.data_dir, overwrite=overwrite)
    results = evaluate_model(spec, measures, settings, output, options)
    rows = [(spec.name, results)]
    console.print(tables.comparison(rows))
    console.print(f"results: {output}")
    document(as_json, results=output, rows=tables.figures(rows))


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
    as_json: AsJson = False,
) -> None:
    """Compare results example by example: paired differences with 95 % bootstrap intervals."""
    from causalprune.cli import tables
    from causalprune.evaluation import load_rows, read_json, record_file

    rows = [row for path in results for row in load_rows(path)]
    if not any(measured for _, measured in rows):
        raise OptionError(f"nothing to compare: {', '.join(map(str, results))} has no results")
    records = (read_json(record_file(path)) for path in results)
    sizes = [size for record in records for size in tables.sizes(record)]
    table = tables.comparison(rows, against=against, sizes=sizes)
    console.print(
        tables.to_markdown(table) if markdown else table, soft_wrap=markdown, markup=False, highlight=False
    )
    document(as_json, against=against or rows[0][0], rows=tables.figures(rows, against=against))


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
