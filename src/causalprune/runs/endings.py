"""What came of a command, in numbers: sizes, zeros, speed, and the command to go on with."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalprune.calibration import OWN, OWN_TEXT, TEXT_SOURCES, is_file
from causalprune.checkpoints import MANIFEST, read_manifest
from causalprune.core import Size, Speed
from causalprune.models import read_shape
from causalprune.reports import CHECKPOINTS, Verdict
from causalprune.runs.cells import ADDED
from causalprune.runs.recipe import CalibrationSpec, ModelSpec, Recipe
from causalprune.runs.rows import is_removal, parse_method, writes_own

READ = ("seed", "max_tokens", "chat", "thinking", "turns", "fold_system")
"""Options that say how data are read, which a command on the same data repeats."""
LOADED = ("date", "trust_remote_code")
"""Options of a model that a checkpoint of it takes too."""


@dataclass(frozen=True)
class Outcome:
    """A model that a command made, beside the one it was made from.

    `zeros` are counted among its `weights`, the prunable ones. `speed` is None where it was not measured: where `before` is
    `after`, it is the dense model's. `checkpoint` is its folder, None where none was kept; `then` a command to go on with.
    """

    before: Size
    after: Size
    weights: int
    zeros: int
    speed: Speed | None
    checkpoint: str | None
    then: str


def outcome(checkpoint: Path, beside: Sequence[str] = ()) -> Outcome:
    """Return what is in a checkpoint that was just made, from its manifest; words `beside` go with the next command."""
    record = read_manifest(checkpoint)
    run, counts = record["run"], record["sparsity"]
    about = run.get("shrink") or run
    size, speed = about.get("size"), about.get("speed")
    before, after = (Size(**size[key]) if size else _on_disk(checkpoint) for key in ("before", "after"))
    then = evaluating(checkpoint, _task((run.get("calibration") or {}).get("sources") or ()), beside)
    found = counts["weights"], counts["zeros"]
    return Outcome(before, after, *found, Speed(**speed) if speed else None, str(checkpoint), then)


def outcome_of(record: Mapping[str, Any], folder: Path, label: str | None, then: str) -> Outcome | None:
    """Return what came of a row of a run; None where it is not there, or an older release did not note its size."""
    rows = {row["label"]: row for row in record["rows"]}
    row, dense = rows.get(label or ""), rows.get("dense", {})
    if row is None or not {"parameters"} <= row.keys() & dense.keys():
        return None
    before, after = (Size(own["parameters"], own["bytes"]) for own in (dense, row))
    speed = Speed(**row["speed"]) if row.get("speed") else None
    kept, found = _kept(folder, label), (row["pruned"]["weights"], row["pruned"]["zeros"])
    return Outcome(before, after, *found, speed, str(kept) if kept else None, then)


def next_command(
    record: Mapping[str, Any], folder: Path, verdict: Verdict, data_dir: Path | None = None
) -> str:
    """Return the command that goes on from a run: measure what its verdict lacks, make a smaller model, or look for less."""
    kept, recipe = _kept(folder, verdict.label), record["recipe"]
    answers = _options(recipe, ("answer", "max_new_tokens"), Recipe)
    if kept and not verdict.holds and verdict.measure is not None:
        wanted = {**recipe["calibration"], "seed": recipe["seed"]}  # by which problems are measured
        return evaluating(kept, verdict.measure, [*reading(wanted, recipe["model"], data_dir), *answers])
    if not verdict.holds:
        named = [r for r in record["rows"][0]["results"] if not r["description"].get(ADDED)]
        found = {result["task"]: result["description"].get("limit") for result in named}
        tasks = (f"{task}:{limit}" if limit else task for task, limit in found.items())
        on = [word for task in tasks for word in ("--on", task)]
        on += [word for scorer in recipe["scorers"] for word in ("--scorer", scorer)]
        return _again(record, "sweep", folder / "sweep", data_dir, *on, *answers)
    if not any(row.get("removed") for row in record["rows"]):
        return _again(record, "shrink", folder / "smaller", data_dir, "--parameters", "0.2")
    return shlex.join(["causalprune", *(("verify", str(kept)) if kept else ("report", str(folder)))])


def _kept(folder: Path, label: str | None) -> Path | None:
    """Return where the checkpoint of a row is, if it was kept."""
    checkpoint = folder / CHECKPOINTS / (label or "")
    return checkpoint if (checkpoint / MANIFEST).exists() else None


def evaluating(checkpoint: Path, task: str, beside: Sequence[str] = ()) -> str:
    """Return the command that measures a checkpoint on a task."""
    output = checkpoint.with_name(f"{checkpoint.name}.json")
    return shlex.join(["causalprune", "evaluate", str(checkpoint), "--on", task, "-o", str(output), *beside])


def reading(wanted: Mapping[str, Any], model: Mapping[str, Any], data_dir: Path | str | None) -> list[str]:
    """Return what a command says to read the same data in the same way, with a checkpoint of the same model."""
    words = [] if data_dir is None else ["--data-dir", str(data_dir)]
    return [*words, *_options(wanted, READ, CalibrationSpec), *_options(model, LOADED, ModelSpec)]


def _options(own: Mapping[str, Any], names: Iterable[str], of: type[Any]) -> list[str]:
    """Return as words of a command those fields of a part of a recipe that are not its defaults."""
    plain, words = {f.name: f.default for f in dataclasses.fields(of)}, list[str]()
    for name in names:
        if (value := own.get(name, plain[name])) != plain[name]:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def _again(record: Mapping[str, Any], command: str, output: Path, data_dir: Path | None, *own: str) -> str:
    """Return a command on the model and the calibration data of a run."""
    model, sources = record["recipe"]["model"], record["calibration"]["sources"]
    words = ["causalprune", command, model["name"], "-o", str(output), *own]
    preserved = record["calibration"].get("preserve", ())
    for source, count in sources.items():
        words += ["--preserve" if source in preserved else "-t", f"{source}:{count}"]
    if not preserved and OWN_TEXT not in sources and _writes(record["recipe"]):
        words += ["--preserve", "none"]
    words += reading(record["recipe"]["calibration"], {}, data_dir)
    _, *fields = (own.name for own in dataclasses.fields(ModelSpec))
    return shlex.join([*words, *_options(model, fields, ModelSpec)])


def _writes(recipe: Mapping[str, Any]) -> bool:
    """Tell whether a recipe preserves text of the model's own where it does not say otherwise."""
    return any(is_removal(text) or writes_own(parse_method(text)) for text in recipe["methods"])


def _task(sources: Iterable[str]) -> str:
    """Return a task that measures what a model was calibrated on, on other examples; a file's other part may have any name."""
    name = next((source.removeprefix(OWN) for source in sources), "gsm8k")
    if name in (OWN_TEXT, *TEXT_SOURCES):
        return f"{name}_ppl" if name == OWN_TEXT else f"{name}_ppl:40000"
    if not is_file(name):
        return f"{name}_nll:200"
    folder, slash, own = name.rstrip("/").rpartition("/")
    other = f"{folder}{slash}{own.replace('train', 'test')}"  # a path would lose the ./ of a folder
    there = "train" in own and Path(other).expanduser().exists()
    return f"{other if there else 'TEST.jsonl'}_nll"


def _on_disk(checkpoint: Path) -> Size:
    """Return the size of a checkpoint that was pruned from file to file."""
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return Size(read_shape(str(checkpoint))[2], size)
