"""Corrections as the command line asks for them: a model, what it should not do, what is to stay, one checkpoint."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from causalprune.calibration import (
    OWN_TEXT,
    TEXT_SOURCES,
    Problem,
    is_file,
    load_problems,
    taken,
    with_limit,
)
from causalprune.checkpoints import check_destination, save, warn_unpacked
from causalprune.core import (
    Calibration,
    DataError,
    Decoder,
    EvalResult,
    Example,
    Ledger,
    OptionError,
    Progress,
    forget,
    git_commit,
    say,
    size_of,
    versions,
)
from causalprune.correction import (
    CORRECTION,
    Contrast,
    Corrected,
    Judged,
    check_shown,
    correct,
    for_good,
    halves,
    judged,
    sentences,
    short,
    sought,
)
from causalprune.evaluation import (
    CONTINUATION,
    OPENING,
    Begun,
    Settings,
    Written,
    begin,
    continued,
    headline,
    kept_rows,
    paired_difference,
    reader_for,
)
from causalprune.runs.cells import load
from causalprune.runs.plans import Job, priced
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.single import Options
from causalprune.runs.traces import calibrated

PROMPTS, PRESERVE = ("wikitext2:200",), ("wikitext2:24", "gsm8k:48")
TEXTS, PROBLEMS = 24, 48
"""Windows of text, and problems, of a source to preserve without a count."""
WINDOW = 1024
"""Tokens of a window of text that is to be preserved: harm to copying over long distances shows nowhere else."""
SHOWN = 5
"""Texts before and after that a record shows."""
UPDATING = {"none": 0, "refit": 12, "distill": 21}
"""Passes over what is to be preserved that an update takes, about."""
PROBLEM_TOKENS, TRIALS, WRITING = 200, 6, 3
"""For prices: tokens of a problem, sizes that are measured in a round, and what writing costs beside reading."""


@dataclass(frozen=True)
class CorrectionSpec:
    """What a model should not do, and what is to stay.

    `undesired` is a file of prompts and targets (with `instead`: what should be said); or a `behaviour` is looked for in what
    the model writes after `prompts`, in `new_tokens`; from the value `bar` on a text shows it. What is in `preserve` comes in
    windows of so many tokens where it is text.
    """

    behaviour: str | None = None
    undesired: Path | None = None
    prompts: tuple[str, ...] = ()
    bar: float | None = None
    preserve: tuple[str, ...] = PRESERVE
    window: int = WINDOW
    new_tokens: int = CONTINUATION
    contrast: Contrast = Contrast()

    def __post_init__(self) -> None:
        if (self.behaviour is None) == (self.undesired is None):
            raise OptionError(
                "say what the model should not do: --behaviour with --prompts, or a file of --undesired samples, one of both"
            )
        if self.undesired is not None and (self.prompts or self.bar is not None):
            raise OptionError(
                "--prompts and --bar are about a --behaviour: leave them out where samples are given"
            )
        if self.behaviour is not None:
            sought(self.behaviour, self.bar)

    @property
    def asked(self) -> tuple[str, ...]:
        """Prompts, those of the default where none are named."""
        return self.prompts or PROMPTS

    @property
    def preserved(self) -> dict[str, int]:
        """How many samples of each source are to be preserved."""
        named = [] if self.preserve == ("none",) else list(map(with_limit, self.preserve))
        if len(dict(named)) < len(named):
            raise OptionError(f"a source is named twice in {', '.join(self.preserve)}: name each once")
        texts = (*TEXT_SOURCES, OWN_TEXT)
        return {name: count or (TEXTS if name in texts else PROBLEMS) for name, count in named}


@dataclass(frozen=True, eq=False)
class Fixed:
    """What came of a correction: what was taken out, results before and after on what chose nothing, and what is to be said."""

    corrected: Corrected
    before: tuple[EvalResult, ...]
    after: tuple[EvalResult, ...]
    sentences: tuple[str, ...]
    minutes: float


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
    with options.stage("loading model"):
        decoder = load(spec)
    warn_unpacked(decoder)
    settings = Settings(
        data_dir=options.data_dir,
        seed=wanted.seed,
        max_tokens=wanted.max_tokens,
        chat=wanted.chat,
        thinking=wanted.thinking,
        turns=wanted.turns,
        fold_system=wanted.fold_system,
        max_new_tokens=asked.new_tokens,
    )
    study = _Study(decoder, asked, settings, kept_in, options)
    bad, clean = study.samples()
    with options.stage("calibration data") as progress:
        drawn = _drawn(decoder, counts, asked.window, wanted, options.data_dir, progress)
    stays = _joined([*drawn, clean])
    shown = study.before(halves(bad, stays, decoder.tokenizer)[1].undesired)
    contrast = dataclasses.replace(asked.contrast, seed=wanted.seed, max_batch_tokens=options.batch_tokens)
    found = correct(decoder, bad, stays, contrast, kept_in=kept_in, stage=options.stage)
    before, after, texts = study.after(shown)
    said = (*study.told(before, after), *sentences(found), *filter(None, [for_good(found, decoder)]))
    fixed = Fixed(found, before, after, said, (time.perf_counter() - start) / 60)
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


def _drawn(
    decoder: Decoder,
    counts: Mapping[str, int],
    window: int,
    wanted: CalibrationSpec,
    data_dir: Path | None,
    tell: Progress,
) -> list[Calibration]:
    """Return what is to be preserved: text in windows, and problems as long as `wanted` allows."""
    texts = {name: count for name, count in counts.items() if name in (*TEXT_SOURCES, OWN_TEXT)}
    problems = {name: count for name, count in counts.items() if name not in texts}
    found = []
    for some, longest in ((texts, window), (problems, wanted.max_tokens)):
        if some:
            task = tuple(f"{name}:{count}" for name, count in some.items())
            own = dataclasses.replace(wanted, task=task, subsets=2, max_tokens=longest, preserve=())
            found.append(calibrated(decoder, own, data_dir, on_progress=tell))
    return found


def _joined(parts: Sequence[Calibration]) -> Calibration:
    examples = [example for own in parts for example in own.examples]
    return Calibration(tuple(examples), tuple(half for own in parts for half in own.subset))


@dataclass(eq=False)
class _Study:
    """What the model writes before and after."""

    decoder: Decoder
    asked: CorrectionSpec
    settings: Settings
    kept_in: Path
    options: Options

    def samples(self) -> tuple[Calibration, Calibration]:
        """Return undesired samples, and clean texts of the model's own, with the halves that they belong to."""
        asked, self.found = self.asked, list[Judged]()
        if asked.undesired is not None:
            reader = reader_for(self.decoder, self.settings)
            given = taken(reader, str(asked.undesired), "calibration", None)
            return Calibration(tuple(given), ()), Calibration((), ())
        self.wanted = sought(str(asked.behaviour), asked.bar)
        for word in asked.asked:
            name, count = with_limit(word)
            own = dataclasses.replace(self.settings, limit=count)
            begun = begin(self.decoder, name, "calibration", own)
            with self.options.stage(f"texts of {name}") as tell:
                say(tell, unit="texts")
                written = self._written(name, begun, tell)
            self.found.append(judged(name, written, self.wanted, self.decoder.tokenizer))
        check_shown(self.found, self.wanted)
        bad = _halved([own.undesired for own in self.found])
        good = _halved([own.clean for own in self.found])
        for what, part in ((f"show {self.wanted.name}", bad), ("are clean", good)):
            if set(part.subset) != {0, 1}:
                raise DataError(
                    f"{len(part.examples)} continuations {what}, all of them in one half of the prompts: take more prompts"
                )
        return bad, good

    def _written(self, name: str, begun: Begun, tell: Progress) -> Written:
        """Return how the model goes on, from the ledger where that is written already."""
        digest = hashlib.sha256(repr(list(map(tuple, begun[1]))).encode()).hexdigest()
        identity = {"model": self.decoder.fingerprint}
        path = self.kept_in / "texts.ledger"
        with Ledger(path, identity) as book:
            key = f"{name}:{self.asked.new_tokens}:{digest[:16]}"
            if key not in book.rows:
                found = continued(self.decoder, name, "calibration", begun, self.settings, tell)
                book.append(
                    key,
                    {
                        "texts": list(found.texts),
                        "new": [list(new) for _, new in found.tokens],
                        "broken": found.broken,
                        "description": found.description,
                    },
                )
            row = book.rows[key]
        pairs = zip(begun[1], row["new"], strict=True)
        return Written(
            begun[0],
            tuple(row["texts"]),
            (True,) * len(row["texts"]),
            row["broken"],
            row["description"],
            tuple((tuple(prompt), tuple(new)) for prompt, new in pairs),
        )

    def before(self, deciding: Sequence[Example]) -> list[Written]:
        """Return the texts that are written again afterwards: those of the deciding half, or after some given samples' prompts."""
        if self.found:
            return [_part(own.written, 1) for own in self.found]
        decode = self.decoder.tokenizer.decode
        few = [dataclasses.replace(own, mask=None) for own in deciding[:SHOWN]]
        problems = [
            Problem(
                own.source,
                decode(own.tokens[: own.target_start], skip_special_tokens=True),
                decode(own.tokens[own.target_start :], skip_special_tokens=True),
            )
            for own in few
        ]
        begun = problems, [own.tokens[: own.target_start] for own in few]
        with self.options.stage("texts before") as tell:
            return [self._written(few[0].source, begun, tell)]

    def after(
        self, before: Sequence[Written]
    ) -> tuple[tuple[EvalResult, ...], tuple[EvalResult, ...], list[dict[str, str]]]:
        """Return results before and after on the deciding half's prompts, and some texts side by side."""
        results: tuple[list[EvalResult], list[EvalResult]] = ([], [])
        texts = []
        for own in before:
            name = own.problems[0].source
            begun = own.problems, [prompt for prompt, _ in own.tokens]
            with self.options.stage(f"texts of {name}, after") as tell:
                say(tell, unit="texts")
                again = continued(self.decoder, name, "calibration", begun, self.settings, tell)
            if self.found:
                judge = self.wanted.judge
                for found, written in zip(results, (own, again), strict=True):
                    told = {"higher_is_better": False, **judge.about, "split": "calibration"}
                    task = f"{name}_{judge.name}"
                    found.append(written.result(task, judge.name, judge.values(written), **told))
                values = judge.values(own)
                order = sorted(range(len(values)), key=lambda i, of=values: -of[i])  # type: ignore[misc]
            else:
                order = list(range(len(own.texts)))
            texts += [
                {"prompt": own.problems[i].prompt, "before": own.texts[i], "after": again.texts[i]}
                for i in order[:SHOWN]
            ]
        return tuple(results[0]), tuple(results[1]), texts[:SHOWN]

    def told(self, before: Sequence[EvalResult], after: Sequence[EvalResult]) -> Iterator[str]:
        """Yield in words how much of the behaviour is left."""
        for one, other in zip(before, after, strict=True):
            yield changed(one, other)

    def described(self) -> dict[str, Any]:
        """Return what records say of what was asked."""
        asked = self.asked
        if asked.undesired is not None:
            return {"behaviour": asked.undesired.name, "prompts": [], "preserved": asked.preserved}
        counts = {"texts": sum(len(own.values) for own in self.found)}
        counts |= {
            kind: sum(len(getattr(own, kind)) for own in self.found) for kind in ("undesired", "clean")
        }
        about = {"behaviour": asked.behaviour, "bar": self.wanted.bar, "prompts": list(asked.asked)}
        return {**about, "continuations": counts, "preserved": asked.preserved}


