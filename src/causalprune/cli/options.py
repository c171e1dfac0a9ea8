"""The app, and options that several commands share: type, name and help, written once.

A command takes a group of them as one parameter (`causalprune.cli.groups`); a group ends as what `causalprune.runs`
takes. An option that joins a group is one more field here, and reaches every command that takes the group.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from causalprune.cli.output import voice
from causalprune.core import OptionError

if TYPE_CHECKING:
    from causalprune.runs import AttributionSpec, CalibrationSpec, ModelSpec, Options

app = typer.Typer(
    help="Prune language models by what their parts are measured to do for a task, and see what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)

DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="CAUSALPRUNE_DATA", help="Local data folder instead of the Hub, a folder for each data set."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
On = Annotated[
    list[str],
    typer.Option(
        "--on",
        help="What is measured: gsm8k_nll:200, gsm8k_cot, arc_challenge:500, test.jsonl_nll, wikitext2_ppl:40000, …, and of 128 "
        "tokens that the model goes on with wikitext2_loops:200, gsm8k_rep4:100, …; repeatable. "
        "A count is one of examples, of tokens for `_ppl` and `_kl`.",
    ),
]
Subsets = Annotated[
    int,
    typer.Option(
        help="Disjoint subsets K of the calibration set: CAP takes a median over them.",
        min=1,
        rich_help_panel="Data",
    ),
]
METHODS = (
    "causal, sparsegpt, wanda, fisher, magnitude, cap, snip, relevance or random. A scope says among which weights scores are compared: "
    "row, matrix or global, as in magnitude:global, or a pattern as in wanda:2:4. +graded measures which layers can lose more. "
    "An update lets kept weights make up for the others: +obs column by column, +refit by least "
    "squares, +distill by training after that (minutes), +adam the same with two means of slopes kept for every weight, +none. causal has distill of its own. "
    "causal:2:4+graded at a sparsity below 0.5 lets the matrices stay dense that the task needs most."
)
OBJECTIVES = {"task": 0.0, "balanced": 0.25}
"""The share of general text that the old word `--objective` means."""


@dataclass(frozen=True)
class LoadingOptions:
    """How a model is loaded, by every command that does."""

    panel: ClassVar[str] = "Model"

    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[
        str, typer.Option(help="auto (CUDA where there is one, else CPU), cpu, cuda, cuda:1, …")
    ] = "auto"
    attention: Annotated[
        str,
        typer.Option(
            help="auto (the model's own, sdpa where its package is missing), eager, sdpa, flash_attention_2, …"
        ),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the model.")
    ] = False
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Read weights that are there as a pickle only: it could run code."
        ),
    ] = False


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded: the fields of `ModelSpec`."""

    panel: ClassVar[str] = "Model"

    model: Annotated[
        str, typer.Argument(help="Hub name, local folder, GGUF file, or `embedded` (SmolLM2-135M-Instruct).")
    ]
    revision: Annotated[str | None, typer.Option(help="Revision on the Hub.")] = None
    loading: LoadingOptions = field(default_factory=LoadingOptions)
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the model with accelerate: auto, balanced, sequential, or a map of modules as JSON."
        ),
    ] = None
    date: Annotated[
        str, typer.Option(help="The day that chat templates write as today, whatever the day is.")
    ] = "2026-01-01"

    def spec(self) -> "ModelSpec":
        """Return the model as runs take it."""
        from causalprune.runs import ModelSpec

        own = {"device_map": self.device_map, "date": self.date, **asdict(self.loading)}
        return ModelSpec(self.model, self.revision, **own)


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
    thinking: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            help="Whether the model thinks before it answers: auto (only if its chat template always makes it), on, off."
        ),
    ] = "auto"
    turns: Annotated[
        Literal["last", "all"],
        typer.Option(help="Targets of a chat in a file: the last turn of the assistant, or all of them."),
    ] = "last"
    fold_system: Annotated[
        bool,
        typer.Option(
            "--fold-system", help="Put a system turn before the user's, for templates that refuse it."
        ),
    ] = False
    data_dir: DataDir = None

    def spec(self, task: list[str]) -> "CalibrationSpec":
        """Return which sources are read, and how."""
        from causalprune.runs import CalibrationSpec

        return CalibrationSpec(
            tuple(task),
            seed=self.seed,
            max_tokens=self.max_tokens,
            chat=self.chat,
            thinking=self.thinking,
            turns=self.turns,
            fold_system=self.fold_system,
        )


