"""From a model, a task and a limit to the file to ship: what is gone, and the types of what stays, predicted and then measured."""

import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from causalprune.calibration import OWN_TEXT
from causalprune.checkpoints import hash_file, resolve
from causalprune.core import (
    CausalPruneError,
    CheckpointError,
    Decoder,
    Ledger,
    ModelError,
    OptionError,
    read_rows,
    versions,
)
from causalprune.evaluation import (
    check_tasks,
    digests,
    headline,
    higher_is_better,
    interval,
    paired_difference,
    write_json,
)
from causalprune.models import tokenizer_of
from causalprune.reports import FRONTIER_PAGE, frontier_page
from causalprune.runs.cells import load
from causalprune.runs.reaching import check_reach, enough, too_large
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.searching import (
    EXAMPLES,
    PLAN,
    Asked,
    Search,
    check_halves,
    check_measure,
    possible,
    settle,
    started,
)
from causalprune.runs.single import Options, dated
from causalprune.shipping import (
    Point,
    Written,
    best,
    can_keep,
    export,
    front,
    half,
    kept,
    pays_below,
    running,
    worth_measuring,
)

FRONTIER, FILE, MODEL, LEDGER = "frontier.json", "model.gguf", "model", "fit.ledger"
TIMED = "speed/"
"""Before the names of files in a ledger, of which it has the speed."""
PROMPTS, WRITTEN, ROUNDS = 10, 24, 3


@dataclass(frozen=True)
class Fitted:
    """The file that was chosen, and the record of every point that was tried, which `frontier.json` holds."""

    file: Path
    checkpoint: Path
    record: dict[str, Any]


def fit(spec: ModelSpec, wanted: CalibrationSpec, output: Path, asked: Asked, options: Options) -> Fitted:
    """Search the files that a model can become, and write the best within the limit to `output`, with `frontier.json` and a page.

    What is measured is on disk at once, so that a stopped search goes on. One half of the problems decides, the other is reported.

    Raises:
        OptionError: no file can meet the limit.
        ModelError: llama.cpp's converter does not know the family, or its matrices cannot be measured as a file.
        CheckpointError: there is no room for what it takes.
    """
    check_tasks([asked.on], asked.settings.scorers)
    check_measure(asked.on)
    if spec.dtype not in ("auto", "float32"):
        raise OptionError(
            f"fit works in float32, and files are rounded from there: leave out --dtype {spec.dtype}"
        )
    if (output / FILE).exists() and not _is_own(output):
        raise CheckpointError(
            f"{output / FILE} was not written by `fit`, and is not replaced: choose another folder"
        )
    _check_model_folder(output, [spec.name, *filter(None, [asked.start])])
    with options.stage("loading model"):
        spec = dataclasses.replace(spec, dtype="float32")
        start = started(spec, asked.start)
        asked = dataclasses.replace(asked, shares=possible(start.spec, asked.shares))
        decoder = load(spec)
    identity = _identity(decoder, wanted, asked, options)
    if asked.start:
        identity["start"] = [hash_file(file) for file in sorted(Path(start.spec.name).glob("*.safetensors"))]
    with cleared(output), Ledger(output / LEDGER, identity) as book:
        search = Search(spec, wanted, output, asked, options, book, start, decoder.fingerprint)
        search.begin(decoder)
        del decoder  # one model is in memory at a time
        points = _searched(search)
        return _written(search, points)


def _check_model_folder(output: Path, names: Sequence[str]) -> None:
    """Raise a `CausalPruneError` where the folder of the model that is chosen is another's."""
    place = (output / MODEL).resolve()
    if place in {Path(resolve(name)).expanduser().resolve() for name in names}:
        raise OptionError(f"{output / MODEL} is what `fit` starts from: choose another folder")
    if place.exists() and not _is_own(output):
        raise CheckpointError(
            f"{output / MODEL} was not written by `fit`, and is not replaced: choose another folder"
        )


def _is_own(output: Path) -> bool:
    """Tell whether a folder is one of `fit`, where its ledger may have been deleted to start again."""
    return any((output / name).exists() for name in (LEDGER, FRONTIER))


def _identity(decoder: Decoder, wanted: CalibrationSpec, asked: Asked, options: Options) -> dict[str, Any]:
    return {
        "model": decoder.fingerprint,
        "calibration": _plain(wanted),
        "on": asked.on,
        "update": asked.update,
        "batch_tokens": options.batch_tokens,
        "settings": asked.settings.identity(),
        "data": digests([asked.on], asked.settings.scorers),
        **dated(decoder, asked.settings.chat),
    }


@contextmanager
def cleared(folder: Path) -> Iterator[None]:
    """Leave nothing of a new folder where all that is done in it is to find out that it cannot be done."""
    new = not folder.exists()
    try:
        yield
    except CausalPruneError:
        rows = read_rows(folder / LEDGER) if (folder / LEDGER).exists() else {}
        if new and not any(not key.startswith((PLAN, EXAMPLES)) for key in rows):  # nothing was measured
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _plain(wanted: CalibrationSpec) -> dict[str, Any]:
    return {key: [*value] if isinstance(value, tuple) else value for key, value in asdict(wanted).items()}


