"""What a model should not do, as the command line asks for it, and what it writes before and after a correction."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalprune.calibration import OWN_TEXT, TEXT_SOURCES, Problem, is_file, taken, with_limit
from causalprune.core import (
    Calibration,
    DataError,
    Decoder,
    EvalResult,
    Example,
    Ledger,
    OptionError,
    Progress,
    say,
)
from causalprune.correction import CLEAN, Contrast, Judged, check_shown, judged, short, sought
from causalprune.evaluation import (
    CONTINUATION,
    Begun,
    Settings,
    Written,
    begin,
    bracketed,
    continued,
    headline,
    paired_difference,
    reader_for,
    room_for,
)
from causalprune.models import positions
from causalprune.runs.single import Options

PROMPTS, PRESERVE = ("wikitext2",), ("wikitext2:24", "gsm8k:48")
OPENINGS = 200
"""Prompts of a source without a count; of a file all."""
TEXTS, PROBLEMS = 24, 48
"""Windows of text, and problems, of a source to preserve without a count."""
WINDOW = 1024
"""Tokens of a window of text that is to be preserved: harm to copying over long distances shows nowhere else."""
SHOWN = 5
"""Texts before and after that a record shows."""


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
        _each_once(self.prompts)
        if "none" in self.preserved or (self.undesired is not None and not self.preserved):
            raise OptionError(
                "--preserve none is for a --behaviour, and alone: name what is to stay with --preserve, as --preserve wikitext2:24"
            )

    @property
    def asked(self) -> tuple[str, ...]:
        """Prompts, those of the default where none are named, with a number for each data set."""
        words = self.prompts or PROMPTS
        return tuple(word if with_limit(word)[1] or is_file(word) else f"{word}:{OPENINGS}" for word in words)

    @property
    def preserved(self) -> dict[str, int]:
        """How many samples of each source are to be preserved."""
        named = {} if self.preserve == ("none",) else _each_once(self.preserve)
        texts = (*TEXT_SOURCES, OWN_TEXT)
        return {name: count or (TEXTS if name in texts else PROBLEMS) for name, count in named.items()}


def _each_once(words: Sequence[str]) -> dict[str, int | None]:
    """Return sources with their counts; `OptionError` where one is named twice."""
    named = dict(map(with_limit, words))
    if len(named) < len(words):
        raise OptionError(f"a source is named twice in {', '.join(words)}: name each once")
    return named


@dataclass(eq=False)
class Study:
    """What the model writes before and after."""

    decoder: Decoder
    asked: CorrectionSpec
    settings: Settings
    kept_in: Path
    options: Options
    half_of: dict[str, int] = dataclasses.field(default_factory=dict)
    """Which half prompts are in, by their content, once there are `samples`."""

    def samples(self) -> tuple[Calibration, Calibration]:
        """Return undesired samples, and clean texts of the model's own, with the halves that they belong to."""
        asked, self.found = self.asked, list[Judged]()
        if asked.undesired is not None:
            reader = reader_for(self.decoder, self.settings)
            given = taken(reader, str(asked.undesired), "calibration", None)
            return Calibration(tuple(given), ()), Calibration((), ())
        self.wanted = sought(str(asked.behaviour), asked.bar)
        for name, begun in _starts(self.decoder, asked, self.settings).items():
            with self.options.stage(f"texts of {name}") as tell:
                say(tell, unit="texts")
                written = self._written(name, begun, tell)
            self.found.append(judged(name, written, self.wanted, self.decoder.tokenizer))
        check_shown(self.found, self.wanted)
        for judgement in self.found:
            for number, problem in enumerate(judgement.written.problems):
                self.half_of.setdefault(problem.content, number % 2)
        bad = self._halved([own.undesired for own in self.found])
        good = self._halved([own.clean for own in self.found])
        for what, some in ((f"show {self.wanted.name}", bad), ("are clean", good)):
            if set(some.subset) != {0, 1}:
                raise DataError(
                    f"{len(some.examples)} continuations {what}, all of them in one half of the prompts: take more prompts"
                )
        return bad, good

    def clean(self, answer: Example, name: str) -> Example | None:
        """Return an answer of the model's own as a clean text, without targets that show the behaviour; None where it shows it."""
        if not self.found:
            return dataclasses.replace(answer, source=CLEAN + name)
        prompt, new = answer.tokens[: answer.target_start], answer.tokens[answer.target_start :]
        texts = (self.decoder.tokenizer.decode(new, skip_special_tokens=True),)
        written = Written([Problem(name, "", "")], texts, (True,), False, {}, ((prompt, new),))
        own = judged(name, written, self.wanted, self.decoder.tokenizer).clean.get(0)
        return own and dataclasses.replace(own, content=answer.content)

    def _halved(self, found: Sequence[Mapping[int, Example]]) -> Calibration:
        """Return samples in two subsets, by the halves of their prompts."""
        examples = tuple(example for own in found for example in own.values())
        return Calibration(examples, tuple(self.half_of[example.content] for example in examples))

    def _written(self, name: str, begun: Begun, tell: Progress) -> Written:
        """Return how the model goes on, from the ledger where that is written already."""
        digest = hashlib.sha256(repr(list(map(tuple, begun[1]))).encode()).hexdigest()
        identity = {"model": self.decoder.fingerprint}
        path = self.kept_in / "texts.ledger"
        with Ledger(path, identity, whole=str(self.kept_in)) as book:
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
            parts = [part(own.written, self.half_of, 1) for own in self.found]
            return [own for own in parts if own.texts]
        decode, room = self.decoder.tokenizer.decode, positions(self.decoder.model.config) or math.inf
        fitting = (own for own in deciding if own.target_start + self.asked.new_tokens <= room)
        few = [dataclasses.replace(own, mask=None) for own in itertools.islice(fitting, SHOWN)]
        if not few:
            return []
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
                    told = {**judge.about, "higher_is_better": False, "split": "calibration"}
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


def _starts(decoder: Decoder, asked: CorrectionSpec, settings: Settings) -> dict[str, Begun]:
    """Return what the model goes on from, source by source, where all of it is there and fits."""
    found = {}
    for name, count in map(with_limit, asked.asked):
        own = dataclasses.replace(settings, limit=count, max_new_tokens=asked.new_tokens)
        found[name] = begin(decoder, name, "calibration", own)
        room_for(decoder, name, max(map(len, found[name][1])), own, thinking=False)
    return found


def part(written: Written, half_of: Mapping[str, int], half: int) -> Written:
    """Return the continuations of the prompts of a half."""
    inside = [half_of[problem.content] == half for problem in written.problems]

    def of(values: Sequence[Any]) -> Any:
        return tuple(itertools.compress(values, inside))

    return dataclasses.replace(
        written,
        problems=of(written.problems),
        texts=of(written.texts),
        over=of(written.over),
        tokens=of(written.tokens),
    )


def changed(before: EvalResult, after: EvalResult) -> str:
    """Return in words what became of a measure, in pairs."""
    own = paired_difference(after, before)
    return (
        f"{short(before.task)}: {headline(before):.3g} before, {headline(after):.3g} after, difference {own.difference:+.3g} "
        f"{bracketed(own.low, own.high, own.n)} on the {own.n} prompts of the deciding half"
    )
