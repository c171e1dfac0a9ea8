"""Circuits as the command line asks for them: a model, problems that score and problems that decide, one folder."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from causalprune.attribution import UNPAIRED, Estimator, Question, planned
from causalprune.calibration import (
    OWN,
    OWN_TEXT,
    TEXT_SOURCES,
    Exclude,
    Skipped,
    Split,
    enough,
    is_file,
    load_problems,
    taken,
    with_limit,
)
from causalprune.checkpoints import EMBEDDED, MANIFEST, check_destination, read_manifest, save
from causalprune.circuits import (
    CIRCUIT,
    GATES,
    MEASURED,
    OVERLAP,
    RANDOM,
    SAMPLE,
    Checks,
    Circuit,
    Overlap,
    check_enough,
    check_overlap,
    check_search,
    examined,
    load_circuit,
    overlap,
    save_circuit,
    sequences_of,
)
from causalprune.circuits import circuit as find
from causalprune.core import (
    Calibration,
    CheckpointError,
    Decoder,
    Example,
    MismatchError,
    ModelError,
    OptionError,
    forget,
    say,
    size_of,
)
from causalprune.evaluation import (
    Settings,
    check_tasks,
    evaluation_contents,
    reader_for,
    source_of,
    write_json,
)
from causalprune.pruning import close
from causalprune.runs.cells import load
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.single import Options
from causalprune.runs.traces import calibrated

SEARCH = 9
"""Sizes that are tried in a search, at most."""
TESTS = 3 * RANDOM + SAMPLE
"""Circuits of the tests; of heads one more for each member beyond the sample."""
KNOWN = ("name", "revision", "date", "dtype", "attention", "device_map")
"""What a circuit says of the way its model is loaded; whether its code may run, or on which device, it does not."""
POINTS = 13
"""Sizes of a curve, the chosen one, the intact and the empty model."""


@dataclass(frozen=True)
class CircuitSpec:
    """What is looked for: the arguments of `causalprune.circuits.circuit`, and the checks that follow.

    Problems of `on` (losses, as gsm8k_nll:100) decide about sizes, or without any every second example. The circuit alone is
    saved as a checkpoint where `alone` names a folder.
    """

    question: Question = Question(effect="kl")
    estimator: Estimator = Estimator("integrated", epochs=10)
    keep: float = 0.9
    rank: Any = "absolute"
    rescore: int = 1
    checks: Checks = Checks()
    on: tuple[str, ...] = ()
    alone: Path | None = None

    def check(self, folder: Path, *, overwrite: bool = False) -> None:
        """Raise a `CausalPruneError` for what cannot be asked, or written beside the `folder` of the search."""
        check_on(self.on)
        check_search(self.question, self.estimator, self.keep, self.rank, self.rescore)
        if self.alone is None:
            return
        if self.question.ablation != "zero":
            raise OptionError(
                f"--save writes zeros, and {self.question.ablation!r} puts something else there: ask for zero"
            )
        if self.alone.absolute() == folder.absolute():
            raise OptionError("--save and --output are one folder: choose another for --save")
        if overwrite or not _is_saved(folder, self.alone):
            check_destination(self.alone, overwrite)

    @property
    def passes(self) -> float:
        """What scoring costs, in forward passes over the problems, a backward pass as two; of the estimators by slopes."""
        draws = int(self.question.effect == "kl")
        return self.rescore * len(self.estimator.gates) * (3.0 + 2 * draws)


def find_circuit(
    spec: ModelSpec, wanted: CalibrationSpec, folder: Path, asked: CircuitSpec, options: Options
) -> Circuit:
    """Find a circuit, compare it with others, and leave `circuit.json` and ledgers in `folder`; a stopped search goes on there.

    What another search left there is refused, or with `overwrite` goes.
    """
    on, alone = asked.on, asked.alone
    settings = wanted.settings(options.data_dir)
    asked.check(folder, overwrite=options.overwrite)
    with options.stage("loading model"):
        decoder = load(spec)
    with options.stage("calibration data") as progress:
        exclude = evaluation_contents(on, settings, decoder) if on else None
        calibration = calibrated(decoder, wanted, options.data_dir, exclude, progress)
        decide = measured_on(decoder, on, settings) if on else None
        say(progress, jobs=jobs(asked, calibration, decide))
    how = dataclasses.replace(asked.estimator, max_batch_tokens=options.batch_tokens, seed=wanted.seed)
    own: dict[str, Any] = {name: getattr(asked, name) for name in ("keep", "rank", "rescore")}
    own |= {"decide": decide, "folder": folder, "stage": options.stage}
    search = partial(find, decoder, calibration, asked.question, how, **own)
    found = _replacing(search, folder) if options.overwrite else search()
    model = dataclasses.asdict(spec)
    if spec.name != EMBEDDED and (place := Path(spec.name).expanduser()).exists():
        model["name"] = str(place.absolute())  # the circuit may be read from another folder
    told = {"model_spec": {key: model[key] for key in KNOWN}, "on": list(on)}
    found = dataclasses.replace(found, description=found.description | told)
    save_circuit(found, folder / CIRCUIT)
    found = examined(found, decoder, calibration, asked.checks, folder=folder, stage=options.stage)
    if alone is not None and (options.overwrite or not _is_saved(folder, alone)):
        _save_alone(decoder, calibration, found, asked.question, alone, options)
    return found


def _replacing(search: Callable[[], Circuit], folder: Path) -> Circuit:
    """Return what a search finds, from which files in its folder go that are another's, or damaged."""
    while True:
        try:
            return search()
        except (CheckpointError, MismatchError) as error:
            if error.path is None:
                raise
            forget(error.path)
            (folder / CIRCUIT).unlink(missing_ok=True)


