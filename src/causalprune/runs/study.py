"""A whole comparison: dense and every method at every sparsity on every task, in one folder.

| file | content |
|---|---|
| `attribution.ledger` | every finished attribution job; `effects.json` when all are done |
| `results.ledger` | every finished evaluation; a run that was stopped goes on after the last one |
| `results.json` | all finished rows with per-example values: what `compare` reads |
| `checkpoints/<label>` | the recommended model, replaced when another beats it; those that the recipe saves, for good |
"""

import dataclasses
import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

from causalprune.attribution import described
from causalprune.calibration import check_subsets, with_limit
from causalprune.checkpoints import warn_unpacked
from causalprune.core import (
    METHOD_VERSION,
    PACKAGES,
    Calibration,
    CheckpointError,
    Decoder,
    Effects,
    Ledger,
    MismatchError,
    OptionError,
    Stage,
    bars,
    git_commit,
    peak_bytes,
    read_rows,
    say,
    size_of,
    versions,
)
from causalprune.evaluation import (
    RESULTS,
    Settings,
    check_tasks,
    digests,
    evaluation_contents,
    load_scorers,
    output_type,
    own_texts,
    rows_of,
    same_as_before,
    write_json,
)
from causalprune.pruning import Method, cap_units
from causalprune.reports import LEDGER, verdict
from causalprune.runs.cells import Cells, load_intact
from causalprune.runs.general import note_general_text, note_preserved, with_general_text
from causalprune.runs.jobs import Coming, run_jobs
from causalprune.runs.recipe import AttributionSpec, Recipe, as_recipe
from causalprune.runs.record import Record
from causalprune.runs.single import Options, dated, measured
from causalprune.runs.traces import calibrated


def run(  # noqa: PLR0913 (what a user says, and what the caller knows)
    recipe: Recipe | Mapping[str, Any] | Path | str,
    folder: Path | str,
    *,
    data_dir: Path | str | None = None,
    stage: Stage | None = None,
    command: str | None = None,
    best: Callable[[Mapping[str, Any]], str | None] = lambda record: verdict(record).label,
    coming: Coming = Coming(),
) -> Record:
    """Carry out a recipe in `folder`, or go on where it was stopped; return what `results.json` holds.

    A recipe is one that was made here, its keys as a dictionary, a YAML file, or the name of one that comes with the package.
    Where no `stage` is given, every stage of the work has a bar (`quiet`: none has).
    `command` is what the user typed, for the record. `best` names the row whose checkpoint is kept, of those that are
    finished: the recommended one. Methods, sparsities and tasks may be added to a recipe whose folder exists: what is there is not done again;
    what is `coming` after that counts for the time left to show.

    Raises:
        CheckpointError: the folder is a file, or cannot be written.
        MismatchError: the folder holds a run of another model, calibration, seed, damping or batch size, or runs on several draws.
    """
    recipe, folder, stage = as_recipe(recipe), Path(folder), stage or bars
    settings, named = _settings(recipe, data_dir), recipe.on
    _check(recipe, settings, folder)
    path, recipe = folder / LEDGER, with_general_text(recipe, folder, data_dir)
    done = _done(recipe, path)
    with stage("loading model") as progress:
        every = len(recipe.cells()) * len(recipe.on)
        say(progress, note=f"going on: {len(done)} of {every} measurements done" if done else "")
        decoder = load_intact(recipe.model)
    recipe.check_shape(decoder)
    warn_unpacked(decoder)
    with stage("calibration data") as progress:
        exclude = evaluation_contents(recipe.on, settings, decoder)
        own = own_texts(decoder, recipe.on, settings)
        calibration = calibrated(decoder, recipe.calibration, data_dir, exclude, progress, own)
        say(progress, jobs=run_jobs(recipe, decoder, calibration, settings, done, coming))
    identity = _identity(recipe, decoder, calibration)
    record = _record(recipe, calibration, identity, command)
    with Ledger(path, identity, unchanged=partial(same_as_before, recipe.on, settings, decoder)) as book:
        _note(book, recipe, settings, named)
        effects = _effects(recipe, decoder, calibration, folder, stage, book)
        if effects is not None:
            record["attribution"] = described(effects) | book.rows.get("attribution", {})
        cells = Cells(recipe, folder, calibration, effects, settings, stage, book, named, size_of(decoder))
        loaded = [decoder]
        del decoder  # one model in memory at a time
        *_, last = recipe.cells()
        for name, method in recipe.cells().items():
            settled = cells.finished(name) and name != last
            cells.measure(name, method, loaded.pop() if method is None else None)
            record["rows"] = [cells.row(*cell) for cell in recipe.cells().items() if cells.finished(cell[0])]
            write_json(folder / RESULTS, record)
            if not settled:
                cells.settle(best(record), rows_of(record))
        if coming.again and (lost := best(record)) is not None:
            cells.measure(lost, recipe.cells()[lost], None, again=True)
            cells.settle(lost, rows_of(record))
    return Record(record, folder)


