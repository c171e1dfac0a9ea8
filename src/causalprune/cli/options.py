"""The app, its console, and options that several commands share: type, name and help, written once.

A command takes a group of them as one parameter (`causalprune.cli.groups`); a group ends as what `causalprune.runs`
takes. An option that joins a group is one more field here, and reaches every command that takes the group.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from causalprune.runs import AttributionSpec, CalibrationSpec, ModelSpec, Options

app = typer.Typer(
    help="Prune language models by what their parts are measured to do for a task, and see what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
console = Console()


def say(text: str, style: str | None = None) -> None:
    """Print lines as they are: a command or a path in them can be pasted."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="CAUSALPRUNE_DATA", help="Local data folder instead of the Hub, a folder for each data set."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Subsets = Annotated[
    int,
    typer.Option(
        help="Disjoint subsets K of the calibration set: CAP takes a median over them.",
        min=1,
        rich_help_panel="Data",
    ),
]
METHODS = (
    "causal, sparsegpt, wanda, fisher, magnitude, cap or random. A scope says among which weights scores are compared: "
    "row, matrix or global, as in magnitude:global, or a pattern as in wanda:2:4. +graded measures which layers can lose more "
    "(+uniform: all lose the same). An update lets kept weights make up for the others: +obs column by column, +refit by least "
    "squares, +distill by training after that (minutes, 20 bytes a weight), +none. causal has graded budgets and distill of its own. "
    "causal:2:4+graded at a sparsity below 0.5 lets the matrices stay dense that the task needs most."
)
SHARES = {"task": 0.0, "balanced": 0.25}
"""The share of general text of each objective."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded: the fields of `ModelSpec`."""

    panel: ClassVar[str] = "Model"

    model: Annotated[
        str, typer.Argument(help="Hub name, local folder, GGUF file, or `embedded` (SmolLM2-135M-Instruct).")
    ]
    revision: Annotated[str | None, typer.Option(help="Revision on the Hub.")] = None
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu"
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the model with accelerate: auto, balanced, sequential, or a map of modules as JSON."
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the model.")
    ] = False
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Read weights that are there as a pickle only: it could run code."
        ),
    ] = False

    def spec(self) -> "ModelSpec":
        """Return the model as runs take it."""
        from causalprune.runs import ModelSpec

        given = asdict(self)
        return ModelSpec(given.pop("model"), **given)


@dataclass(frozen=True)
class ReadingOptions:
    """How texts are drawn and read, for calibration and evaluation alike."""

    panel: ClassVar[str] = "Data"

    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0
    max_tokens: Annotated[int, typer.Option(help="Longer examples are left out, and counted.", min=2)] = 512
    chat: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Chat template: auto (if the tokenizer has one), on, off."),
    ] = "auto"
    data_dir: DataDir = None


@dataclass(frozen=True)
class CalibrationOptions:
    """Which examples the methods see."""

    panel: ClassVar[str] = "Data"

    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            help="Calibration data: gsm8k, strategyqa, arc_challenge, wikitext2, c4, gsm_symbolic, "
            "or a JSONL file of {prompt, target}; repeat for a mix; `gsm8k:32` fixes a count; "
            "`own:gsm8k` takes the model's own answers instead of worked solutions.",
        ),
    ] = field(default_factory=lambda: ["gsm8k"])
    n: Annotated[
        int,
        typer.Option(
            "-n", help="Number of calibration examples, unless every source says it (gsm8k:32).", min=1
        ),
    ] = 128
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def share(self) -> float:
        """Return the share of the examples that is general text."""
        return 0.0

    def spec(self, subsets: int = 3) -> "CalibrationSpec":
        """Return the examples as runs take them."""
        from causalprune.runs import CalibrationSpec

        read = self.reading
        return CalibrationSpec(
            tuple(self.task), self.n, subsets, read.seed, read.max_tokens, read.chat, self.share()
        )


@dataclass(frozen=True)
class MixedOptions(CalibrationOptions):
    """Which examples the methods see, general text among them."""

    objective: Annotated[
        Literal["task", "balanced"],
        typer.Option(
            help="task: calibrate on the task alone; balanced: a quarter of the examples is general text (WikiText-2), "
            "which protects other abilities."
        ),
    ] = "task"
    general: Annotated[
        float | None,
        typer.Option(help="Share of the examples that is general text, in place of --objective."),
    ] = None

    def share(self) -> float:
        """Return the share of general text that the two options ask for."""
        return SHARES[self.objective] if self.general is None else self.general


@dataclass(frozen=True)
class MethodOptions:
    """How weights are chosen."""

    panel: ClassVar[str] = "Method"

    method: Annotated[
        str | None, typer.Option(help=f"{METHODS} Default: causal, or cap where --effects are given.")
    ] = None
    damping: Annotated[
        float,
        typer.Option(
            help="What SparseGPT, causal and +obs add to the diagonal of the inputs' second moments, as a share of its mean; "
            "more where an error asks for it."
        ),
    ] = 0.01


@dataclass(frozen=True)
class EffectOptions:
    """What is measured of a model."""

    panel: ClassVar[str] = "Method"

    units: Annotated[
        list[str],
        typer.Option(
            help="heads, kv_groups, attention, mlp, neurons:64 (groups of 64; neurons:64:effect: of similar effect), "
            "experts or layers; repeatable."
        ),
    ] = field(default_factory=lambda: ["heads"])
    effect: Annotated[
        Literal["ce", "kl"],
        typer.Option(help="Rise of the cross-entropy, or KL divergence from the intact model (less noisy)."),
    ] = "ce"

    def spec(self) -> "AttributionSpec":
        """Return what is measured as runs take it."""
        from causalprune.runs import AttributionSpec

        return AttributionSpec(tuple(self.units), self.effect)


@dataclass(frozen=True)
class RunningOptions:
    """How the work is done."""

    panel: ClassVar[str] = "Running"

    batch_tokens: Annotated[
        int, typer.Option(help="Tokens in one forward pass; not of generation.", min=1)
    ] = 2048

    def options(self, data_dir: Path | None = None, *, overwrite: bool = False) -> "Options":
        """Return how the work is done as runs take it."""
        from causalprune.core import shown
        from causalprune.runs import Options

        return Options(data_dir, self.batch_tokens, overwrite, shown)
