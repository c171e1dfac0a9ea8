"""The command that takes out of a model what it should not do."""

import math
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, console, document, say
from causalprune.core import OptionError, spoken

if TYPE_CHECKING:
    from causalprune.correction import Contrast


@dataclass(frozen=True)
class UndesiredOptions:
    """What the model should not do, and what is to stay."""

    panel: ClassVar[str] = "Samples"

    behaviour: Annotated[
        str | None,
        typer.Option(
            help="What texts of the model's own are looked through for: loops, rep4 (repeated 4-grams), phrases:list.txt (one a line), "
            "or module:function, which scores texts (as profanity_check:predict_prob of alt-profanity-check); that is code, and is run."
        ),
    ] = None
    prompts: Annotated[
        list[str],
        typer.Option(
            help="What the model goes on from: wikitext2:200 (the first 32 tokens of texts), gsm8k:100, a file of prompts, …; repeatable.",
            show_default="wikitext2:200",
        ),
    ] = field(default_factory=list)
    undesired: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts and targets that should not be said, with `instead` what should be; in place of a behaviour."
        ),
    ] = None
    bar: Annotated[
        float | None, typer.Option(help="Value from which on a text shows the behaviour.", show_default="0.5")
    ] = None
    new_tokens: Annotated[int, typer.Option(help="Tokens that the model goes on with.", min=8)] = 128
    preserve: Annotated[
        list[str],
        typer.Option(
            help="What is to stay: wikitext2, c4, own (text that the model writes), gsm8k, a file, … or none; `wikitext2:24` fixes a "
            "count; repeatable. Clean texts of the model's own are added."
        ),
    ] = field(default_factory=lambda: ["wikitext2:24", "gsm8k:48"])
    window: Annotated[int, typer.Option(help="Tokens of a window of text that is to stay.", min=8)] = 1024


@dataclass(frozen=True)
class ContrastOptions:
    """Which parts go, how many, and what is done about it."""

    panel: ClassVar[str] = "Method"

    units: Annotated[
        list[str],
        typer.Option(help="neurons:1 (each), heads, kv_groups, experts, …, as everywhere; repeatable."),
    ] = field(default_factory=lambda: ["neurons:1"])
    weights: Annotated[bool, typer.Option("--weights", help="Single weights in place of units.")] = False
    budget: Annotated[str, typer.Option(help="How many go at most: a share as 0.3%, or a number as 100.")] = (
        "0.3%"
    )
    harm: Annotated[
        str,
        typer.Option(
            help="How much the loss of each source that is to stay may rise, measured: 1% of perplexity, or 0.01nats; of clean texts of "
            "the model's own their divergence counts."
        ),
    ] = "1%"
    certain: Annotated[
        bool, typer.Option("--certain", help="The upper end of the rise's 95 % interval counts.")
    ] = False
    score: Annotated[
        Literal[
            "contrast", "difference", "magnitude", "random", "set-difference", "ratio", "dampening", "onset"
        ],
        typer.Option(
            help="contrast: benefit per harm. The others are there to compare with: the difference of Hatefi et al., magnitude, random, "
            "set-difference (Wei et al.), ratio of activations, dampening (Fisher ratio), onset of repetition."
        ),
    ] = "contrast"
    estimator: Annotated[
        Literal["gradient", "integrated", "relevance"],
        typer.Option(
            help="gradient (at an open gate), integrated (at five gates, for units that outweigh all else; five times the cost on undesired "
            "samples), or relevance (AttnLRP; LRP is patented, and whether that matters is yours to judge)."
        ),
    ] = "gradient"
    rounds: Annotated[
        int,
        typer.Option(
            help="Rounds of scoring, each with those closed that are chosen by then; units by contrast are chosen anew in each, and may come back.",
            min=1,
        ),
    ] = 3
    damp: Annotated[
        float, typer.Option(help="What is left of what units send: 0 sets them to zero, 0.5 halves it.")
    ] = 0.0
    update: Annotated[
        Literal["none", "refit", "distill"],
        typer.Option(
            help="What stays makes up for what goes, on what is to stay; that can bring the behaviour back, so it is measured after it."
        ),
    ] = "none"

    def spec(self) -> "Contrast":
        """Return how parts are chosen, as the library takes it."""
        from causalprune.correction import Contrast

        own = asdict(self) | {"units": tuple(self.units)}
        return Contrast(**own | {"budget": _budget(self.budget), "harm": _harm(self.harm)})


@app.command()
@grouped
def correct(
    *,
    model: opt.ModelOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the corrected checkpoint.")],
    samples: UndesiredOptions,
    contrast: ContrastOptions,
    reading: opt.ReadingOptions = opt.ReadingOptions(max_tokens=1024),
    running: opt.RunningOptions = opt.RunningOptions(),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that goes without weights, print what it costs.")
    ] = False,
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Take out of a model what it should not do, loops, phrases, a habit, while the rest stays as it is.

    Half of the samples chooses what goes; the other half decides how much. A stopped run goes on where it was.
    """
    from causalprune.cli import showing
    from causalprune.runs import CorrectionSpec, correct_checkpoint, planned_correction

    own = asdict(samples) | {"prompts": tuple(samples.prompts), "preserve": tuple(samples.preserve)}
    asked = CorrectionSpec(**own, contrast=contrast.spec())
    spec, wanted = model.spec(), reading.spec(["gsm8k"])
    options = running.options(reading.data_dir, overwrite=overwrite)
    if dry_run:
        jobs, seconds = planned_correction(spec, asked, output, options)
        console.print(showing.prices(jobs, seconds))
        document(as_json, plan=[asdict(job) for job in jobs], minutes=seconds / 60)
        return
    fixed = correct_checkpoint(spec, asked, wanted, output, options)
    console.print(showing.correction(fixed.corrected))
    for line in fixed.sentences:
        say(line)
    page = f"causalprune report {shlex.quote(str(output))}"
    took = "" if fixed.minutes is None else f"took {spoken(60 * fixed.minutes)}; "
    say(f"{took}saved: {output}; the page: {page}")
    found = fixed.corrected.described()
    document(as_json, saved=output, **found, sentences=fixed.sentences, minutes=fixed.minutes)


def _budget(text: str) -> float:
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = math.nan
    if not (found > 0 and (text.endswith("%") or found < 1 or found.is_integer())):
        raise OptionError(f"a budget is a share as 0.3%, or a number as 100, not {text!r}")
    if text.endswith("%") and found >= 1:
        raise OptionError(f"a budget of {text} is all there is: that is no targeted correction; ask for less")
    return found


def _harm(text: str) -> float:
    """Return harm as a share of perplexity."""
    found = math.nan
    try:
        if text.endswith("nats"):
            found = math.expm1(float(text.removesuffix("nats")))
        elif text.endswith("%"):
            found = float(text.removesuffix("%")) / 100
    except (ValueError, OverflowError):
        pass
    if found > 0:
        return found
    raise OptionError(f"harm is written as 1% of perplexity, or as 0.01nats, not {text!r}")
