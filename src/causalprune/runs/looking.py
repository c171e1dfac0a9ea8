"""What data look like to a model, before anything is measured: tokens, what is left out, and one row with its target."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from causalprune.calibration import (
    SOURCES,
    TEXT_SOURCES,
    Problem,
    Reader,
    Skipped,
    contents,
    load_problems,
    on_date,
    read,
    usable,
    with_limit,
)
from causalprune.checkpoints import resolve
from causalprune.core import DataError, Example, OptionError
from causalprune.models import reading
from causalprune.runs.recipe import CalibrationSpec, ModelSpec


@dataclass(frozen=True)
class Looked:
    """What a source is to a model.

    `skipped` says which of its `rows` would be left out, those that are also in another source among them. Tokens are the
    least, the median and the most of a row. `shown` are the pieces of one row's text, and whether each is a target.
    """

    source: str
    rows: int
    skipped: Skipped
    tokens: tuple[int, float, int]
    target_tokens: tuple[int, float, int]
    shown: tuple[tuple[str, bool], ...]

    @property
    def usable(self) -> int:
        """Rows that are left."""
        return self.rows - self.skipped.examples


def look(
    spec: ModelSpec, wanted: CalibrationSpec, row: int = 1, data_dir: Path | str | None = None
) -> list[Looked]:
    """Return what each source of `wanted` is to a model, of which only tokenizer and configuration are read.

    Every row is tokenised, and number `row` is shown. A row that is in an earlier source, or among the evaluation problems
    of a data set, counts as being in that, too.
    """
    on_date(None, spec.date)
    tokenizer, room = reading(
        resolve(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code
    )
    on_date(tokenizer, spec.date)
    reader = wanted.reader(tokenizer, room, data_dir)
    names = [with_limit(source)[0] for source in wanted.task]
    elsewhere = {
        own: f"what {name} measures"
        for name in names
        if name in SOURCES and name not in TEXT_SOURCES
        for own in contents(name, "evaluation", data_dir=data_dir)
    }
    found = []
    for name in names:
        problems = load_problems(name, "calibration", data_dir=data_dir)
        found.append(_looked(replace(reader, skipped=Skipped()), name, problems, row, elsewhere))
        elsewhere |= dict.fromkeys((problem.content for problem in problems), name)
    return found


def _looked(
    reader: Reader, name: str, problems: Sequence[Problem], row: int, elsewhere: Mapping[str, str]
) -> Looked:
    if not 1 <= row <= len(problems):
        raise OptionError(f"{name} has {len(problems)} rows: there is no row {row}")
    each, seen = [(problem, read(reader, problem)) for problem in problems], set[tuple[str, str]]()
    if (shown := each[row - 1][1]) is None:
        raise DataError(
            f"{name}: row {row} has names of different lengths in this tokenizer: look at another"
        )
    examples = [example for _, example in each if example is not None]
    for problem, example in each:
        if example is not None:
            usable(reader, problem, elsewhere, seen, example)
    return Looked(
        name,
        len(problems),
        reader.skipped,
        _spread([len(example.tokens) for example in examples]),
        _spread([example.target_tokens for example in examples]),
        tuple(_pieces(reader.tokenizer, shown)),
    )


def _spread(counts: Sequence[int]) -> tuple[int, float, int]:
    return min(counts), float(median(counts)), max(counts)


def _pieces(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    pairs = zip(example.tokens, example.is_target, strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [(str(tokenizer.decode([token for token, _ in own])), target) for target, own in groups]
