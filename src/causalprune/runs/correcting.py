"""Corrections as the command line asks for them: a model, what it should not do, what is to stay, one checkpoint."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from causalprune.calibration import OWN, OWN_TEXT, TEXT_SOURCES, load_problems, with_limit
from causalprune.checkpoints import check_destination, save, warn_unpacked
from causalprune.core import (
    Calibration,
    DataError,
    EvalResult,
    Ledger,
    forget,
    git_commit,
    size_of,
    versions,
)
from causalprune.correction import (
    CORRECTION,
    FEWEST,
    Corrected,
    check_contrast,
    check_parts,
    correct,
    for_good,
    halves,
    sentences,
)
from causalprune.evaluation import OPENING, kept_rows
from causalprune.runs.cells import load, outlined
from causalprune.runs.fitting import check_trained
from causalprune.runs.plans import Job, check_loading, priced
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.single import Options
from causalprune.runs.traces import calibrated
from causalprune.runs.undesired import CorrectionSpec, Study

SESSIONS = "sessions.ledger"
UPDATING = {"none": 0, "refit": 12, "distill": 21}
"""Passes over what is to be preserved that an update takes, about."""
PROBLEM_TOKENS, TRIALS, AGAIN, WRITING = 200, 6, 3, 3
"""For prices: tokens of a problem, sizes that are measured in a round, and in one that begins with the number of the round before,
and what writing costs beside reading."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """What came of a correction: what was taken out, results before and after on the deciding half, and what is to be said.

    `minutes` are those of all sessions, None where one was killed.
    """

    corrected: Corrected
    before: tuple[EvalResult, ...]
    after: tuple[EvalResult, ...]
    sentences: tuple[str, ...]
    minutes: float | None


def correct_checkpoint(
    spec: ModelSpec, asked: CorrectionSpec, wanted: CalibrationSpec, output: Path, options: Options
) -> Fixed:
    """Correct a model and save it; what a stopped run had finished is in `<output>.correction` until the output is there.

    Of `wanted` seed, template, turns and the longest problem count.
    """
    start = time.perf_counter()
    check_destination(output, options.overwrite)
    sized(asked, options.data_dir)
    kept_in = output.with_name(f"{output.name}.correction")
    with options.stage("loading model"):
        decoder = load(spec)
    warn_unpacked(decoder)
    check_contrast(decoder, asked.contrast)
    settings = wanted.settings(options.data_dir, max_new_tokens=asked.new_tokens)
    with _session(kept_in, start) as minutes:
        fixed = _corrected(Study(decoder, asked, settings, kept_in, options), wanted, output, minutes)
    forget(kept_in)
    return fixed


@contextmanager
def _session(folder: Path, start: float) -> Iterator[Callable[[], float | None]]:
    """Yield what tells the minutes since the start, with those of stopped sessions; None where one of them was killed.

    The folder goes where the work ends with an error, and nothing is there to go on from.
    """
    with Ledger(folder / SESSIONS, {}, whole=str(folder)) as book:
        before = list(book.rows.values())  # None where one begins, and its seconds where it ends
        done = [own for own in before if own is not None]
        book.append(str(len(before)), None)
        try:
            killed = len(before) > 2 * len(done)
            yield lambda: None if killed else (sum(done) + time.perf_counter() - start) / 60
        finally:
            book.append(str(len(before) + 1), time.perf_counter() - start)
            if [own.name for own in folder.iterdir()] == [SESSIONS]:
                forget(folder)


def _corrected(
    study: Study, wanted: CalibrationSpec, output: Path, minutes: Callable[[], float | None]
) -> Fixed:
    decoder, asked, options = study.decoder, study.asked, study.options
    written = any(name == OWN_TEXT or name.startswith(OWN) for name in asked.preserved)
    drawn = [] if written else drawn_for(study, wanted)  # else refused after texts are written
    bad, clean = study.samples()
    drawn = to_stay(study, drawn or drawn_for(study, wanted))
    stays = joined([*drawn, clean])
    shown = study.before(halves(bad, stays, decoder.tokenizer)[1].undesired)
    contrast = dataclasses.replace(asked.contrast, seed=wanted.seed, max_batch_tokens=options.batch_tokens)
    found = correct(decoder, bad, stays, contrast, kept_in=study.kept_in, stage=options.stage)
    before, after, texts = study.after(shown)
    said = (*study.told(before, after), *sentences(found), *filter(None, [for_good(found, decoder, output)]))
    if not study.found:
        before, after = found.pairs
    fixed = Fixed(found, before, after, said, minutes())
    with options.stage("saving"):
        size = dict.fromkeys(("before", "after"), asdict(size_of(decoder)))
        sources: dict[str, Any] = {"sources": asked.preserved, "fingerprint": stays.fingerprint}
        sources |= {"drawn": [own.description for own in drawn]}
        known = [line.replace(str(output), output.name) for line in said]  # the card may be published
        own = found.described() | study.described() | {"sentences": known}
        record = {"correction": own, "texts": texts, "rows": _rows(before, after), "minutes": fixed.minutes}
        beside = {CORRECTION: record | {"versions": versions(), "git_commit": git_commit()}}
        run = {"size": size, "correction": own, "calibration": sources}
        save(decoder, output, found, manifest=run, overwrite=options.overwrite, beside=beside)
    return fixed


def _rows(before: Sequence[EvalResult], after: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Return results as rows of a run: those of the model before are the first, which others are compared with."""
    rows = (("dense", "dense", before), ("corrected", "correct", after))
    return [
        {"label": label, "criterion": name, "scope": None, "sparsity": 0.0, "results": kept_rows(own)}
        for label, name, own in rows
    ]