def _check(recipe: Recipe, settings: Settings, folder: Path) -> None:
    """Refuse tasks that do not exist, and a folder in which there is something else."""
    check_tasks(recipe.on, settings.scorers)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and a run needs a folder: choose another name")
    if any(folder.glob(f"seed-*/{LEDGER}")):
        raise MismatchError(f"{folder} holds runs on several draws (--seeds): choose another folder")


def _record(
    recipe: Recipe, calibration: Calibration, identity: dict[str, Any], command: str | None
) -> dict[str, Any]:
    """Return what `results.json` says before anything is measured."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "cells": list(recipe.cells()),
        "command": command,
        "identity": identity,
        "calibration": calibration.description,
        "method_version": METHOD_VERSION,
        "versions": versions(),
        "git_commit": git_commit(),
        "attribution": None,
        "rows": [],
    }


def _settings(recipe: Recipe, data_dir: Path | str | None) -> Settings:
    """Return how the tasks of a recipe are measured; its scorers are imported."""
    return recipe.calibration.settings(
        data_dir,
        seed=recipe.seed,
        batch_tokens=recipe.batch_tokens,
        max_new_tokens=recipe.max_new_tokens,
        answer=recipe.answer,
        scorers=load_scorers(recipe.scorers),
    )


def _done(recipe: Recipe, path: Path) -> Set[str]:
    """Return the measurements of a recipe that its ledger has."""
    rows = read_rows(path) if path.exists() else {}
    return {f"{cell}/{task}" for cell in recipe.cells() for task in recipe.on} & rows.keys()


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
        **({} if wanted.thinking == "auto" else {"thinking": wanted.thinking}),
        **({} if wanted.turns == "last" else {"turns": wanted.turns}),
        **({"fold_system": True} if wanted.fold_system else {}),
        **dated(decoder, wanted.chat),
    }


def _note(book: Ledger, recipe: Recipe, settings: Settings, named: Sequence[str]) -> None:
    """Keep what a run was begun with, beside its identity; warn or refuse where it goes on otherwise."""
    _note_versions(book)
    note_preserved(book, recipe)
    note_general_text(book, [task for task in recipe.on if task not in named])
    note_data(book, digests(recipe.on, settings.scorers))
    _note_answering(book, settings, recipe.on)


def note_data(book: Ledger, found: Mapping[str, str]) -> None:
    """Keep what files held when a run measured them first; refuse to go on with others."""
    for name, own in found.items():
        key = f"data {hashlib.sha256(name.encode()).hexdigest()[:16]}"  # a slash would make it a measurement
        if key not in book.rows:
            book.append(key, own)
        if book.rows[key] != own:
            raise MismatchError(
                f"{name} has changed since {book.path.parent} was begun: choose another folder, or bring it back"
            )


def _note_answering(book: Ledger, settings: Settings, tasks: Sequence[str]) -> None:
    """Keep how answers were written and read when a run measured the first; refuse to go on otherwise."""
    kinds = [output_type(with_limit(task)[0], settings.scorers) for task in tasks]
    if "generate_until" not in kinds:
        return
    own = settings.identity()
    now = {name: own.get(name) for name in ("answer", "max_new_tokens")}
    now |= {f"scorer {name}": place for name, place in own.get("scorers", {}).items()}
    for name, value in now.items():
        if (key := f"with {name}") not in book.rows:
            book.append(key, value)
        if (was := book.rows[key]) != value:
            raise MismatchError(
                f"answers in {book.path.parent} were measured with {name} {was}, which is now {value}: "
                "choose another folder"
            )


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


def _effects(
    recipe: Recipe, decoder: Decoder, calibration: Calibration, folder: Path, stage: Stage, book: Ledger
) -> Effects | None:
    methods = [method for method in recipe.cells().values() if isinstance(method, Method)]
    if not any("effects" in method.needs for method in methods):
        return None
    check_subsets(len(calibration.examples), recipe.calibration.subsets)
    wanted = recipe.attribution
    if wanted.units == AttributionSpec.units:  # nobody named any
        wanted = dataclasses.replace(wanted, units=cap_units(decoder))
    if missing := set(cap_units(decoder)) - set(wanted.units):
        raise OptionError(
            f"cap needs the effects of all heads of {decoder.name}: add {', '.join(sorted(missing))} to `units` under `attribution`"
        )
    options = Options(batch_tokens=recipe.batch_tokens, stage=stage)
    own = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(wanted).items()}
    if (was := book.rows.get("attribution_spec", own)) != own:
        raise MismatchError(
            f"attribution in {folder} was {was}, and is now {own}: choose another folder, or delete its ledgers"
        )
    begun, start = (folder / "attribution.ledger").exists(), time.perf_counter()
    effects = measured(decoder, calibration, folder, options, wanted)
    if "attribution" not in book.rows and not begun:  # else the time of an earlier session is not known
        seconds = time.perf_counter() - start
        book.append("attribution", {"seconds": seconds, "peak_bytes": peak_bytes()})
    if "attribution_spec" not in book.rows:
        book.append("attribution_spec", own)
    return effects