def _searched(search: Search) -> list[Point]:
    """Measure the whole model in every mix, then smaller ones as long as they pay, and return all points."""
    asked = search.asked
    points = search.points(0.0)
    check_reach(search, points)
    settle(search)
    search.measure(0.0, "")
    check_halves(search.result(0.0, ""), asked.limit)
    for point in points:
        search.measure(0.0, point.mix)
    for share in search.shares:
        if too_large(search, share):
            continue
        if enough(search, share, points):
            break
        try:
            search.shrunk(share)
            search.measure(share, "")
            if enough(search, share, points):
                break
            points += search.points(share)
        except (ModelError, OptionError) as error:
            warnings.warn(f"no file without {share:.0%} of the parameters is tried: {error}", stacklevel=2)
            continue
        while near := worth_measuring(
            points, search.rises(points)
        ):  # what was measured may move the frontier
            for point in near:
                search.measure(point.share, point.mix)
        measured = [p for p in points if p.share == share and search.known(p)]
        if not measured and best(points, search.rises(points), asked.limit, search.keeps(points)):
            break
    return points


def _written(search: Search, points: list[Point]) -> Fitted:
    """Write the best file within the limit, ask it, and say what was found; `points` that llama.cpp refuses go."""
    target, made, speeds = search.output / FILE, search.work / FILE, dict[str, Any]()
    point, file = _best(search, points, made, speeds)
    made.replace(target)
    checkpoint = _kept(search, point.share)
    record = _record(search, points, point, file) | {"speeds": speeds}
    _tell(search, record)  # before the file is asked, which may fail, and others are timed
    record |= {"asked": _asked(search, target)}
    _tell(search, record)
    left = len(points)
    for other in front(points, search.rises(points)):
        if other.name == point.name:
            speeds[other.name] = _timed(search, other, target)
            continue
        if f"{TIMED}{other.name}" not in search.book.rows and not _exported(search, points, other, made):
            continue
        speeds[other.name] = _timed(search, other, made)
        made.unlink(missing_ok=True)
    if len(points) < left:
        record |= _record(search, points, point, file)
    _tell(search, record)
    return Fitted(target, checkpoint, record)


def _best(search: Search, points: list[Point], made: Path, speeds: dict[str, Any]) -> tuple[Point, Written]:
    """Write the best file within the limit, and return its point and what was written; `speeds` get what was timed."""
    limit = search.asked.limit
    for point in best(points, search.rises(points), limit, search.keeps(points)):
        known = search.book.rows.get(f"{TIMED}{point.name}") if limit.kind == "speed" else None
        if known and known["over_dense"] < limit.value:
            speeds[point.name] = known
            continue
        if (file := _exported(search, points, point, made)) is None:
            continue
        if limit.kind == "speed":
            speeds[point.name] = _timed(search, point, made)
            if speeds[point.name]["over_dense"] < limit.value:
                continue
        return point, file
    made.unlink(missing_ok=True)
    raise OptionError(_nearest(search, points, speeds))


def _exported(search: Search, points: list[Point], point: Point, target: Path) -> Written | None:
    """Write the file of a point; where llama.cpp refuses one of a smaller model, that leaves the points, with a warning."""
    try:
        return _export(search, point, target)
    except ModelError as error:
        if not point.share:
            raise
        warnings.warn(f"{point.name} is no file: {error}", stacklevel=2)
        points.remove(point)
        return None


def _tell(search: Search, record: dict[str, Any]) -> None:
    """Write what is known as JSON and as a page."""
    write_json(search.output / FRONTIER, record)
    frontier_page(record, search.output / FRONTIER_PAGE)


def _timed(search: Search, point: Point, file: Path) -> dict[str, float]:
    """Return the speed of a point, whose file is only looked at where it was not timed yet."""
    if (key := f"{TIMED}{point.name}") not in search.book.rows:
        search.book.append(key, _speed(search, point, file))
    found: dict[str, float] = search.book.rows[key]
    return found


def _kept(search: Search, share: float) -> Path:
    """Return the folder of the model that was chosen: beside the file, where this search made it, for `work` may go."""
    folder, kept_in = search.folder(share), search.output / MODEL
    if kept_in.exists():  # of an earlier choice
        shutil.rmtree(kept_in)
    if search.work not in folder.parents:
        return folder
    shutil.copytree(folder, kept_in, copy_function=_linked)
    return kept_in


