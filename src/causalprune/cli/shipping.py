"""Commands that make files to ship."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from causalprune.cli import options as opt
from causalprune.cli.groups import grouped
from causalprune.cli.options import app
from causalprune.cli.output import AsJson, document, say

if TYPE_CHECKING:
    from causalprune.shipping import Importance


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

    def importance(self, model: str, running: opt.RunningOptions) -> "Importance | None":
        """Return the importance matrix of a model; None where no example is named."""
        from causalprune.runs import ModelSpec, prepared
        from causalprune.shipping import importance

        if not self.task:
            return None
        options = running.options(self.reading.data_dir)
        decoder, calibration = prepared(ModelSpec(model), self.spec(1), options)
        with options.stage("importance of inputs") as progress:
            return importance(decoder, calibration, progress)


@dataclass(frozen=True)
class FileOptions:
    """How the file is made."""

    panel: ClassVar[str] = "File"

    gguf: Annotated[
        str,
        typer.Option(
            "--gguf",
            help="Type of the weights, or mix of types as llama.cpp chooses them: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, "
            "q4_0, iq4_xs, q3_k_m, q2_k, …",
        ),
    ] = "q4_k_m"
    pre_tokenizer: Annotated[
        str,
        typer.Option(
            help="How texts are cut before merges, by llama.cpp's name for it (gpt-2, llama-bpe, qwen2, …): where its converter "
            "does not know the tokenizer."
        ),
    ] = ""
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Load the file in llama.cpp, and compare its tokens with the checkpoint's.",
        ),
    ] = True
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
    running: opt.RunningOptions,
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

    how = Exporting(file.pre_tokenizer, file.trust_remote_code, overwrite, file.check)
    folder, mix = Path(resolve(checkpoint)).expanduser(), file.gguf.lower()
    check_export(folder, output, mix, how)
    weights = data.importance(checkpoint, running)
    stage = running.options().stage
    made = written_as(folder, output, mix, weights, how, stage)
    say(tables.shipped(made))
    zeros = {"zeros": made.zeros, "zeros_before": made.zeros_before, "zeros_kept": made.kept}
    document(as_json, saved=made.file, mix=mix, bytes=made.bytes, **zeros, tensors=made.matrices)
