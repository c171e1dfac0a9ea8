"""How much a continuation repeats itself, and whether it holds stock phrases: pure functions of tokens and text."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from causalprune.core import OptionError

LONGEST_BLOCK, TIMES = 40, 3
"""A loop is a block of at most so many tokens, so many times in a row, at the end."""


@dataclass(frozen=True)
class Trait:
    """A measure of continuations: called with new tokens, their text, and the phrases that are looked for."""

    score: Callable[[Sequence[int], str, Sequence[str]], float]
    higher_is_better: bool


def repeats(tokens: Sequence[int], n: int = 4) -> list[bool]:
    """Return for every token whether it completes an n-gram that was there before."""
    seen, found = set[tuple[int, ...]](), []
    for end in range(1, len(tokens) + 1):
        own = tuple(tokens[max(end - n, 0) : end])
        found.append(len(own) == n and own in seen)
        seen.add(own)
    return found


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Return 1 − distinct n-grams / n-grams, 0 where there are none (seq-rep-n, Welleck et al., arXiv 1908.04319)."""
    return sum(repeats(tokens, n)) / max(len(tokens) - n + 1, 1)


def loops(tokens: Sequence[int]) -> bool:
    """Tell whether the tokens end in a block of at most `LONGEST_BLOCK` that is there `TIMES` in a row."""
    for size in range(1, min(LONGEST_BLOCK, len(tokens) // TIMES) + 1):
        end = list(tokens[-TIMES * size :])
        if end == end[:size] * TIMES:
            return True
    return False


def uniqueness(text: str) -> float:
    """Return distinct words / words, 1 for no words (response uniqueness, Hatefi et al., arXiv 2506.13727)."""
    words = text.casefold().split()
    return len(set(words)) / len(words) if words else 1.0


def diversity(tokens: Sequence[int]) -> float:
    """Return Π over n = 2 … 4 of 1 − repeated n-grams / n-grams (Su et al., arXiv 2202.06417)."""
    return math.prod(1 - repetition(tokens, n) for n in (2, 3, 4))


def spans(text: str, phrases: Sequence[str]) -> list[tuple[int, int]]:
    """Return where phrases are in a text, from which character to which, without regard to case."""
    every = (
        re.finditer(f"(?=({re.escape(own)}))", text, re.IGNORECASE) for own in phrases
    )  # they may overlap
    return [match.span(1) for own in every for match in own]


def read_phrases(path: Path) -> tuple[str, ...]:
    """Return the phrases that a file lists, one a line; `OptionError` where there are none, or no file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise OptionError(f"cannot read the list of phrases {path}: {cause}") from cause
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise OptionError(f"{path} lists no phrases: write one a line")
    return found


TRAITS: dict[str, Trait] = {
    "rep4": Trait(lambda tokens, text, phrases: repetition(tokens), higher_is_better=False),
    "loops": Trait(lambda tokens, text, phrases: float(loops(tokens)), higher_is_better=False),
    "uniqueness": Trait(lambda tokens, text, phrases: uniqueness(text), higher_is_better=True),
    "diversity": Trait(lambda tokens, text, phrases: diversity(tokens), higher_is_better=True),
    "phrases": Trait(lambda tokens, text, phrases: float(bool(spans(text, phrases))), higher_is_better=False),
}
"""Measures of continuations, by the last word of a task."""
