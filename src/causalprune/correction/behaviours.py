"""What a model writes of its own, judged: continuations that show a behaviour are undesired samples, the others are to stay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalprune.core import DataError, Example, OptionError
from causalprune.evaluation import (
    Judge,
    Settings,
    Written,
    is_taken,
    judge_of,
    load_scorers,
    read_phrases,
    repeats,
    repetition,
    spans,
)

BAR = 0.5
"""Value from which on a continuation shows a behaviour, where nothing else is asked for."""
OWN = "behaviour"
"""Name of a user's function that is a behaviour, where its own is taken."""
CLEAN = "clean: "
"""Before the name of a source: what the model itself writes there, the likeliest token everywhere, without the behaviour."""
REPEATING = ("loops", "rep4")


@dataclass(frozen=True)
class Sought:
    """A behaviour: its name as asked for, what judges continuations, and the value from which on they show it."""

    name: str
    judge: Judge
    bar: float

    def marks(self, new: Sequence[int], text: str, tokenizer: Any) -> list[bool]:
        """Return which new tokens show the behaviour: those that repeat a 4-gram, those of a phrase, or all of them."""
        if self.judge.name in REPEATING:
            return repeats(new)
        if self.judge.name != "phrases":
            return [True] * len(new)
        ends = [len(tokenizer.decode(new[: end + 1], skip_special_tokens=True)) for end in range(len(new))]
        found, begins = spans(text, self.judge.phrases), [0, *ends]
        return [any(begins[i] < last and first < end for first, last in found) for i, end in enumerate(ends)]


def sought(word: str, bar: float | None = None) -> Sought:
    """Return the behaviour of a name: loops, rep4, phrases:FILE, or module:function, which scores texts.

    Raises:
        OptionError: there is no such behaviour, list or function, the list is empty, or the bar is no finite number.
    """
    if bar is not None and not math.isfinite(bar):
        raise OptionError(f"a bar is a finite number, as {BAR}, not {bar}")
    head, colon, rest = word.partition(":")
    if word in REPEATING:
        judge = judge_of(word, Settings())
    elif head == "phrases" and rest:
        judge = judge_of("phrases", Settings(phrases=read_phrases(Path(rest))))
    elif colon and head and rest:
        name, scorers = OWN if is_taken(rest) else rest, load_scorers([f"{OWN}={word}"])
        judge = judge_of(name, Settings(scorers={name: scorers[OWN]}))
    else:
        raise OptionError(
            f"unknown behaviour {word!r}: choices are loops, rep4, phrases:FILE (a list, one a line) and module:function, "
            "which scores texts"
        )
    return Sought(word, judge, BAR if bar is None else bar)


@dataclass(frozen=True, eq=False)
class Judged:
    """Continuations of one source: their values, and the samples that come of them, by number; neither where it has no mark."""

    source: str
    written: Written
    values: tuple[float, ...]
    undesired: dict[int, Example]
    clean: dict[int, Example]


def judged(source: str, written: Written, wanted: Sought, tokenizer: Any) -> Judged:
    """Return what continuations are: samples of the behaviour with the tokens that show it as targets, or clean ones.

    Of clean ones all other tokens are targets (all, where a score is about whole texts): texts below the bar have some of the
    behaviour too, and that is not to be preserved.
    """
    if written.broken:
        raise DataError(f"{source}: the model predicts what is not a number, so what it writes says nothing")
    values = wanted.judge.values(written)
    undesired, clean = dict[int, Example](), dict[int, Example]()
    each = zip(written.problems, written.tokens, written.texts, values, strict=True)
    for number, (problem, (prompt, new), text, value) in enumerate(each):
        marks = wanted.marks(new, text, tokenizer)
        shown, tokens = value >= wanted.bar, (*prompt, *new)
        if not new or (shown and not any(marks)):
            continue
        own = marks if shown or all(marks) else [not one for one in marks]
        mask = (*[False] * len(prompt), *own)
        kind, name = (undesired, source) if shown else (clean, CLEAN + source)
        kind[number] = Example(tokens, mask.index(True), name, problem.content, mask)
    return Judged(source, written, values, undesired, clean)


def check_shown(found: Sequence[Judged], wanted: Sought) -> None:
    """Raise `DataError` where no continuation shows the behaviour, or all do."""
    values = [value for own in found for value in own.values]
    texts = [text for own in found for text in own.written.texts]
    shown = sum(value >= wanted.bar for value in values)
    if not any(own.clean for own in found):
        if shown < len(values):
            raise DataError(
                f"the {len(values) - shown} continuations that do not show {wanted.name} are empty, so there is no clean text beside "
                "the others: take other prompts"
            )
        lowest = min(values) + 0.0
        either = wanted.judge.name in ("loops", "phrases")  # 0 or 1, whatever the bar
        higher = "" if either or lowest == max(values) else f"raise the bar (--bar above {lowest}), or "
        raise DataError(
            f"all {len(values)} continuations show {wanted.name}, so there is no clean text beside them: {higher}take more or other "
            "prompts"
        )
    if not any(own.undesired for own in found):
        doubts, bar, above = [value + 0.0 for value in values], "--bar", wanted.bar  # no -0
        if wanted.judge.name == "loops":
            doubts = [repetition(new) for own in found for _, new in own.written.tokens]
            bar, above = "--behaviour rep4 --bar", math.inf
        most = max(range(len(values)), key=lambda i: doubts[i])
        told = ": "
        if min(doubts) < doubts[most] < above:
            one = f"{texts[most][:80]!r} ({doubts[most]:.2g})"
            told = f". The most suspicious one is {one}: lower the bar ({bar} {doubts[most]}), or "
        raise DataError(
            f"{shown} of {len(values)} continuations show {wanted.name}: nothing to take out{told}take more or other prompts"
        )
