"""A whole comparison: dense and every method at every sparsity on every task, in one folder.

| file | content |
|---|---|
| `attribution.ledger` | every finished attribution job; `effects.json` when all are done |
| `results.ledger` | every finished evaluation; a run that was stopped goes on after the last one |
| `results.json` | all finished rows with per-example values: what `compare` reads |
| `checkpoints/<label>` | pruned models, if the recipe says `save: true` |
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causalprune.attribution import (
    DRAWS,
    Cluster,
    Estimator,
    Pairs,
    Passes,
    Question,
    Trial,
    described,
    fill,
    planned,
    stability,
)
from causalprune.attribution import attribute as measure
from causalprune.calibration import with_limit
from causalprune.checkpoints import EFFECTS, check_destination, describe, load_effects, save, save_effects
from causalprune.core import (
    PACKAGES,
    Calibration,
    CheckpointError,
    Decoder,
    Effects,
    EvalResult,
    Ledger,
    MismatchError,
    OptionError,
    Stage,
    git_commit,
    peak_bytes,
    quiet,
    versions,
)
from causalprune.evaluation import (
    RESULTS,
    Settings,
    check_tasks,
    evaluate,
    evaluation_contents,
    kept_rows,
    results_in,
    rows_of,
    write_json,
    write_results,
)
from causalprune.models import skeleton, tokenizer_of
from causalprune.pruning import Method, Pruned, manifest, prune
from causalprune.reports import CHECKPOINTS
from causalprune.runs.cells import Cells, load
from causalprune.runs.recipe import AttributionSpec, CalibrationSpec, ModelSpec, Recipe
from causalprune.runs.traces import calibrated
from causalprune.streaming import Seen, Streamed, check_streams, prune_stream


@dataclasses.dataclass(frozen=True)
class Options:
    """How work is done: where data lies, tokens per forward pass, whether outputs are replaced, how to report.

    `share` (i, n) does the i-th of n parts of an attribution, in files of its own; a `cluster` does its jobs.
    `cache_gib` is the memory for hidden states of a streaming run.
    """

    data_dir: Path | None = None
    batch_tokens: int = 2048
    overwrite: bool = False
    stage: Stage = quiet
    share: tuple[int, int] = (1, 1)
    cluster: Cluster | None = None
    cache_gib: float = 1.0

    def named(self, file: str) -> str:
        """Return the name of a file of this share: `effects.2-of-4.json`."""
        stem, dot, suffix = file.partition(".")
        return file if self.share[1] == 1 else f"{stem}.{self.share[0]}-of-{self.share[1]}{dot}{suffix}"


def run(
    recipe: Recipe,
    folder: Path,
    *,
    data_dir: Path | None = None,
    stage: Stage = quiet,
    command: str | None = None,
) -> dict[str, Any]:
    """Carry out a recipe in `folder`, or go on where it was stopped; return what `results.json` holds.

    `command` is what the user typed, for the record. Methods, sparsities and tasks may be added to a recipe whose folder exists: what is there is not done again.

    Raises:
        CheckpointError: the folder is a file, or cannot be written.
        MismatchError: the folder holds a run of another model, calibration, seed, damping or batch size.
    """
    settings = Settings(
        data_dir=data_dir,
        seed=recipe.seed,
        chat=recipe.calibration.chat,
        max_tokens=recipe.calibration.max_tokens,
        batch_tokens=recipe.batch_tokens,
    )
    check_tasks(recipe.tasks)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and a run needs a folder: choose another name")
    with stage("loading model"):
        decoder = load(recipe.model)
    recipe.check_shape(decoder.name, len(decoder.layers), decoder.layers[0].attention.n_heads)
    with stage("calibration data") as progress:
        exclude = evaluation_contents(recipe.tasks, settings, decoder.tokenizer)
        calibration = calibrated(decoder, recipe.calibration, data_dir, exclude, progress)
    identity = _identity(recipe, decoder, calibration)
    record: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "cells": list(recipe.cells()),
        "command": command,
        "identity": identity,
        "calibration": calibration.description,
        "versions": versions(),
        "git_commit": git_commit(),
        "attribution": None,
        "rows": [],
    }
    with Ledger(folder / "results.ledger", identity) as book:
        _note_versions(book)
        effects = _effects(recipe, decoder, calibration, folder, stage, book)
        if effects is not None:
            record["attribution"] = described(effects) | book.rows.get("attribution", {})
        cells = Cells(recipe, folder, calibration, effects, settings, stage, book)
        loaded = [decoder]
        del decoder  # one model in memory at a time
        for name, method in recipe.cells().items():
            cells.measure(name, method, loaded.pop() if method is None else None)
            record["rows"] = [cells.row(*cell) for cell in recipe.cells().items() if cells.finished(cell[0])]
            write_json(folder / RESULTS, record)
            describe(folder / CHECKPOINTS / name, rows_of(record), name)
    return record


def _identity(recipe: Recipe, decoder: Decoder, calibration: Calibration) -> dict[str, Any]:
    """Return what the rows of a run depend on, besides their method and task."""
    wanted = recipe.calibration
    return {
        "model": decoder.fingerprint,
        "calibration": calibration.fingerprint,
        "seed": recipe.seed,
        "chat": wanted.chat,
        "max_tokens": wanted.max_tokens,
        "batch_tokens": recipe.batch_tokens,
        **({} if recipe.damping == Method.damping else {"damping": recipe.damping}),
    }


def _note_versions(book: Ledger) -> None:
    """Keep the versions that a run was begun with; warn where it goes on with others."""
    now = versions()
    if not book.rows:
        book.append("versions", now)
    was = book.rows.get("versions", now)  # an earlier release kept none
    if changed := [
        f"{name} {was.get(name)} (now {now[name]})" for name in PACKAGES if was.get(name) != now[name]
    ]:
        warnings.warn(
            f"{book.path} was begun with {', '.join(changed)}: its rows may not compare", stacklevel=2
        )


def attribute(
    spec: ModelSpec,
    wanted: CalibrationSpec,
    folder: Path,
    options: Options = Options(),
    attribution: AttributionSpec = AttributionSpec(),
) -> Effects:
    """Measure the units of a model and leave `effects.json` and the ledger in `folder`."""
    if options.cluster is not None and options.share[1] > 1:
        raise OptionError("a cluster does all jobs of a run: leave out --shard, or --executor ray")
    decoder, calibration = prepared(spec, wanted, options)
    if options.cluster is not None:
        how = attribution.method(options.batch_tokens)
        question = attribution.question()
        make = functools.partial(_passes, spec, calibration, question, how)
        with options.stage("attribution on the cluster") as progress:
            plan = planned(decoder, calibration, question, how)
            gpus = options.cluster.gpus or float(spec.device.startswith("cuda"))
            cluster = dataclasses.replace(options.cluster, gpus=gpus)
            fill(plan, folder / "attribution.ledger", make, cluster, progress)
    return _measured(decoder, calibration, folder, options, attribution)


def _passes(spec: ModelSpec, calibration: Calibration, question: Question, how: Estimator) -> Passes:
    """Build what a worker of a cluster measures with."""
    return Passes(planned(load(spec), calibration, question, how))


def check_stability(
    spec: ModelSpec,
    wanted: CalibrationSpec,
    folder: Path,
    options: Options = Options(),
    attribution: AttributionSpec = AttributionSpec(),
    top: int = Pairs().top,
) -> dict[str, Any]:
    """Measure how far effects can be trusted, and leave `stability.json` and the ledgers in `folder`.

    Each source of `wanted` is a calibration of its own, of `n` problems in each of five draws.
    """
    with options.stage("loading model"):
        decoder = load(spec)
    with options.stage("calibration data") as progress:
        calibrations = {}
        for source in wanted.sources:
            name, count = with_limit(source)
            n = (count or wanted.n) * DRAWS
            own = dataclasses.replace(wanted, sources=(name,), n=n, subsets=DRAWS)
            calibrations[source] = calibrated(decoder, own, options.data_dir, on_progress=progress)
    found = stability(
        decoder,
        calibrations,
        folder,
        Trial(attribution.question(), Pairs(top, min(wanted.n, Pairs().sequences)), options.batch_tokens),
        stage=options.stage,
    )
    description = {"model": spec.name, "sources": list(wanted.sources), "versions": versions()}
    write_json(folder / "stability.json", {**found, "description": description, "git_commit": git_commit()})
    return found


def prune_checkpoint(
    spec: ModelSpec,
    method: Method,
    output: Path,
    wanted: CalibrationSpec,
    effects_path: Path | None = None,
    options: Options = Options(),
) -> Pruned:
    """Prune a model and save it; heads that `cap` needs are measured first where `effects_path` is None.

    The ledger of such a measurement lies beside the output, in `<output>.attribution`; what a stopped pruning had finished in
    `<output>.pruning`, until the output is there.
    """
    check_destination(output, options.overwrite)
    needs = method.needs
    calibration, effects = None, None
    if method.needs_calibration or ("effects" in needs and effects_path is None):
        decoder, calibration = prepared(spec, wanted, options)
    else:
        with options.stage("loading model"):
            decoder = load(spec)
    if "effects" in needs and effects_path is not None:
        effects = load_effects(effects_path, decoder)
    elif "effects" in needs and calibration is not None:
        effects = _measured(decoder, calibration, output.with_name(f"{output.name}.attribution"), options)
    kept_in = output.with_name(f"{output.name}.pruning")
    with options.stage("pruning") as progress:
        pruned = prune(
            decoder,
            method,
            calibration=calibration,
            effects=effects,
            max_batch_tokens=options.batch_tokens,
            kept_in=kept_in,
            on_progress=progress,
        )
    with options.stage("saving"):
        record = manifest(pruned, calibration, effects)
        save(decoder, output, manifest=record, keep=pruned.keep, effects=effects, overwrite=options.overwrite)
    kept_in.unlink(missing_ok=True)
    return pruned


def prune_streamed(
    spec: ModelSpec,
    method: Method,
    output: Path,
    wanted: CalibrationSpec,
    effects_path: Path | None = None,
    options: Options = Options(),
) -> Streamed:
    """Prune a checkpoint on disk without loading the model; `cap` needs effects that were measured before."""
    if spec != ModelSpec(spec.name):
        raise OptionError(
            "--stream keeps the dtype of the files, uses no device and runs no code: leave those options out"
        )
    effects = None
    if "effects" in method.needs and effects_path is not None:
        effects = load_effects(effects_path)
    folder, calibration = Path(spec.name).expanduser(), None
    check_destination(output, options.overwrite)
    check_streams(method)
    if method.needs_calibration:
        with options.stage("calibration data"):
            bare = dataclasses.replace(skeleton(folder), tokenizer=tokenizer_of(folder))
            calibration = calibrated(bare, wanted, options.data_dir)
    seen = Seen(calibration, options.batch_tokens, options.cache_gib, effects)
    with options.stage("pruning") as progress:
        return prune_stream(
            folder,
            output,
            method,
            seen=seen,
            overwrite=options.overwrite,
            on_progress=progress,
        )


def evaluate_model(
    spec: ModelSpec,
    tasks: Sequence[str],
    settings: Settings,
    output: Path,
    options: Options = Options(),
) -> list[EvalResult]:
    """Measure a model on tasks and write the results to the JSON file `output`.

    Finished tasks are kept in `<output>.ledger` until all are there: when stopped, the same call goes on after the last.
    """
    check_tasks(tasks)
    if output.exists() and not options.overwrite:
        raise CheckpointError(f"{output} exists: choose another name, or pass --overwrite")
    with options.stage("loading model"):
        decoder = load(spec)
    how = {key: value for key, value in dataclasses.asdict(settings).items() if key != "data_dir"}
    path = output.with_name(f"{output.name}.ledger")
    with Ledger(path, {"model": decoder.fingerprint, "settings": how}) as book:
        for task in tasks:
            if task not in book.rows:
                with options.stage(task) as progress:
                    found = evaluate(decoder, [task], settings, on_progress=progress)
                book.append(task, kept_rows(found))
        results = [result for task in tasks for result in results_in(book.rows[task])]
    write_results(output, results, {"model": spec.name, "versions": versions(), "git_commit": git_commit()})
    path.unlink()
    return results


def _effects(
    recipe: Recipe, decoder: Decoder, calibration: Calibration, folder: Path, stage: Stage, book: Ledger
) -> Effects | None:
    if not any(method is not None and "effects" in method.needs for method in recipe.cells().values()):
        return None
    options = Options(batch_tokens=recipe.batch_tokens, stage=stage)
    own = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe.attribution).items()
    }
    if (was := book.rows.get("attribution_spec", own)) != own:
        raise MismatchError(
            f"attribution in {folder} was {was}, and is now {own}: choose another folder, or delete its ledgers"
        )
    begun, start = (folder / "attribution.ledger").exists(), time.perf_counter()
    effects = _measured(decoder, calibration, folder, options, recipe.attribution)
    if "attribution" not in book.rows and not begun:  # else the time of an earlier session is not known
        seconds = time.perf_counter() - start
        book.append("attribution", {"seconds": seconds, "peak_bytes": peak_bytes()})
    if "attribution_spec" not in book.rows:
        book.append("attribution_spec", own)
    return effects


def prepared(spec: ModelSpec, wanted: CalibrationSpec, options: Options) -> tuple[Decoder, Calibration]:
    """Load a model and draw its calibration examples."""
    with options.stage("loading model"):
        decoder = load(spec)
    with options.stage("calibration data") as progress:
        return decoder, calibrated(decoder, wanted, options.data_dir, on_progress=progress)


def _measured(
    decoder: Decoder,
    calibration: Calibration,
    folder: Path,
    options: Options,
    wanted: AttributionSpec = AttributionSpec(),
) -> Effects:
    with options.stage("attribution") as progress:
        effects = measure(
            decoder,
            calibration,
            wanted.question(),
            dataclasses.replace(wanted.method(options.batch_tokens), share=options.share),
            ledger=folder / options.named("attribution.ledger"),
            on_progress=progress,
        )
    save_effects(effects, folder / options.named(EFFECTS))
    return effects
