"""The cells of a comparison: a model is pruned and measured, and every finished task is on disk before the next."""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from causalprune import checkpoints, models
from causalprune.checkpoints import (
    MANIFEST,
    count_zeros,
    describe,
    read_manifest,
    round_as_written,
)
from causalprune.core import (
    Calibration,
    CausalPruneError,
    Decoder,
    Effects,
    EvalResult,
    Ledger,
    Size,
    Stage,
    forget,
    peak_bytes,
    say,
    size_of,
)
from causalprune.evaluation import AND, Row, Settings, decoded, evaluate, kept_rows, together
from causalprune.models import fingerprint
from causalprune.pruning import Method, begun, manifest, prune
from causalprune.reports import CHECKPOINTS, achieved
from causalprune.runs.keeping import for_good, keep, let_go
from causalprune.runs.recipe import ModelSpec, Recipe
from causalprune.runs.rows import SHRINK, Cell, Removal
from causalprune.runs.timing import speeds
from causalprune.shrinking import leftovers, shrink

ADDED = "added"
"""In the description of a result: nobody named its task, so that it is shown, and decides nothing."""


def load(spec: ModelSpec) -> Decoder:
    """Load the model that a recipe or the command line names."""
    arguments = asdict(spec)
    return checkpoints.load(arguments.pop("name"), **arguments)