def check_on(on: Sequence[str]) -> None:
    """Raise `OptionError` for a measure that is not the loss of problems."""
    check_tasks(on)
    for task in on:
        name = with_limit(task)[0]
        if not name.endswith("_nll") or source_of(name) in (OWN_TEXT, *TEXT_SOURCES):
            raise OptionError(f"--on {task}: sizes are decided by losses of problems, as in gsm8k_nll:100")


def measured_on(decoder: Decoder, on: Sequence[str], settings: Settings) -> Calibration:
    """Return the problems of measures, as they are measured."""
    examples: list[Example] = []
    for task in on:
        name, limit = with_limit(task)
        examples += taken(reader_for(decoder, settings), str(source_of(name)), "evaluation", limit)
    return Calibration(tuple(examples), (0,) * len(examples), {"on": list(on)})


def jobs(asked: CircuitSpec, calibration: Calibration, decide: Calibration | None) -> dict[str, float]:
    """Return the stages of a search with what they cost in tokens; what estimators measure unit by unit is not known here."""
    every = [own.examples for own in (calibration, decide or calibration)]
    counts = list(map(len, every))
    lengths = [sum(len(e.tokens) for e in sequences_of(own, asked.estimator)) for own in every]
    found = dict[str, float]()
    for name, problems, passes in _stages(asked, counts[0], counts[1] if decide else None):
        own = asked.passes if math.isnan(passes) else passes
        at = int(name not in ("scores", GATES))
        found[name] = own * problems * lengths[at] / counts[at]
    if asked.rescore > 1:
        each, turns = found.pop("scores") / asked.rescore, range(1, asked.rescore + 1)
        found = {f"scores, round {i} of {asked.rescore}": each for i in turns} | found
    return found


def planned_search(
    asked: CircuitSpec, wanted: CalibrationSpec, folder: Path, options: Options
) -> list[tuple[str, int, float]]:
    """Return the stages of a search: name, problems, and forward passes over each of them. No model is loaded.

    Raises:
        CausalPruneError: the search could not be made, as far as that is seen without the model.
    """
    asked.check(folder, overwrite=options.overwrite)
    paired, settings = asked.question.ablation == "counterfactual", wanted.settings(options.data_dir)
    measured = [(str(source_of(name)), limit) for name, limit in map(with_limit, asked.on)]
    files = [task for task, (source, _) in zip(asked.on, measured, strict=True) if is_file(source)]
    there, place = partial(_there, paired=paired), options.data_dir
    decided = sum(there(*own, "evaluation", place) for own in measured) if asked.on else None
    exclude = evaluation_contents(files, settings, None)
    scored = sum(there(*own, "calibration", place, exclude) for own in wanted.counts().items())
    check_enough(*_sides(scored, decided), halved=decided is None)
    return _stages(asked, scored, decided)


def _there(
    name: str, count: int | None, split: Split, data_dir: Any, exclude: Exclude = frozenset(), *, paired: bool
) -> int:
    """Return how many of so many problems a source has (None: all): a file may have fewer, each once, and some are to `exclude`.

    Raises:
        DataError: the file cannot be read, or has much less than was asked for.
        OptionError: its problems are to be `paired`, and have no counterfactual.
    """
    source, pairs = name.removeprefix(OWN), name == "ioi"
    if is_file(source) or count is None:
        problems = load_problems(source, split, data_dir=data_dir, with_targets=source == name)
        others = [own for own in problems if own.content not in exclude]
        left = len({(own.content, own.target) for own in others})
        out = Skipped(excluded=len(problems) - len(others), duplicate=len(others) - left)
        with warnings.catch_warnings(action="ignore"):  # the search says it
            enough(name, count, left, out)
        count = min(count or left, left)
        pairs |= source == name and all(own.counterfactual for own in problems)
    if paired and not pairs:
        raise OptionError(UNPAIRED)
    return count


