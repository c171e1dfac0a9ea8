"""Commands that make files to ship."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, document, say, voice
from causalprune.core import OptionError, unknown

if TYPE_CHECKING:
    from causalprune.shipping import Importance, Limit


@dataclass(frozen=True)
class WeighingOptions(opt.CalibrationOptions):
    """Which examples say what matters in a matrix that is quantised."""

    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            help="What the importance matrix comes from: the inputs of every matrix on these examples (gsm8k:64, a file, …; "
            "repeatable). Without it there is none, as iq3_xxs, iq3_xs and q2_k_s need.",
        ),
    ] = field(default_factory=list)
    n: Annotated[int, typer.Option("-n", help="Examples of a source that does not say it.", min=1)] = 64

    def importance(self, model: str, *, trust: bool) -> "Importance | None":
        """Return the importance matrix of a model, whose code runs with `trust`; None where no example is named."""
        from causalprune.runs import ModelSpec, Options, prepared
        from causalprune.shipping import importance

        if not self.task:
            return None
        options = Options(self.reading.data_dir, stage=voice.stage)
        spec = ModelSpec(model, trust_remote_code=trust)
        decoder, calibration = prepared(spec, self.spec(1), options)
        with options.stage("importance of inputs") as progress:
            return importance(decoder, calibration, progress)


@dataclass(frozen=True)
class CuttingOptions:
    """How the file's tokenizer cuts texts."""

    panel: ClassVar[str] = "File"

    pre_tokenizer: Annotated[
        str,
        typer.Option(
            help="How texts are cut before merges, by llama.cpp's name for it (gpt-2, llama-bpe, qwen2, …): where its converter "
            "does not know the tokenizer."
        ),
    ] = ""


@dataclass(frozen=True)
class FileOptions(CuttingOptions):
    """How the file is made."""

    gguf: Annotated[
        str,
        typer.Option(
            "--gguf",
            help="Type of the weights, or mix of types as llama.cpp chooses them: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, "
            "q4_0, iq4_xs, q3_k_m, q2_k, …",
        ),
    ] = "q4_k_m"
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Load the file in llama.cpp, and compare its tokens with the checkpoint's.",
        ),
    ] = True
    uneven: Annotated[
        bool,
        typer.Option(
            "--uneven",
            help="Leave out neurons and KV groups that are zero as a whole, layer by layer: dense Llamas, which llama.cpp runs as deci.",
        ),
    ] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint's tokenizer.")
    ] = False


