"""Commands that make and check pruned checkpoints."""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, console, document, pushed_to, say, voice
from causalprune.core import OptionError

if TYPE_CHECKING:
    from causalprune.pruning import Method
    from causalprune.runs import Options


@dataclass(frozen=True)
class PruningOptions(opt.MethodOptions):
    """How weights are chosen, and how many."""

    sparsity: Annotated[
        str | None,
        typer.Option(help="Share of the prunable weights set to zero (default 0.2, or the pattern's own)."),
    ] = None
    effects: Annotated[
        Path | None,
        typer.Option(
            help="effects.json that `attribute` wrote; for --method cap, which else measures all heads first (long)."
        ),
    ] = None

    def parsed(self, seed: int) -> "Method":
        """Return the method; raises `OptionError` where it has no use for the effects."""
        from causalprune.runs import parse_method

        named = self.method or ("causal" if self.effects is None else "cap")
        wanted = parse_method(named, _sparsity(self.sparsity), seed, self.damping)
        if self.effects is not None and "effects" not in wanted.needs:
            raise OptionError(
                f"--effects are for cap, and {wanted.criterion} does not use them: leave them out"
            )
        return wanted


@dataclass(frozen=True)
class SweptOptions(opt.MethodOptions):
    """How weights are chosen, at every sparsity."""

    method: Annotated[str, typer.Option(help=opt.METHODS)] = "causal"


@dataclass(frozen=True)
class StreamOptions(opt.RunningOptions):
    """How a model is pruned, in memory or from file to file."""

    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="From file to file, without loading the model (local folder): matrix by matrix, or layer by layer where "
            "a method looks at inputs or updates weights. Not for fisher, snip, relevance, +graded, +adam, or scope global with "
            "inputs; cap needs --effects. By default where the model does not fit into memory.",
            show_default=False,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how it would be done, and what it takes, and stop.")
    ] = False
    cache_gib: Annotated[
        float,
        typer.Option(
            "--cache-gib",
            help="With --stream: memory for hidden states of the calibration data; the rest is kept on disk.",
            min=0,
        ),
    ] = 1.0

    def options(self, data_dir: Path | str | None = None, *, overwrite: bool = False) -> "Options":
        """Return how the work is done as runs take it."""
        return replace(super().options(data_dir, overwrite=overwrite), cache_gib=self.cache_gib)


