"""The app, its console, and options that several commands share: type, name and help, written once."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

app = typer.Typer(
    help="Prune language models by what their parts are measured to do for a task, and see what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
console = Console()

Model = Annotated[
    str, typer.Argument(help="Hub name, local folder, GGUF file, or `embedded` (SmolLM2-135M-Instruct).")
]
Revision = Annotated[str | None, typer.Option(help="Revision on the Hub.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model with accelerate: auto, balanced, sequential, or a map of modules as JSON."
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the model.")]
Pickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read weights that are there as a pickle only: it could run code."),
]
MODEL = {
    "model": (Model, inspect.Parameter.empty),
    "revision": (Revision, None),
    "dtype": (Dtype, "auto"),
    "device": (Device, "cpu"),
    "device_map": (DeviceMap, None),
    "trust_remote_code": (Trust, False),
    "allow_pickle": (Pickle, False),
}
"""Annotations and defaults of what names a model, in the order of the fields of `ModelSpec`."""


def of_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `MODEL` in place of its first parameter, which gets the `ModelSpec`."""

    @functools.wraps(command)
    def called(**given: Any) -> None:
        from causalprune.runs import ModelSpec

        command(ModelSpec(*(given.pop(name) for name in MODEL)), **given)

    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in MODEL.items()
    ]
    own = [p.replace(kind=p.kind.KEYWORD_ONLY) for p in inspect.signature(command).parameters.values()]
    parameters = [named[0], *own[1:], *named[1:]]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


Task = Annotated[
    list[str],
    typer.Option(
        "--task",
        "-t",
        help="Calibration data: gsm8k, strategyqa, arc_challenge, wikitext2, c4, gsm_symbolic, "
        "or a JSONL file of {prompt, target}; repeat for a mix; `gsm8k:32` fixes a count; "
        "`own:gsm8k` takes the model's own answers instead of worked solutions.",
    ),
]
Objective = Annotated[
    Literal["task", "balanced"],
    typer.Option(
        help="task: calibrate on the task alone; balanced: a quarter of the examples is general text (WikiText-2), "
        "which protects other abilities."
    ),
]
General = Annotated[
    float | None, typer.Option(help="Share of the examples that is general text, in place of --objective.")
]
METHODS = (
    "causal, sparsegpt, wanda, fisher, magnitude, cap or random. A scope says among which weights scores are compared: "
    "row, matrix or global, as in magnitude:global, or a pattern as in wanda:2:4. +graded measures which layers can lose more "
    "(+uniform: all lose the same). An update lets kept weights make up for the others: +obs column by column, +refit by least "
    "squares, +distill by training after that (minutes, 20 bytes a weight), +none. causal has graded budgets and distill of its own. "
    "causal:2:4+graded at a sparsity below 0.5 lets the matrices stay dense that the task needs most."
)
Damping = Annotated[
    float,
    typer.Option(
        help="What SparseGPT, causal and +obs add to the diagonal of the inputs' second moments, as a share of its mean; "
        "more where an error asks for it."
    ),
]
MethodName = Annotated[str, typer.Option(help=METHODS)]
MethodOrOwn = Annotated[
    str | None, typer.Option(help=f"{METHODS} Default: causal, or cap where --effects are given.")
]
N = Annotated[
    int,
    typer.Option("-n", help="Number of calibration examples, unless every source says it (gsm8k:32).", min=1),
]
Subsets = Annotated[
    int,
    typer.Option(help="Disjoint subsets K of the calibration set: CAP takes a median over them.", min=1),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
MaxTokens = Annotated[int, typer.Option(help="Longer examples are left out, and counted.", min=2)]
Chat = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="Chat template: auto (if the tokenizer has one), on, off."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="CAUSALPRUNE_DATA", help="Local data folder instead of the Hub, a folder for each data set."
    ),
]
BatchTokens = Annotated[int, typer.Option(help="Tokens in one forward pass; not of generation.", min=1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="From file to file, without loading the model (local folder): matrix by matrix, or layer by layer where "
        "a method looks at inputs or updates weights. Not for causal, fisher, +graded, +distill, or scope global with inputs.",
    ),
]
HiddenGib = Annotated[
    float,
    typer.Option(
        "--cache-gib",
        help="With --stream: memory for hidden states of the calibration data; the rest is kept on disk.",
        min=0,
    ),
]


Units = Annotated[
    list[str],
    typer.Option(
        help="heads, kv_groups, attention, mlp, neurons:64 (groups of 64; neurons:64:effect: of similar effect), "
        "experts or layers; repeatable."
    ),
]
EffectName = Annotated[
    Literal["ce", "kl"],
    typer.Option(help="Rise of the cross-entropy, or KL divergence from the intact model (less noisy)."),
]
AblationName = Annotated[
    Literal["zero", "mean", "resample"],
    typer.Option(help="What takes the place of a removed unit; resample: what another example has there."),
]
EstimatorName = Annotated[
    Literal["exact", "gradient", "adaptive"] | None,
    typer.Option(help="exact (default), gradient (a few passes in all), adaptive (default with a budget)."),
]
Budget = Annotated[
    str | None, typer.Option(help="Cost: `20x` is a twentieth of a whole pass per unit and example.")
]
Shard = Annotated[
    str | None,
    typer.Option(
        help="`2/4` does the second quarter of the jobs: for machines side by side, joined by `merge`."
    ),
]
Executor = Annotated[
    Literal["serial", "ray"],
    typer.Option(help="ray: spread the jobs over processes or machines (needs causalprune[ray])."),
]
Workers = Annotated[int, typer.Option(help="Processes of the executor `ray`, each with a model.", min=1)]
Address = Annotated[
    str | None, typer.Option(help="A running Ray cluster, as auto; else one on this machine.")
]
UntilCertain = Annotated[
    bool, typer.Option("--until-certain", help="Stop when the top fifth of the units is settled at 95 %.")
]
CacheGib = Annotated[
    float, typer.Option(help="Memory for inputs of layers; what does not fit is computed again.", min=0)
]

SHARES = {"task": 0.0, "balanced": 0.25}


def general_share(objective: str, general: float | None) -> float:
    """Return the share of general text that the two options ask for."""
    return SHARES[objective] if general is None else general


FewerParameters = Annotated[
    float | None,
    typer.Option("--parameters", help="Share of all parameters that goes, taken from MLP neurons."),
]
FewerNeurons = Annotated[
    float, typer.Option("--neurons", help="Share of the MLP neurons of every layer that goes.")
]
FewerGroups = Annotated[
    float,
    typer.Option(
        "--kv-groups", help="Share of the KV heads of every layer that goes, with their query heads."
    ),
]
FewerExperts = Annotated[
    float, typer.Option("--experts", help="Share of the experts of every layer that goes.")
]
FewerLayers = Annotated[float, typer.Option("--layers", help="Share of the layers that goes.")]
By = Annotated[
    Literal["effect", "activation", "magnitude", "random"],
    typer.Option(
        help="What units are worth: effect (on the task), activation (for experts as REAP ranks them; not for layers), "
        "magnitude or random."
    ),
]
Update = Annotated[
    Literal["none", "obs", "refit", "distill"],
    typer.Option(help="What stays makes up for what goes: refit, distill after that, obs, or none."),
]
