"""Samples of what a model should not do and of what is to stay, in two halves: one chooses, the other decides."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from causalprune.core import Calibration, DataError, Example

FEWEST = 4
"""Undesired samples that there must be: two in each half."""
Given = Calibration | Sequence[Example]


@dataclass(frozen=True, eq=False)
class Half:
    """One half of both sets. Where undesired samples have `instead`, all of them have."""

    undesired: tuple[Example, ...]
    preserve: tuple[Example, ...]

    @property
    def sources(self) -> list[str]:
        """The sources of what is to stay."""
        return list(dict.fromkeys(example.source for example in self.preserve))

    @property
    def paired(self) -> bool:
        """Whether undesired samples come with what should be said instead."""
        return any(example.instead is not None for example in self.undesired)

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The undesired samples, then what should be said instead."""
        return (*self.undesired, *(e.instead for e in self.undesired if e.instead is not None))

    def described(self) -> dict[str, Any]:
        """Return sizes and SHA-256 of both sets."""
        return {
            "undesired": len(self.undesired),
            "preserve": {s: sum(e.source == s for e in self.preserve) for s in self.sources},
            "undesired_sha256": _digest(self.undesired),
            "preserve_sha256": _digest(self.preserve),
        }


def halves(undesired: Given, preserve: Given, tokenizer: Any = None) -> tuple[Half, Half]:
    """Return the half that chooses and the half that decides.

    Of a `Calibration` in two subsets the first chooses; else every other prompt of each source. Samples of one prompt are in one
    half, whichever set they are of. Repeated samples are left out.

    Raises:
        DataError: a set is empty or too small or has what is no example, both share a sample, or a sample has no target, or the
            one that should be said instead.
    """
    both = [_alone(name, given) for name, given in (("undesired", undesired), ("preserved", preserve))]
    _check(both[0][0], both[1][0], tokenizer)
    known = dict[str, int]()
    sides = [_split(*own, known) for own in both]
    found = [Half(sides[0][at], sides[1][at]) for at in (0, 1)]
    for own, what in zip(found, ("chooses", "decides"), strict=True):
        if len(own.undesired) < FEWEST // 2:
            raise DataError(
                f"{len(both[0][0])} undesired samples are too few: the half that {what} has {len(own.undesired)}, "
                f"and needs {FEWEST // 2}: give more, or more prompts"
            )
    if missing := set(found[0].sources) ^ set(found[1].sources):
        raise DataError(f"{min(missing)} has too few samples to be cut into halves: give more of it")
    if len({example.instead is None for own in found for example in own.undesired}) > 1:
        raise DataError(
            "some undesired samples say what should be said instead, and some do not: give it to all or to none"
        )
    return found[0], found[1]


def _alone(name: str, given: Given) -> tuple[list[Example], list[int] | None]:
    """Return samples without repeated ones, and their subsets where there are two."""
    examples = list(given.examples if isinstance(given, Calibration) else given)
    for number, example in enumerate(examples, 1):
        if not isinstance(example, Example):
            raise DataError(
                f"{name} sample {number} is {type(example).__name__}, and samples are examples: `cp.calibrate` makes them of files"
            )
    subset = list(given.subset) if isinstance(given, Calibration) and given.subset else []
    two = set(subset) == {0, 1}
    first = dict[tuple[int, ...], int]()
    for i, example in enumerate(examples):
        first.setdefault(example.tokens, i)
    if len(first) < len(examples):
        warnings.warn(f"{name}: {len(examples) - len(first)} repeated samples are left out", stacklevel=4)
    kept = sorted(first.values())
    return [examples[i] for i in kept], [subset[i] for i in kept] if two else None


def _split(
    examples: Sequence[Example], subset: Sequence[int] | None, known: dict[str, int]
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return the samples of each half; the halves of prompts that are `known` stay, and others become so."""
    turns = Counter[str]()
    sides: tuple[list[Example], list[Example]] = ([], [])
    for i, example in enumerate(examples):
        if example.content not in known:
            known[example.content] = turns[example.source] % 2 if subset is None else subset[i]
            turns[example.source] += 1
        sides[known[example.content]].append(example)
    return tuple(sides[0]), tuple(sides[1])


def _check(undesired: Sequence[Example], preserve: Sequence[Example], tokenizer: Any) -> None:
    for what, own in (("undesired", undesired), ("preserved", preserve)):
        if not own:
            raise DataError(f"no {what} samples: without both sets there is nothing to contrast")
        for number, example in enumerate(own, 1):
            if not example.target_tokens:
                raise DataError(
                    f"{example.source}, {what} sample {number}: it has no target tokens, so there is nothing to look at: mark some"
                )
    known = {example.tokens for example in preserve}
    if {example.tokens for example in undesired} == known:
        raise DataError("undesired and preserved samples are the same ones: nothing to contrast")
    for number, example in enumerate(undesired, 1):
        same = example.instead is not None and example.instead.tokens == example.tokens
        if same or example.tokens in known:
            text = "" if tokenizer is None else f", {tokenizer.decode(example.tokens)[:60]!r}"
            why, do = "it is among what is to be preserved too", "take it out of one of both"
            if same:
                why, do = "what should be said instead is the same", "give another, or leave it out"
            raise DataError(
                f"{example.source}, undesired sample {number}{text}: {why}, so there is nothing to contrast: {do}"
            )


def _digest(examples: Sequence[Example]) -> str:
    return hashlib.sha256(repr([example.identity for example in examples]).encode()).hexdigest()
