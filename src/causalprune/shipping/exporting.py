"""A checkpoint as one GGUF file: converted, quantised, and its tokens compared with those of the checkpoint."""

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from causalprune.checkpoints import check_room
from causalprune.core import CheckpointError, ModelError, Stage, is_being_written, quiet, unknown
from causalprune.models import tokenizer_of
from causalprune.shipping.converting import PACKAGES, check_convertible, convert, needed
from causalprune.shipping.files import Importance, Written, file_bytes, opened, planned, quantise
from causalprune.shipping.mixtures import MIXES
from causalprune.shipping.runtime import running, same_tokens
from causalprune.shipping.uneven import Layer, compacted, cut_importance

SCRATCH = ".gguf-"
"""How the names of folders begin that a kill leaves behind in a scratch folder."""


@dataclass(frozen=True)
class Exporting:
    """How a file is made: the rule by which texts are cut, where the converter does not know it, and whether a file is replaced.

    `name` is what the file calls the model, instead of its card's or its folder's name.
    `check` loads the file in llama.cpp and compares how it cuts some texts with what the checkpoint's tokenizer does. `uneven`
    leaves out neurons and heads that are zero as a whole, of which layers may then have different numbers.
    """

    pre_tokenizer: str = ""
    trust_remote_code: bool = False
    overwrite: bool = False
    check: bool = True
    uneven: bool = False
    name: str = ""


@dataclass(frozen=True)
class Plan:
    """What a file will be: its bytes, those that no removal can spare (embeddings, norms, metadata), and the type of every tensor."""

    bytes: int
    fixed: int
    types: dict[str, str]


def check_export(folder: Path, target: Path, mix: str, how: Exporting = Exporting()) -> None:
    """Raise a `CausalPruneError` for what would fail later: a type, package or family that is none, a file that is there, a full disk."""
    if mix not in MIXES:
        raise unknown("GGUF type", mix, MIXES)
    for package in PACKAGES:
        needed(package)
    check_convertible(folder, trust_remote_code=how.trust_remote_code)
    if target.exists() and not how.overwrite:
        raise CheckpointError(f"{target} exists: --overwrite replaces it")
    if target.suffix != ".gguf":
        raise CheckpointError(f"{target} is to be a GGUF file: give it a name that ends in .gguf")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    copies = 2 + (mix == "f32") + 2 * how.uneven  # layers of their own widths are written in float32 first
    check_room(target, copies * size)


def plans(folder: Path, mixes: Iterable[str], scratch: Path, how: Exporting = Exporting()) -> dict[str, Plan]:
    """Return what a checkpoint becomes in every mix with an importance matrix, by converting it once into the folder `scratch`."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix=SCRATCH) as place:
        whole = Path(place) / "whole.gguf"
        trusted = how.trust_remote_code
        convert(folder, whole, pre_tokenizer=how.pre_tokenizer, trust_remote_code=trusted, name=how.name)
        reader = opened(whole)
        found = {mix: planned(reader, mix, weighted=True) for mix in mixes}
        return {
            mix: Plan(file_bytes(reader, types), file_bytes(reader, types, layers=False), types)
            for mix, types in found.items()
        }


def export(
    folder: Path,
    target: Path,
    mix: str,
    weigh: Callable[[], Importance | None] = lambda: None,
    how: Exporting = Exporting(),
    stage: Stage = quiet,
) -> Written:
    """Write the checkpoint in a folder as a GGUF file of a mix, with its tokenizer and chat template.

    `weigh` gives the importance matrix, and is asked once it is known that the checkpoint can be converted, and what may be left out.

    Raises:
        ModelError: llama.cpp's converter does not know the family or the tokenizer, or the file cuts texts otherwise.
        OptionError: the mix is none, or needs an importance matrix.
        CheckpointError: the file cannot be written.
    """
    check_export(folder, target, mix, how)
    target.parent.mkdir(parents=True, exist_ok=True)
    began = f".{target.name}.partial-"
    for left in target.parent.glob(f"{glob.escape(began)}*"):
        if not is_being_written(left):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
    began += f"{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=began) as scratch:
        whole, made = Path(scratch) / "whole.gguf", Path(scratch) / "made.gguf"
        with stage("converting"):
            trusted = how.trust_remote_code
            convert(folder, whole, pre_tokenizer=how.pre_tokenizer, trust_remote_code=trusted, name=how.name)
        kept: dict[int, Layer] = {}
        if how.uneven:
            with stage("leaving out what is zero"):
                kept = compacted(opened(whole), whole.with_name("uneven.gguf"))
            whole = whole.with_name("uneven.gguf")
        importance = weigh()
        importance = importance and cut_importance(importance, kept)
        with stage(f"quantising to {mix}") as progress:
            written = quantise(whole, made, mix, importance, progress)
        whole.unlink()
        if how.check:
            with stage("comparing tokens"), running(made, context=256) as run:
                other = same_tokens(run, tokenizer_of(folder, trust_remote_code=how.trust_remote_code))
            if other is not None:
                raise ModelError(
                    f"the tokenizer of {str(folder)!r} cuts {other!r} otherwise than the file does in llama.cpp: nothing is "
                    "written; --pre-tokenizer names another rule"
                )
        made.replace(target)
    return Written(target, mix, written.bytes, written.matrices, written.zeros_before)
