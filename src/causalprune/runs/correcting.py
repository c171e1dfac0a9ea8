"""Corrections as the command line asks for them: a model, what it should not do, what is to stay, one checkpoint."""

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from causalprune.calibration import OWN, OWN_TEXT, TEXT_SOURCES, load_problems, with_limit
from causalprune.checkpoints import check_destination, save, warn_unpacked
from causalprune.core import Calibration, Decoder, EvalResult, Progress, forget, git_commit, size_of, versions
from causalprune.correction import (
    CORRECTION,
    Corrected,
    check_contrast,
    correct,
    for_good,
    halves,
    sentences,
)
from causalprune.evaluation import OPENING, kept_rows
from causalprune.runs.cells import load
from causalprune.runs.plans import Job, priced
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.single import Options
from causalprune.runs.traces import calibrated
from causalprune.runs.undesired import CorrectionSpec, Study

UPDATING = {"none": 0, "refit": 12, "distill": 21}
"""Passes over what is to be preserved that an update takes, about."""
PROBLEM_TOKENS, TRIALS, WRITING = 200, 6, 3
"""For prices: tokens of a problem, sizes that are measured in a round, and what writing costs beside reading."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """What came of a correction: what was taken out, results before and after on the deciding half, and what is to be said.

    `minutes` is None where it went on after a stop.
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
    counts = asked.preserved
    kept_in = output.with_name(f"{output.name}.correction")
    begun = kept_in.exists()
    with options.stage("loading model"):
        decoder = load(spec)
    warn_unpacked(decoder)
    check_contrast(decoder, asked.contrast)
    settings = wanted.settings(options.data_dir, max_new_tokens=asked.new_tokens)
    study = Study(decoder, asked, settings, kept_in, options)
    bad, clean = study.samples()
    with options.stage("calibration data") as progress:
        drawn = to_stay(decoder, counts, study, wanted, progress)
    stays = joined([*drawn, clean])
    shown = study.before(halves(bad, stays, decoder.tokenizer)[1].undesired)
    contrast = dataclasses.replace(asked.contrast, seed=wanted.seed, max_batch_tokens=options.batch_tokens)
    found = correct(decoder, bad, stays, contrast, kept_in=kept_in, stage=options.stage)
    before, after, texts = study.after(shown)
    said = (*study.told(before, after), *sentences(found), *filter(None, [for_good(found, decoder)]))
    minutes = None if begun else (time.perf_counter() - start) / 60  # else of the last session alone
    fixed = Fixed(found, before, after, said, minutes)
    with options.stage("saving"):
        size = dict.fromkeys(("before", "after"), asdict(size_of(decoder)))
        sources = {
            "sources": counts,
            "fingerprint": stays.fingerprint,
            "drawn": [own.description for own in drawn],
        }
        own = found.described() | study.described() | {"sentences": list(said)}
        record = {
            "correction": own,
            "texts": texts,
            "rows": _rows(before, after),
            "minutes": fixed.minutes,
            "versions": versions(),
            "git_commit": git_commit(),
        }
        beside = {CORRECTION: record}
        run = {"size": size, "correction": own, "calibration": sources}
        save(decoder, output, found, manifest=run, overwrite=options.overwrite, beside=beside)
    forget(kept_in)
    return fixed


def _rows(before: Sequence[EvalResult], after: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Return results as rows of a run: those of the model before are the first, which others are compared with."""
    rows = (("dense", "dense", before), ("corrected", "correct", after))
    return [
        {"label": label, "criterion": name, "scope": None, "sparsity": 0.0, "results": kept_rows(own)}
        for label, name, own in rows
    ]


def to_stay(
    decoder: Decoder, counts: Mapping[str, int], study: Study, wanted: CalibrationSpec, tell: Progress
) -> list[Calibration]:
    """Return what is to be preserved: text in windows, and problems as long as `wanted` allows.

    Problems that the model was let to answer are in the half of those answers; answers of its own count as clean texts, but
    for those that show the behaviour.
    """
    texts = {name: count for name, count in counts.items() if name in (*TEXT_SOURCES, OWN_TEXT)}
    problems = {name: count for name, count in counts.items() if name not in texts}
    found = []
    for some, longest in ((texts, study.asked.window), (problems, wanted.max_tokens)):
        if some:
            task = tuple(f"{name}:{count}" for name, count in some.items())
            own = dataclasses.replace(wanted, task=task, subsets=2, max_tokens=longest, preserve=())
            drawn = calibrated(decoder, own, study.options.data_dir, on_progress=tell)
            each = zip(drawn.examples, drawn.subset, strict=True)
            subset = tuple(study.half_of.get(example.content, half) for example, half in each)
            names = [name for name, count in drawn.description["sources"].items() for _ in range(count)]
            kept = [
                (study.clean(own, name) if name.startswith(OWN) else own, half)
                for own, name, half in zip(drawn.examples, names, subset, strict=True)
            ]
            stay = [(own, half) for own, half in kept if own is not None]
            if len(stay) < len(kept):
                warnings.warn(
                    f"{len(kept) - len(stay)} answers of the model's own show {study.asked.behaviour}: they are not to stay",
                    stacklevel=2,
                )
            examples, subset = zip(*stay, strict=True) if stay else ((), ())
            found.append(dataclasses.replace(drawn, examples=examples, subset=subset))
    return found


def joined(parts: Sequence[Calibration]) -> Calibration:
    """Return samples of several sources with the halves that they belong to."""
    examples = [example for own in parts for example in own.examples]
    return Calibration(tuple(examples), tuple(half for own in parts for half in own.subset))


def planned_correction(spec: ModelSpec, asked: CorrectionSpec) -> tuple[list[Job], float]:
    """Return what a correction costs, stage by stage, and the seconds that takes here; no weights are loaded.

    Half of the texts is taken to show the behaviour; many searches end earlier.
    """
    prompts, samples = [], 0
    for word in asked.asked if asked.behaviour else ():
        name, count = with_limit(word)
        own = count or len(load_problems(name, "calibration", with_targets=False))
        prompts += [OPENING if name in TEXT_SOURCES else PROBLEM_TOKENS] * own
    texts = sum(prompts) + len(prompts) * asked.new_tokens
    if asked.undesired is not None:
        samples = len(load_problems(str(asked.undesired), "calibration"))
    bad = texts / 2 if prompts else samples * PROBLEM_TOKENS
    sizes = {
        name: asked.window if name in (*TEXT_SOURCES, OWN_TEXT) else PROBLEM_TOKENS
        for name in asked.preserved
    }
    good = sum(sizes[name] * count for name, count in asked.preserved.items()) + texts / 2
    rounds, how = asked.contrast.rounds, asked.contrast.how()
    scored = 3 * len(how.gates) * bad / 2 + 3 * how.draws * good / 2
    number = sum(asked.preserved.values()) + (len(prompts) or samples)
    jobs = [
        Job("texts", len(prompts), int(WRITING * texts)),
        Job("scores", rounds, int(rounds * scored)),
        Job("sizes", rounds * TRIALS, int(rounds * TRIALS * (bad + good) / 2)),
        Job(f"update ({asked.contrast.update})", 1, int(UPDATING[asked.contrast.update] * good / 2)),
        Job("texts and losses after", number, int(WRITING * texts / 2 + (bad + good) / 2)),
    ]
    jobs = [job for job in jobs if job.tokens]
    return jobs, priced(spec, sum(job.tokens for job in jobs))