@dataclass(frozen=True)
class CalibrationOptions:
    """Which examples the methods see."""

    panel: ClassVar[str] = "Data"

    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            help="What calibrates: gsm8k, strategyqa, arc_challenge, wikitext2, c4, gsm_symbolic, "
            "or a file (JSON, CSV, Parquet) of prompts and targets, chats or texts; repeat for a mix; `gsm8k:32` fixes a count; "
            "`own:gsm8k` takes the model's own answers instead of worked solutions.",
        ),
    ] = field(default_factory=lambda: ["gsm8k"])
    n: Annotated[
        int,
        typer.Option(
            "-n", help="Number of the task's examples, unless every source says it (gsm8k:32).", min=1
        ),
    ] = 128
    reading: ReadingOptions = field(default_factory=ReadingOptions)

    def spec(self, subsets: int = 3) -> "CalibrationSpec":
        """Return the examples as runs take them."""
        return replace(self.reading.spec(self.task), n=self.n, subsets=subsets)


@dataclass(frozen=True)
class MixedOptions(CalibrationOptions):
    """Which examples the methods see, those among them that keep what the task does not need."""

    preserve: Annotated[
        list[str],
        typer.Option(
            help="What must not get lost, as examples on top of the task's: own (text that the model writes), wikitext2, c4, any other source of --task, "
            "or none; repeat for more; `wikitext2:16` fixes a count.",
            show_default="own where a method trains or removes parts for good, else none",
        ),
    ] = field(default_factory=list)
    preserve_share: Annotated[
        float,
        typer.Option(
            help="Examples of a source of --preserve without a count, as a share of the task's; of own text its tokens."
        ),
    ] = 0.25
    objective: Annotated[Literal["task", "balanced"] | None, typer.Option(hidden=True)] = None
    general: Annotated[float | None, typer.Option(hidden=True)] = None

    def spec(self, subsets: int = 3) -> "CalibrationSpec":
        """Return the examples as runs take them; raises `OptionError` where an old word meets a new one."""
        from causalprune.runs import preserving

        own: dict[str, Any] = {
            "preserve": tuple(self.preserve) or None,
            "preserve_share": self.preserve_share,
        }
        old = "--objective" if self.general is None else "--general"
        share = OBJECTIVES.get(self.objective or "") if self.general is None else self.general
        if share is not None and self.preserve:
            raise OptionError(f"{old} is the old word for --preserve: leave one of them out")
        if share is not None:
            own |= preserving(old, share)
        return replace(super().spec(subsets), **own)


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
            help="heads, mixers (heads of linear attention and state spaces), kv_groups, attention, mlp, neurons:1 (each), "
            "neurons:64 (groups; neurons:64:effect: of similar effect), experts or layers; repeatable."
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
class AnswerOptions:
    """How answers that the model writes are measured: the fields of a recipe with these names."""

    panel: ClassVar[str] = "Answers"

    answer: Annotated[
        str | None,
        typer.Option(
            help="How answers to problems of a file (FILE_answers) are read: number, number_comma (1.234,5), yes_no, "
            "letter, text or regex:PATTERN (the first group of its last match). Default: as its targets end."
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest answer; default 512, and 4096 for a model that thinks, or what fits its positions.",
            show_default=False,
            min=1,
        ),
    ] = None
    scorer: Annotated[
        list[str],
        typer.Option(
            help="NAME=module:function makes SOURCE_NAME a measure: called with texts and targets (or None), it returns a "
            "number for each; more is better, unless function.higher_is_better is False. It is code, and is run; repeatable."
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class RunningOptions:
    """How the work is done."""

    panel: ClassVar[str] = "Running"

    batch_tokens: Annotated[
        int, typer.Option(help="Tokens in one forward pass; not of generation.", min=1)
    ] = 2048

    def options(self, data_dir: Path | str | None = None, *, overwrite: bool = False) -> "Options":
        """Return how the work is done as runs take it."""
        from causalprune.runs import Options

        return Options(data_dir, self.batch_tokens, overwrite, voice.stage)


@dataclass(frozen=True)
class HubOptions:
    """Where the checkpoint goes besides its folder."""

    panel: ClassVar[str] = "Hub"

    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Repository on the Hugging Face Hub (owner/name) that gets the checkpoint too; it is made, private."
        ),
    ] = None
    public: Annotated[bool, typer.Option("--public", help="Everybody may see that repository.")] = False

    def reserve(self, output: Path, overwrite: bool) -> str | None:
        """Make the repository, if one is asked for, before the long work, and return its name."""
        from causalprune.checkpoints import check_destination, reserve

        if self.public and self.push_to_hub is None:
            raise OptionError("--public is about --push-to-hub: name a repository there, or leave it out")
        if self.push_to_hub is None:
            return None
        check_destination(output, overwrite)
        return reserve(self.push_to_hub, public=self.public, overwrite=overwrite)