@app.command()
@grouped
def prune(
    model: opt.ModelOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pruned checkpoint.")],
    data: opt.MixedOptions,
    method: PruningOptions,
    running: StreamOptions,
    hub: opt.HubOptions,
    subsets: opt.Subsets = 3,
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model and save it as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    With `cap` and no `--effects`, the heads are measured first. A stopped run goes on where it was.
    """
    from causalprune.checkpoints import check_destination
    from causalprune.cli import tables
    from causalprune.runs import outcome, place, prune_checkpoint, prune_streamed, reading, writes_own

    spec, calibration, wanted = model.spec(), data.spec(subsets), method.parsed(data.reading.seed)
    options = running.options(data.reading.data_dir, overwrite=overwrite)
    check_destination(output, overwrite)
    kept_in = output.with_name(f"{output.name}.pruning")
    with options.stage("finding the model"):  # which may be fetched
        chosen = place(
            spec,
            wanted,
            options.batch_tokens,
            stream=running.stream,
            kept_in=kept_in,
            effects=method.effects is not None,
        )
    say(str(chosen))
    if chosen.stream and calibration.preserve is None and writes_own(wanted):
        say(
            "nothing is preserved beside the task: a model in files writes no text (--preserve c4 takes other text)"
        )
    if running.dry_run:
        document(as_json, **asdict(chosen))
        return
    repository = hub.reserve(output, overwrite)
    work = spec, wanted, output, calibration, method.effects, options
    done = prune_streamed(*work) if chosen.stream else prune_checkpoint(*work)
    if done.unrouted:
        said = "matrices of experts got no calibration token and were scored by magnitude"
        say(tables.unrouted(done.unrouted, said))
    made = outcome(output, reading(vars(calibration), vars(spec), data.reading.data_dir))
    say(tables.outcome(made))
    pushed = pushed_to(output, repository)
    document(as_json, saved=output, **vars(made), unrouted=done.unrouted, pushed=pushed)


@app.command()
@grouped
def sweep(
    *,
    model: opt.ModelOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Run folder; a stopped sweep goes on there.")
    ],
    on: opt.On,
    data: opt.MixedOptions = opt.MixedOptions(n=48),
    method: SweptOptions,
    answers: opt.AnswerOptions,
    running: opt.RunningOptions,
    keep: Annotated[
        float, typer.Option(help="Share of dense's accuracy or likelihood per token to keep.")
    ] = 0.95,
    certain: Annotated[
        bool, typer.Option("--certain", help="The far end of the 95 % interval must keep it too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find the highest sparsity, in steps of 5 %, that keeps a share of the task: at most five prunings.

    Supposes that more sparsity is never better. The table shows every sparsity that was tried, with intervals.
    """
    from causalprune.cli import tables
    from causalprune.evaluation import RESULTS, read_json
    from causalprune.reports import verdict
    from causalprune.runs import Recipe, candidates, label, outcome_of, parse_method
    from causalprune.runs import sweep as swept

    recipe = Recipe(
        model.spec(),
        data.spec(),
        methods=(method.method,),
        sparsities=candidates(method.method),
        on=tuple(on),
        seed=data.reading.seed,
        batch_tokens=running.batch_tokens,
        damping=method.damping,
        answer=answers.answer,
        max_new_tokens=answers.max_new_tokens,
        scorers=tuple(answers.scorer),
    )
    tried = swept(recipe, keep, output, certain=certain, data_dir=data.reading.data_dir, stage=voice.stage)
    console.print(tables.swept(tried))
    record = read_json(output / RESULTS)
    found = verdict(record)
    say(tables.verdict(found), "green" if found.holds else None)
    best = max((one.sparsity for one in tried if one.holds), default=None)
    then, made = f"causalprune report {shlex.quote(str(output))}", None
    if best is None:
        say(f"no sparsity keeps {keep:g} of all that decides\nnext: {then}")
    else:
        name = label(parse_method(method.method, best))
        how = "by intervals" if certain else "by the values (--certain asks their intervals)"
        say(f"{name} keeps {keep:g} of all that decides, {how}; all results: {output / RESULTS}")
        if (made := outcome_of(record, output, name, then)) is not None:
            say(tables.outcome(made))
    document(
        as_json, method=method.method, sparsity=best, tried=tried, results=output / RESULTS, outcome=made
    )


@app.command()
@grouped
def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint written by causalprune, or made from one: a folder, or a GGUF file."
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="The pruned checkpoint that FOLDER was made from (fine-tuned, merged)."),
    ] = None,
    loading: opt.LoadingOptions = opt.LoadingOptions(device="cpu"),
    as_json: AsJson = False,
) -> None:
    """Recount the zeros of a checkpoint and compare its files with the manifest; exit code 1 if zeros were lost, not for a file that changed.

    Zeros of a GGUF file are those that come out of its types, compared with what was there before it was quantised.
    """
    from causalprune.checkpoints import verify as check
    from causalprune.cli import tables
    from causalprune.shipping import verify_file

    if folder.suffix == ".gguf":
        with voice.stage("counting zeros") as progress:
            report = verify_file(folder, against, trust=loading.trust_remote_code, progress=progress)
    else:
        report = check(folder, against=against, **asdict(loading))
    console.print(tables.verification(report), soft_wrap=True, highlight=False, markup=False)
    document(as_json, **vars(report), ok=report.ok, sparsity_holds=report.sparsity_holds)
    if not report.sparsity_holds:
        raise typer.Exit(1)


@app.command()
@grouped
def reapply(
    pruned: Annotated[Path, typer.Argument(help="A checkpoint written by causalprune: where the zeros are.")],
    model: Annotated[Path, typer.Argument(help="The same model after fine-tuning or merging, as a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint with its zeros.")],
    loading: opt.LoadingOptions = opt.LoadingOptions(device="cpu"),
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Set what is zero in PRUNED to zero in MODEL again, after adapters were merged or zeros were lost in training."""
    from causalprune.checkpoints import reapply as restore

    restored = restore(pruned, model, output, overwrite=overwrite, **asdict(loading))
    say(f"{restored:,} weights set back to zero\nsaved: {output}")
    document(as_json, saved=output, restored=restored)


def _sparsity(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"sparsity must be a number between 0 and 1 such as 0.2, not {text!r}") from None
