"""Commands that find circuits and compare them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, console, document, say, voice

if TYPE_CHECKING:
    from causalprune.runs import CircuitSpec


@dataclass(frozen=True)
class SearchOptions(opt.EffectOptions):
    """What a circuit is, and how it is looked for."""

    effect: Annotated[
        Literal["ce", "kl"] | None,
        typer.Option(
            help="kl: divergence from the intact model; ce: rise of the loss, or of its distance to a wrong answer's.",
            show_default="kl; ce for --rank signed, --ablation counterfactual, --estimator relevance",
        ),
    ] = None  # type: ignore[assignment]
    ablation: Annotated[
        Literal["zero", "mean", "resample", "counterfactual"],
        typer.Option(
            help="What takes the place of units that are out; resample: what another example has there; counterfactual: what "
            "the example's own has there, which every line of a file must have then (or -t ioi)."
        ),
    ] = "zero"
    estimator: Annotated[
        Literal["integrated", "gradient", "relevance", "exact", "adaptive"],
        typer.Option(
            help="integrated (gradients at five gates), gradient (at one), relevance (AttnLRP; LRP is patented, and whether that "
            "matters is yours to judge), exact or adaptive (both with --rescore 1)."
        ),
    ] = "integrated"
    rank: Annotated[
        Literal["absolute", "signed"],
        typer.Option(help="absolute: what the behaviour hangs on, helpful or harmful; signed: what helps."),
    ] = "absolute"
    rescore: Annotated[
        int | None,
        typer.Option(
            help="Rounds of scoring, each with the units closed that are out by then.",
            show_default="1 with --learn, exact or adaptive, else 3",
        ),
    ] = None
    learn: Annotated[
        int | None,
        typer.Option(
            help="Epochs over the problems in which units move by what circuits of all sizes lack, after scoring.",
            show_default="10 for kl and for counterfactual; none with --rescore, signed, exact, adaptive or relevance",
        ),
    ] = None
    keep: Annotated[
        float,
        typer.Option(
            help="Share of dense's likelihood per token that the circuit keeps (0.9 is 0.105 nats)."
        ),
    ] = 0.9
    controls: Annotated[
        int | None,
        typer.Option(help="Random circuits to compare with.", show_default="100 for heads, else 20", min=0),
    ] = None
    tests: Annotated[
        bool,
        typer.Option(
            "--tests", help="Test sufficiency, necessity, equivalence, independence and minimality."
        ),
    ] = False

    def asked(self, on: list[str], alone: Path | None) -> "CircuitSpec":
        """Return what is looked for, as runs take it."""
        from causalprune.attribution import Estimator, Question
        from causalprune.circuits import Checks, effect_for, turns
        from causalprune.runs import CircuitSpec

        how = Estimator(self.estimator, epochs=self.learn)
        effect = self.effect or effect_for(self.rank, how, self.ablation)
        question = Question(tuple(self.units), effect, self.ablation)
        how, rounds = turns(question, how, self.rescore, self.rank)
        return CircuitSpec(
            question,
            how,
            self.keep,
            self.rank,
            rounds,
            Checks(self.controls, tests=self.tests),
            tuple(on),
            alone,
        )


@app.command()
@grouped
def circuit(
    *,
    model: opt.ModelOptions,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for circuit.json, scores and ledger; a stopped search goes on there.",
        ),
    ],
    on: Annotated[
        list[str],
        typer.Option(
            "--on",
            help="Problems that decide about sizes, by their loss: gsm8k_nll:100, test.jsonl_nll, …; repeatable. Without, "
            "every second example of --task.",
        ),
    ] = [],  # noqa: B006 (typer copies it)
    data: opt.CalibrationOptions = opt.CalibrationOptions(n=48),
    search: SearchOptions,
    running: opt.RunningOptions,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", help="Folder for the circuit alone as a checkpoint: all other units are zeros."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the options, print what it costs, load nothing.")
    ] = False,
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find the heads, neurons or experts that carry a task, measure what they keep, and say how sure that is."""
    from causalprune.circuits import sentences
    from causalprune.cli import showing
    from causalprune.runs import find_circuit, planned_search

    asked, wanted = search.asked(on, save), data.spec(1)
    options = running.options(data.reading.data_dir, overwrite=overwrite)
    costs = planned_search(asked, wanted, output, options)
    if dry_run or search.tests:
        console.print(showing.costs(costs))
    if dry_run:
        document(as_json, plan=[{"stage": a, "problems": b, "passes": c} for a, b, c in costs])
        return
    found = find_circuit(model.spec(), wanted, output, asked, options)
    for line in found.remarks:
        say(line, "yellow")
    console.print(showing.circuit(found))
    for line in sentences(found):
        say(line)
    file = output / "circuit.json"
    say(f"circuit of {found.size:,} of {len(found.units):,} units: {file}")
    if save is not None:
        say(f"the circuit alone: {save}")
    document(as_json, circuit=file, saved=save, **showing.figures(found))


@app.command()
@grouped
def overlap(
    circuits: Annotated[list[Path], typer.Argument(help="Files or folders of circuits of one model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for overlap.json and the ledger.")],
    loading: opt.LoadingOptions,
    model: Annotated[
        str | None,
        typer.Option(help="The model that they were found in.", show_default="as the first circuit names it"),
    ] = None,
    remove: Annotated[
        int | None,
        typer.Option(help="How many of the first units of each are removed.", show_default="a tenth", min=1),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what circuits share, corrected for chance, and what removing each does to the tasks of the others."""
    from causalprune.cli import showing
    from causalprune.runs import Options, overlap_circuits

    own = {name: value for name, value in asdict(loading).items() if value != "auto"}
    own |= {"name": model, "revision": None} if model else {}
    found = overlap_circuits(circuits, output, Options(stage=voice.stage), own, remove=remove)
    for table in showing.overlap(found):
        console.print(table)
    say(f"all numbers: {output / 'overlap.json'}")
    document(as_json, overlap=output / "overlap.json", **vars(found))