@app.command()
@grouped
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, or `embedded`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file that is written, as model.gguf.")],
    file: FileOptions,
    data: WeighingOptions,
    overwrite: opt.Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a GGUF file, which llama.cpp, Ollama and LM Studio run; needs causalprune[ship].

    Quantised by llama.cpp's own code, its tokenizer and chat template inside. Says which zeros are left.
    """
    from causalprune.checkpoints import resolve
    from causalprune.cli import tables
    from causalprune.shipping import Exporting, check_export
    from causalprune.shipping import export as written_as

    how = Exporting(file.pre_tokenizer, file.trust_remote_code, overwrite, file.check, file.uneven)
    mix = file.gguf.lower()
    with voice.stage("finding the model"):
        folder = Path(resolve(checkpoint)).expanduser()
    check_export(folder, output, mix, how)
    weigh = partial(data.importance, checkpoint, trust=file.trust_remote_code)
    made = written_as(folder, output, mix, weigh, how, voice.stage)
    say(tables.shipped(made))
    zeros = {"zeros": made.zeros, "zeros_before": made.zeros_before, "zeros_kept": made.kept}
    document(as_json, saved=made.file, mix=mix, bytes=made.bytes, **zeros, tensors=made.matrices)


@dataclass(frozen=True)
class LimitOptions:
    """What the file has to meet: one of three."""

    panel: ClassVar[str] = "Limit"

    size: Annotated[
        str | None, typer.Option(help="The file has at most so many bytes: 400MB (10⁶ bytes), 1.5GB.")
    ] = None
    speed: Annotated[
        str | None,
        typer.Option(
            help="It writes so many times as fast as the whole model at Q8_0, in llama.cpp here: 1.5x."
        ),
    ] = None
    keep: Annotated[
        float | None,
        typer.Option(
            help="It keeps this share of dense's likelihood per token, or of the problems that it solves."
        ),
    ] = None

    def limit(self) -> "Limit":
        """Return the one that is named."""
        from causalprune.shipping import limit_of

        return limit_of(self.size, self.speed, self.keep)


@dataclass(frozen=True)
class TriedOptions:
    """What is tried."""

    panel: ClassVar[str] = "Method"

    types: Annotated[str, typer.Option(help="Types and mixes of llama.cpp that are tried, by commas.")] = (
        "q8_0,q6_k,q5_k_m,q4_k_m,iq4_xs,q3_k_m,q2_k"
    )
    shares: Annotated[
        str,
        typer.Option(help="Shares of all parameters that go, tried in turn as long as they pay, by commas."),
    ] = "0.1,0.2,0.3,0.4,0.5"
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="A checkpoint of the model that smaller ones come from, already pruned or smaller: tried as it is where it lacks "
            "parameters (zeros alone make no file smaller), and `--shares` of its parameters go. The model itself stays what all are compared with.",
        ),
    ] = None
    update: Annotated[
        Literal["none", "obs", "refit", "distill", "adam"],
        typer.Option(help="Makes up for what goes: distill (refit, then training), refit, obs, or none."),
    ] = "distill"

    def tried(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return types and shares; raises `OptionError` for what is none."""
        from causalprune.shipping import MIXES

        types = tuple(name.strip().lower() for name in self.types.split(",") if name.strip())
        for name in types:
            if name not in MIXES:
                raise unknown("GGUF type", name, MIXES)
        try:
            shares = tuple(sorted(float(share) for share in self.shares.split(",") if share.strip()))
        except ValueError as error:
            raise OptionError(f"shares are numbers by commas, as 0.1,0.2, not {self.shares!r}") from error
        if not types or not all(0 < share < 1 for share in shares):
            raise OptionError("name one type at least, and shares above 0 and below 1")
        return types, shares


@app.command()
@grouped
def fit(
    *,
    model: opt.ModelOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; a stopped search goes on there.")],
    on: Annotated[
        str, typer.Option("--on", help="The one measure that decides, as gsm8k_nll:200 or gsm8k_answers:200.")
    ],
    limit: LimitOptions,
    data: opt.MixedOptions = opt.MixedOptions(n=48),
    method: TriedOptions,
    answers: opt.AnswerOptions,
    file: CuttingOptions,
    running: opt.RunningOptions,
    as_json: AsJson = False,
) -> None:
    """Find the file to ship: the best GGUF file of a model for a task within a limit on size, speed or loss; needs causalprune[ship].

    Tries types of llama.cpp and smaller models, predicts before it measures, chooses by one half of the problems and reports
    the other. Writes model.gguf, frontier.json and frontier.html. That no pruning is best is an answer too.
    """
    from causalprune.cli import tables
    from causalprune.evaluation import load_scorers
    from causalprune.reports import found
    from causalprune.runs import Asked
    from causalprune.runs import fit as fitted
    from causalprune.shipping import Exporting

    types, shares = method.tried()
    wanted = data.spec(1).settled(own=True)
    settings = wanted.settings(
        data.reading.data_dir,
        answer=answers.answer,
        max_new_tokens=answers.max_new_tokens,
        scorers=load_scorers(answers.scorer),
        batch_tokens=running.batch_tokens,
    )
    how = Exporting(file.pre_tokenizer, model.loading.trust_remote_code)
    asked = Asked(limit.limit(), on, settings, types, shares, method.update, how, method.start)
    made = fitted(model.spec(), wanted, output, asked, running.options(data.reading.data_dir))
    for line in found(made.record):
        say(line)
    say(f"saved: {made.file}\nmodel: {made.checkpoint}\n{tables.runs_in(made.file)}")
    document(as_json, saved=made.file, checkpoint=made.checkpoint, **made.record)