def outlined(spec: ModelSpec) -> Decoder:
    """Return what can be pruned in the model that the command line names, from its configuration alone."""
    name = checkpoints.resolve(spec.name)
    own = models.outlined(name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    return dataclasses.replace(own, name=spec.name)


def load_intact(spec: ModelSpec) -> Decoder:
    """Load the model that a run compares others with: whatever it was made from, here it is the intact one."""
    return dataclasses.replace(load(spec), base=None)


def loaded(spec: ModelSpec, checkpoint: Path | None) -> Decoder:
    """Load what was made of the intact model, or that itself where nothing is."""
    if checkpoint is None:
        return load_intact(spec)
    return load(dataclasses.replace(spec, name=str(checkpoint), revision=None))


def made_from(base: Decoder, decoder: Decoder) -> Decoder:
    """Return a model that was made in memory as it is when it is loaded from its checkpoint, with a fingerprint of its own."""
    round_as_written(decoder)
    origin = {"name": base.name, "fingerprint": base.fingerprint}
    return dataclasses.replace(decoder, fingerprint=fingerprint(decoder.model), base=origin)


def _to_keep(results: Sequence[EvalResult], texts: str | bool) -> list[dict[str, Any]]:
    """Return the rows of results, with `all` texts, the `answers` alone (the row of the intact model has the others), or none."""
    gone = {"all": (), "answers": ("prompts", "golds")}.get(str(texts), ("prompts", "golds", "texts"))
    for result in results:
        result.description["peak_bytes"] = peak_bytes()
    left: dict[str, Any] = dict.fromkeys(gone, ())
    return kept_rows([dataclasses.replace(result, **left) for result in results])


def _left_by(path: Path) -> tuple[Path, ...]:
    """Return where is kept what making a cell has finished."""
    return (path, *leftovers(path).values())


@dataclasses.dataclass(frozen=True)
class Cells:
    """Measures the cells of a run, one after the other, each with a freshly loaded model.

    `size` is that of the intact model; `book` holds what is finished. Tasks that nobody `named` may be impossible.
    """

    recipe: Recipe
    folder: Path
    calibration: Calibration
    effects: Effects | None
    settings: Settings
    stage: Stage
    book: Ledger
    named: tuple[str, ...]
    size: Size

    def missing(self, name: str) -> list[str]:
        """Return the tasks of a cell that are not measured yet."""
        return [task for task in self.recipe.on if f"{name}/{task}" not in self.book.rows]

    def finished(self, name: str) -> bool:
        """Tell whether all tasks of a cell are measured."""
        return not self.missing(name)

    def measure(self, name: str, method: Cell, decoder: Decoder | None, *, again: bool = False) -> None:
        """Measure what is missing of a cell, with the intact `decoder` if it is there already.

        A checkpoint that the recipe saves, or that is wanted `again`, is made where it is not there, whatever is measured.
        """
        checkpoint = self.folder / CHECKPOINTS / name
        saved = self._saved(name, checkpoint)  # stopped while it was being measured
        if not (missing := self.missing(name)) and (saved or not (again or self.recipe.saves(name))):
            return
        if saved or decoder is None:
            with self.stage(f"{name}: loading model"):
                decoder = loaded(self.recipe.model, checkpoint if saved else None)
        if isinstance(method, Removal) and not saved:
            decoder = made_from(decoder, self._shrink(name, method, decoder))
        elif isinstance(method, Method) and not saved:
            self._prune(name, method, decoder)
            decoder = made_from(decoder, decoder)
        for group in together(missing):
            for task, results in self._results(name, group, decoder).items():
                texts = self.recipe.texts and ("all" if method is None else "answers")
                self.book.append(f"{name}/{task}", _to_keep(results, texts))
        for path in _left_by(self._kept_in(name)):
            forget(path)

    def settle(self, best: str | None, rows: Sequence[Row]) -> None:
        """Write results into the cards, and let go of checkpoints that were kept only until something beat them."""
        for name in self.recipe.cells():
            checkpoint = self.folder / CHECKPOINTS / name
            if name != "dense" and self.finished(name):
                if self.recipe.saves(name):
                    for_good(checkpoint)
                elif name != best:
                    let_go(checkpoint)
                if self._saved(name, checkpoint):
                    describe(checkpoint, rows, name)

    def _results(self, name: str, group: tuple[str, ...], decoder: Decoder) -> dict[str, list[EvalResult]]:
        """Measure tasks in one pass; what nobody named has no results where the intact model cannot have any."""
        found: dict[str, list[EvalResult]] = {task: [] for task in group}
        named = any(task in self.named for task in group)
        if not named and all(self.book.rows.get(f"dense/{task}") == [] for task in group):
            return found
        try:
            with self.stage(f"{name}: {AND.join(group)}") as progress:
                results = evaluate(decoder, group, self.settings, on_progress=progress)
        except CausalPruneError as error:
            if named or name != "dense":
                raise
            warnings.warn(f"general text is not measured: {error}", stacklevel=2)
            return found
        return {task: results if len(group) == 1 else [results[at]] for at, task in enumerate(group)}

    def _kept_in(self, name: str) -> Path:
        """Return the folder of what pruning a cell has finished."""
        return self.folder / f"{name}.pruning"

    def _saved(self, name: str, checkpoint: Path) -> bool:
        """Tell whether the model of a cell that was pruned is saved, and not one of an earlier run in this folder."""
        known = f"{name}/pruned" in self.book.rows and (checkpoint / MANIFEST).exists()
        own = read_manifest(checkpoint).get("run", {}).get("calibration", {}) if known else {}
        return bool(own.get("fingerprint") == self.calibration.fingerprint)

    def _prune(self, name: str, method: Method, decoder: Decoder) -> None:
        start, left = time.perf_counter(), begun(self._kept_in(name))
        with self.stage(f"{name}: pruning") as progress:
            say(progress, note=left and f"going on with {name}: {left}")
            own = self.effects if "effects" in method.needs else None
            pruned = prune(
                decoder,
                method,
                calibration=self.calibration,
                effects=own,
                max_batch_tokens=self.recipe.batch_tokens,
                kept_in=self._kept_in(name),
                on_progress=progress,
            )
        record = {"size": dict.fromkeys(("before", "after"), asdict(self.size))}
        record |= manifest(pruned, self.calibration, own)
        self._save(name, decoder, record, keep=pruned.keep, effects=own)
        if f"{name}/pruned" not in self.book.rows:
            tokens, examples = self.calibration.description["tokens"], len(self.calibration.examples)
            passes = method.passes(len(decoder.layers), examples, tokens) * method.needs_calibration
            seconds = None if left else time.perf_counter() - start  # else of the last session alone
            cost = {"seconds": seconds, "tokens_forwarded": round(passes * tokens)}
            found = {**manifest(pruned, None, None), **achieved(decoder, pruned.keep), **cost}
            self.book.append(f"{name}/pruned", {**found, "peak_bytes": peak_bytes()})

    def _shrink(self, name: str, method: Removal, decoder: Decoder) -> Decoder:
        """Return a smaller model, timed beside the whole one where it is new."""
        start, left = time.perf_counter(), any(path.exists() for path in _left_by(self._kept_in(name)))
        side: dict[str, Any] = {"stage": lambda what: self.stage(f"{name}: {what}")}
        side["ledger"] = self._kept_in(name)
        shrunk = shrink(decoder, method.share, self.calibration, method.how, **side)
        after, seconds = size_of(shrunk.decoder), None if left else time.perf_counter() - start
        if f"{name}/pruned" not in self.book.rows:
            with self.stage(f"{name}: timing"):
                speed = speeds(decoder, shrunk.decoder)
            zeros = {k: v for k, v in count_zeros(shrunk.decoder).items() if k != "projections"}
            own = {**asdict(after), "speed": speed and asdict(speed), "seconds": seconds, **zeros}
            self.book.append(f"{name}/pruned", {**own, "peak_bytes": peak_bytes()})
        sizes = {"before": asdict(self.size), "after": asdict(after)}
        told = shrunk.options | {"size": sizes, "speed": self.book.rows[f"{name}/pruned"]["speed"]}
        self._save(name, shrunk.decoder, dataclasses.replace(shrunk, options=told).record())
        return shrunk.decoder

    def _save(self, name: str, decoder: Decoder, record: dict[str, Any], **side: Any) -> None:
        with self.stage(f"{name}: saving"):
            keep(decoder, self.folder / CHECKPOINTS / name, record, good=self.recipe.saves(name), **side)

    def row(self, name: str, method: Cell) -> dict[str, Any]:
        """Return a finished cell as a row of the table."""
        described: dict[str, Any] = {"label": name, "criterion": "dense", "scope": None, "sparsity": 0.0}
        described |= asdict(self.size)
        if isinstance(method, Method):
            described |= {"criterion": method.criterion, "scope": method.resolved_scope}
            described |= {"sparsity": method.sparsity, "pruned": self.book.rows[f"{name}/pruned"]}
        elif method is not None:
            own = self.book.rows[f"{name}/pruned"]
            described |= {"criterion": SHRINK, "removed": method.share, "pruned": own}
            described |= {key: own[key] for key in ("parameters", "bytes", "speed")}
        results = []
        for task in self.recipe.on:
            own = {} if task in self.named else {ADDED: True}
            found = decoded(self.book.rows[f"{name}/{task}"])
            results += [{**result, "description": {**result["description"], **own}} for result in found]
        return {**described, "results": results}