def drawn_for(study: Study, wanted: CalibrationSpec) -> list[Calibration]:
    """Return what is to be preserved: text in windows, and problems as long as `wanted` allows."""
    counts, found = study.asked.preserved, []
    texts = {name: count for name, count in counts.items() if name in (*TEXT_SOURCES, OWN_TEXT)}
    problems = {name: count for name, count in counts.items() if name not in texts}
    with study.options.stage("calibration data") as tell:
        for some, longest in ((texts, study.asked.window), (problems, wanted.max_tokens)):
            if some:
                task = tuple(f"{name}:{count}" for name, count in some.items())
                own = dataclasses.replace(wanted, task=task, subsets=2, max_tokens=longest, preserve=())
                found.append(calibrated(study.decoder, own, study.options.data_dir, on_progress=tell))
    return found


def to_stay(study: Study, drawn: Sequence[Calibration]) -> list[Calibration]:
    """Return what was drawn in the halves of what the model was let to answer.

    Problems that it answered are in the half of those answers; answers of its own count as clean texts, but for those that show
    the behaviour.
    """
    found = []
    for own in drawn:
        subset = [
            study.half_of.get(e.content, half) for e, half in zip(own.examples, own.subset, strict=True)
        ]
        names = [name for name, count in own.description["sources"].items() for _ in range(count)]
        kept = [
            (study.clean(e, name) if name.startswith(OWN) else e, half)
            for e, name, half in zip(own.examples, names, subset, strict=True)
        ]
        stay = [(e, half) for e, half in kept if e is not None]
        if len(stay) < len(kept):
            warnings.warn(
                f"{len(kept) - len(stay)} answers of the model's own show {study.asked.behaviour}: they are not to stay",
                stacklevel=2,
            )
        examples, halved = zip(*stay, strict=True) if stay else ((), ())
        found.append(dataclasses.replace(own, examples=examples, subset=halved))
    return found


def joined(parts: Sequence[Calibration]) -> Calibration:
    """Return samples of several sources with the halves that they belong to."""
    examples = [example for own in parts for example in own.examples]
    return Calibration(tuple(examples), tuple(half for own in parts for half in own.subset))


def sized(asked: CorrectionSpec, data_dir: Path | str | None) -> tuple[dict[str, int], dict[str, int], int]:
    """Return how many prompts of each source there are, how many samples of each that is to stay, and of what is undesired.

    Raises:
        CausalPruneError: a source does not exist, cannot be read, or has too little to be cut into halves.
    """
    prompts, stays, samples = dict[str, int](), dict[str, int](), 0
    load = partial(load_problems, split="calibration", data_dir=data_dir)
    for name, count in map(with_limit, asked.asked if asked.behaviour else ()):
        there = len(load(name, with_targets=False))
        prompts[name] = min(count or there, there)
    if asked.undesired is not None and (samples := len(load(str(asked.undesired)))) < FEWEST:
        raise DataError(f"{asked.undesired}: {samples} undesired samples are too few: give {FEWEST} or more")
    for name, count in asked.preserved.items():
        source = name.removeprefix(OWN)
        there = count if source == OWN_TEXT else len(load(source, with_text=source == name))
        stays[name] = count if source in TEXT_SOURCES else min(count, there)
        if stays[name] < 2:
            raise DataError(f"{name} has too few samples to be cut into halves: give more of it")
    return prompts, stays, samples


def _tokens(counts: Mapping[str, int], text: int) -> int:
    """Return the tokens of so many samples of each source, where a text has so many."""
    texts = (*TEXT_SOURCES, OWN_TEXT)
    return sum(count * (text if name in texts else PROBLEM_TOKENS) for name, count in counts.items())


def planned_correction(
    spec: ModelSpec, asked: CorrectionSpec, output: Path, options: Options
) -> tuple[list[Job], float]:
    """Return what a correction costs, stage by stage, and the seconds that takes here; no weights are loaded.

    Half of the texts is taken to show the behaviour; many searches end earlier.

    Raises:
        CausalPruneError: it cannot be made, as far as that is seen without weights.
    """
    check_destination(output, options.overwrite)
    check_loading(spec)
    check_trained(spec, asked.contrast.update)
    counts, stays, samples = sized(asked, options.data_dir)
    check_parts(outlined(spec), asked.contrast)
    prompts = sum(counts.values())
    texts = _tokens(counts, OPENING) + prompts * asked.new_tokens
    bad = texts / 2 if prompts else samples * PROBLEM_TOKENS
    good = _tokens(stays, asked.window) + texts / 2
    rounds, how = asked.contrast.rounds, asked.contrast.how()
    scored = 3 * len(how.gates) * bad / 2 + 3 * how.draws * good / 2
    number = sum(stays.values()) + (prompts or samples)
    sizes = TRIALS + (rounds - 1) * (AGAIN if asked.contrast.anew else TRIALS)
    jobs = [
        Job("texts", prompts, int(WRITING * texts)),
        Job("scores", rounds, int(rounds * scored)),
        Job("sizes", sizes, int(sizes * (bad + good) / 2)),
        Job(f"update ({asked.contrast.update})", 1, int(UPDATING[asked.contrast.update] * good / 2)),
        Job("texts and losses after", number, int(WRITING * texts / 2 + (bad + good) / 2)),
    ]
    jobs = [job for job in jobs if job.tokens]
    return jobs, priced(spec, sum(job.tokens for job in jobs))