def _linked(source: str, target: str) -> None:
    """Give a file of weights a second name where the disk has such names; copy what may be edited."""
    if source.endswith(".safetensors"):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _nearest(search: Search, points: Sequence[Point], speeds: Mapping[str, Any]) -> str:
    """Return what is said where nothing meets the limit: the nearest, and what it costs."""
    rises, limit = search.rises([*points]), search.asked.limit
    known = {p.name: p for p in points if p.name in rises}
    if limit.kind == "speed":
        name = max(speeds, key=lambda own: speeds[own]["over_dense"])
        found = f"{speeds[name]['over_dense']:.2f} × the speed"
    elif limit.kind == "keep":
        keeps = search.keeps([*points])
        name = max(keeps, key=lambda own: keeps[own])
        found = f"{keeps[name]:.3f} of the task kept"
    else:
        name = min(known, key=lambda own: known[own].bytes)
        found = f"{known[name].bytes / 1e6:.1f} MB"
    return f"no file is of {limit}: the nearest is {name} with {found}, {rises[name]:+.3f} to dense on {search.asked.on}"


def _export(search: Search, point: Point, target: Path) -> Written:
    weigh = partial(search.importance, point.share, None)
    how = dataclasses.replace(search.how(point.share), overwrite=True)
    return export(search.folder(point.share), target, point.mix, weigh, how, search.options.stage)


def _speed(search: Search, point: Point, file: Path) -> dict[str, float]:
    """Return tokens a second of a file and of the whole model at Q8_0, timed in turns in llama.cpp."""
    whole = search.work / "whole-q8_0.gguf"
    if not whole.exists():
        _export(search, Point(0.0, "q8_0", 0), whole)
    rates: dict[Path, list[float]] = {file: [], whole: []}
    with search.options.stage(f"timing {point.name}"):
        for _ in range(ROUNDS):
            for timed, found in rates.items():
                with running(timed, context=512, threads=2) as run:
                    found.append(run.rate([*range(100, 164)], 64))
                    del run  # it holds its server, beside which the next would be loaded
    own, dense = (median(found) for found in rates.values())
    return {"tokens_per_second": own, "dense_q8_0": dense, "over_dense": own / dense}


def _record(search: Search, points: list[Point], chosen: Point, file: Written) -> dict[str, Any]:
    """Return what `frontier.json` says: every point, predicted and measured, and the chosen one beside the best whole one."""
    whole, rises, asked = half(search.result(0.0, ""), 1), search.rises(points), search.asked
    plain = [p for p in points if not p.share and p.name in rises and p.bytes <= chosen.bytes]
    rival = min(plain, key=lambda p: rises[p.name], default=None)
    rows = [_row(search, p, rises) for p in sorted(points, key=lambda p: -p.bytes)]
    over = None
    if rival is not None and chosen.share:
        own, other = (half(search.result(p.share, p.mix), 1) for p in (chosen, rival))
        over = asdict(paired_difference(own, other))
    return {
        "model": search.spec.name,
        "on": asked.on,
        "metric": whole.metric,
        "higher_is_better": higher_is_better(whole),
        "limit": {"kind": asked.limit.kind, "value": asked.limit.value, "said": str(asked.limit)},
        "calibration": _plain(search.wanted),
        "update": asked.update,
        "from": asked.start,
        "dense": {
            "value": headline(whole),
            "interval": asdict(interval(whole)),
            "problems": len(whole.values),
        },
        "points": rows,
        "chosen": next(row for row in rows if row["name"] == chosen.name),
        "best_whole": rival and rival.name,
        "minus_best_whole": over,
        "pays_below_bytes": pays_below(points, rises),
        "file": {"bytes": file.bytes, "zeros": file.zeros, "zeros_kept": file.kept},
        "versions": versions(),
    }


def _row(search: Search, point: Point, rises: Mapping[str, float]) -> dict[str, Any]:
    """Return a point: what was predicted and measured on the deciding half, and the value on the other."""
    row: dict[str, Any] = {"name": point.name, "share": point.share, "mix": point.mix, "bytes": point.bytes}
    row |= {"predicted_rise": point.predicted, "measured_rise": rises.get(point.name)}
    if (found := search.known(point)) is not None:
        own, whole = half(found, 1), half(search.result(0.0, ""), 1)
        row |= {"value": headline(own), "kept": kept(own, whole) if can_keep(whole) else None}
        row["minus_dense"] = asdict(paired_difference(own, whole))
    return row


def _asked(search: Search, file: Path) -> list[dict[str, Any]]:
    """Return what the file that was written says to ten problems of the calibration examples, in llama.cpp."""
    tokenizer = tokenizer_of(search.folder(0.0), trust_remote_code=search.asked.file.trust_remote_code)
    every = search.calibration.examples
    problems = [own for own in every if own.source != OWN_TEXT] or every
    prompts = [own.tokens[: max(own.target_start, 1)] for own in problems[:PROMPTS]]
    context = max(map(len, prompts)) + WRITTEN + 8
    with search.options.stage("asking the file"), running(file, context=context) as run:
        found = [{"prompt": tokenizer.decode(p), "text": run.write(p, WRITTEN)} for p in prompts]
    if not any(one["text"].strip() for one in found):
        raise CheckpointError(
            f"{file} answers nothing to {len(found)} prompts in llama.cpp: it is kept there"
        )
    return found