def _sides(scored: int, decided: int | None) -> tuple[int, int]:
    """Return how many problems score, and decide: every second of them where none are given for that."""
    return ((scored + 1) // 2, scored // 2) if decided is None else (scored, decided)


def _stages(asked: CircuitSpec, scored: int, decided: int | None) -> list[tuple[str, int, float]]:
    """Return name, problems and passes of each stage, where so many score, and so many decide (None: every second of them)."""
    scored, decided = _sides(scored, decided)
    few, checks = min(asked.checks.problems, decided), asked.checks
    kinds = ["head"] if asked.question.units == ("heads",) else ["neurons"]
    count = checks.count(kinds)
    found = [
        ("scores", scored, math.nan if asked.estimator.name in MEASURED else asked.passes),
        *([(GATES, scored, 3.0 * epochs + 1)] if (epochs := asked.estimator.epochs) else []),
        ("sizes", decided, float(SEARCH)),
        ("curve", decided, float(POINTS)),
        ("necessity", decided, 7.0),
        ("controls", few, float(count + 2)),
        ("completeness", few, float(checks.passes(kinds, 0) - count - checks.tests * 3 * RANDOM)),
    ]
    return [*found, *([("tests", few, float(TESTS))] if checks.tests else [])]


def _save_alone(
    decoder: Decoder,
    calibration: Calibration,
    found: Circuit,
    question: Question,
    folder: Path,
    options: Options,
) -> None:
    """Save the circuit alone: all other units are zeros."""
    units = planned(decoder, calibration, question).units
    with options.stage("saving"):
        members = set(found.members)
        keep = close(decoder, [parts for unit, parts in units.items() if unit not in members])
        record = {
            "reapplied": False,
            "circuit": _published(found),
            "size": dict.fromkeys(("before", "after"), dataclasses.asdict(size_of(decoder))),
        }
        save(decoder, folder, manifest=record, keep=keep, overwrite=options.overwrite)


def _published(found: Circuit) -> dict[str, Any]:
    """Return what a checkpoint says of its circuit, which others may read: whole paths are their last parts."""
    told = {key: own for key, own in found.description.items() if key != "model_spec"}
    return {"units": len(found.units), "members": found.size, **_last_parts(told)}


def _last_parts(own: Any) -> Any:
    if isinstance(own, Mapping):
        return {_last_parts(key): _last_parts(value) for key, value in own.items()}
    if isinstance(own, list | tuple):
        return list(map(_last_parts, own))
    return re.sub(r"^(own:)?[/~.].*/(?=.)", r"\1", own) if isinstance(own, str) else own


def _is_saved(folder: Path, alone: Path) -> bool:
    """Tell whether what was found in a folder has been saved alone; who made it with which versions does not count."""
    if not ((folder / CIRCUIT).exists() and (alone / MANIFEST).exists()):
        return False
    found, was = load_circuit(folder), read_manifest(alone)
    own, kept = _published(found), was.get("run", {}).get("circuit", {})
    same = all(own[key] == kept.get(key) for key in own if key not in ("versions", "git_commit"))
    return same and was["base"]["fingerprint"] == found.model_fingerprint


def overlap_circuits(
    paths: Sequence[Path],
    folder: Path,
    options: Options,
    loading: Mapping[str, Any] = MappingProxyType({}),
    *,
    remove: int | None = None,
) -> Overlap:
    """Compare circuits in files, measure what removing each does to the others' problems, and leave `overlap.json` in `folder`.

    The model is the one that the first circuit names; `loading` are other fields of its `ModelSpec` (its `name`, where it lies
    elsewhere now): no file consents to code.
    """
    places = [path.resolve() for path in paths]  # the current folder has a name too
    names = [(place.parent if place.name == CIRCUIT else place).name for place in places]
    circuits = {name: load_circuit(path) for name, path in zip(names, paths, strict=True)}
    if len(circuits) < len(paths):
        circuits = {str(path): load_circuit(path) for path in paths}
    check_overlap(circuits, remove)  # before the model is loaded
    spec = next(iter(circuits.values())).description.get("model_spec", {})
    if not (spec or loading.get("name")):
        raise MismatchError(
            f"{paths[0]} does not say which model it is of, as it was not written by `causalprune circuit`: name it (--model)"
        )
    known = {key: spec[key] for key in KNOWN if key in spec}
    with options.stage("loading model"):
        try:
            decoder = load(ModelSpec(**{**known, **loading}))
        except ModelError as error:
            raise ModelError(f"the model of {paths[0]}: {error} (--model)") from error
    found = overlap(circuits, decoder, remove=remove, folder=folder, stage=options.stage)
    write_json(folder / OVERLAP, {"overlap": dataclasses.asdict(found)})
    return found