def _halved(found: Sequence[Mapping[int, Example]]) -> Calibration:
    """Return samples in two subsets: every other prompt of each source decides."""
    pairs = [(example, number % 2) for own in found for number, example in own.items()]
    return Calibration(tuple(e for e, _ in pairs), tuple(half for _, half in pairs))


def _part(written: Written, first: int) -> Written:
    """Return every other continuation, from one on."""
    each = slice(first, None, 2)
    return dataclasses.replace(
        written,
        problems=written.problems[each],
        texts=written.texts[each],
        over=written.over[each],
        tokens=written.tokens[each],
    )


def changed(before: EvalResult, after: EvalResult) -> str:
    """Return in words what became of a measure, in pairs."""
    own = paired_difference(after, before)
    return (
        f"{short(before.task)}: {headline(before):.3g} before, {headline(after):.3g} after, difference {own.difference:+.3g} "
        f"[{own.low:+.3g}, {own.high:+.3g}] on {own.n} prompts that chose nothing"
    )


def planned_correction(spec: ModelSpec, asked: CorrectionSpec) -> tuple[list[Job], float]:
    """Return what a correction costs, stage by stage, and the seconds that takes here; no weights are loaded.

    Half of the texts is taken to show the behaviour; many searches end earlier.
    """
    prompts, samples = [], 0
    for word in asked.asked if asked.behaviour else ():
        name, count = with_limit(word)
        own = count or (
            len(load_problems(name, "calibration", with_targets=False)) if is_file(name) else TEXTS
        )
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
