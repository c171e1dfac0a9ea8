"""Data sets to token sequences with target marks, in deterministic disjoint subsets and batches."""

import hashlib
import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import torch

from causalprune.calibration.data import SOURCES, TEXT_SOURCES, Problem, Split, contents, load_problems
from causalprune.calibration.encoding import Reader, Skipped, UnequalError, encode, text_tokens, windows
from causalprune.calibration.templates import Chat, date_of, uses_chat
from causalprune.core import METHOD_VERSION, Batch, Calibration, DataError, Decoder, Example, OptionError
from causalprune.models import positions

Item = TypeVar("Item", bound=Problem | Example)
Exclude: TypeAlias = Collection[str]
"""Contents that are left out; a mapping says where each of them is measured."""
Seen: TypeAlias = set[tuple[str, str]]
"""Content and target of examples that were drawn."""

PADDING = 0.12
"""The longest sequence of a batch is at most this fraction longer than its shortest."""


ENOUGH = 0.9
"""Share of the examples asked for that has to be usable, where a source holds as many."""

FEW, FEW_TOKENS = 8, 600
"""Examples, and target tokens in them, on which divergences are measured."""


def calibrate(  # noqa: PLR0913 (the command's options)
    tokenizer: Any,
    sources: Sequence[str],
    *,
    n: int | None = 128,
    subsets: int = 3,
    seed: int = 0,
    max_tokens: int = 512,
    chat: Chat = "auto",
    data_dir: Path | str | None = None,
    exclude: Exclude | None = None,
    given: Mapping[str, Sequence[Example]] = MappingProxyType({}),
) -> Calibration:
    """Return `n` examples drawn from the sources and cut into disjoint subsets.

    `n` is split evenly over the sources; a source may fix its own count as `name:count`, and `n` is
    None where all do. The draw depends on `seed` and the contents only. Examples whose content is in
    `exclude` (None: the sources' evaluation problems), repeated ones and those longer than
    `max_tokens` are skipped and counted in the description. Where a source holds fewer, see `taken`.
    Example i goes to subset `i % subsets`.
    `given` are the examples of sources that are not drawn from data.
    """
    counts = split_counts(sources, n)
    check_subsets(sum(counts.values()), subsets)
    reader = Reader(tokenizer, uses_chat(tokenizer, chat), max_tokens, seed, data_dir)
    found = drawn(reader, counts, subsets, exclude, given)
    check_subsets(len(found.examples), subsets)
    return found


def drawn(
    reader: Reader,
    counts: Mapping[str, int],
    subsets: int,
    exclude: Exclude | None = None,
    given: Mapping[str, Sequence[Example]] = MappingProxyType({}),
) -> Calibration:
    """Return so many examples of each source, as `calibrate` does, in fewer subsets where there are fewer examples."""
    if exclude is None:
        problems = [name for name in counts if name in SOURCES and name not in TEXT_SOURCES]
        exclude = {
            own: f"the evaluation problems of {name}"
            for name in problems
            for own in contents(name, "evaluation", data_dir=reader.data_dir)
        }
    examples: list[Example] = []
    seen: Seen = set()
    taken_of = {}
    for name, count in counts.items():
        pool = given.get(name)
        chosen = (
            taken(reader, name, "calibration", count, exclude=exclude, seen=seen)
            if pool is None
            else list(itertools.islice(pool, count))
        )
        taken_of[name] = len(chosen)
        examples += chosen
    subsets = min(subsets, len(examples))
    description = {
        "method_version": METHOD_VERSION,
        "sources": taken_of,
        "seed": reader.seed,
        "subsets": subsets,
        "max_tokens": reader.limit,
        **described(reader),
        "skipped": reader.skipped.described(),
        "excluded_contents": len(exclude),
        "tokens": sum(len(e.tokens) for e in examples),
        "target_tokens": sum(e.target_tokens for e in examples),
    }
    return Calibration(tuple(examples), tuple(i % subsets for i in range(len(examples))), description)


def described(reader: Reader) -> dict[str, Any]:
    """Return what descriptions say of how texts are made: whether by a template, and of which day where it writes that."""
    found: dict[str, Any] = {"chat_template": reader.chat}
    if reader.chat and (day := date_of(reader.tokenizer)):
        found["date"] = day
    if reader.turns != "last":
        found["turns"] = reader.turns
    return found | ({"fold_system": True} if reader.fold_system else {})


def check_subsets(examples: int, subsets: int) -> None:
    """Raise `DataError` where examples cannot be cut into so many subsets."""
    if subsets < 1 or examples < subsets:
        raise DataError(
            f"{examples} examples cannot be cut into {subsets} subsets: ask for more examples or fewer subsets"
        )


def split_counts(sources: Sequence[str], n: int | None) -> dict[str, int]:
    """Return the number of examples per source: its own `name:count`, or an even share of the rest."""
    if not sources:
        raise OptionError("no calibration source given: name at least one, such as gsm8k")
    fixed = dict(with_limit(source) for source in sources)
    if len(fixed) < len(sources):
        raise OptionError(f"a calibration source is given twice in {', '.join(sources)}: name each once")
    own = sum(count for count in fixed.values() if count is not None)
    open_names = [name for name, count in fixed.items() if count is None]
    if not open_names and n not in (None, own):
        raise OptionError(
            f"the sources ask for {own} examples, n for {n}: leave one of them out or make them agree"
        )
    if open_names and (n is None or n - own < len(open_names)):
        raise DataError(f"n = {n} examples leave {(n or 0) - own} for {', '.join(open_names)}: raise n")
    rest, spare = divmod((n or 0) - own, max(len(open_names), 1))
    shares = {name: rest + (i < spare) for i, name in enumerate(open_names)}
    return {name: shares[name] if count is None else count for name, count in fixed.items()}


def with_limit(name: str) -> tuple[str, int | None]:
    """Split `name:count` into its parts; count is None where it is not given."""
    head, colon, tail = name.rpartition(":")
    if not (colon and tail.isdigit()):
        return name, None
    if int(tail) < 1:
        raise OptionError(f"{name!r} asks for {tail} examples: ask for at least 1")
    return head, int(tail)


def draw(
    reader: Reader, name: str, split: Split, *, exclude: Exclude = frozenset(), seen: Seen | None = None
) -> Iterator[Example]:
    """Yield the usable examples of a source in the order that the seed fixes; count the skipped ones.

    `seen` holds what is already drawn and grows with every example: equal prompts with different targets are no repetition.
    Lazy: what is not asked for is neither tokenised nor counted.
    """
    seen = set() if seen is None else seen
    candidates: Iterable[Problem | Example]
    if name in TEXT_SOURCES:
        candidates = _blocks(reader, name, split, exclude)
    else:
        candidates = load_problems(name, split, data_dir=reader.data_dir)
    for candidate in shuffled(candidates, reader.seed):
        if (found := usable(reader, candidate, exclude, seen)) is not None:
            yield found


def read(reader: Reader, problem: Problem) -> Example | None:
    """Return a problem as tokens; nothing, and count it, for a pair of our own templates that has two lengths here."""
    try:
        return encode(reader, problem)
    except UnequalError:
        if problem.source != "ioi":
            raise
        reader.skipped.unequal += 1
        return None


def usable(
    reader: Reader, row: Problem | Example, exclude: Exclude, seen: Seen, example: Example | None = None
) -> Example | None:
    """Return what is made of a row (`example`, if that is known), or count it as skipped and return None."""
    skipped, key = reader.skipped, (row.content, getattr(row, "target", ""))
    if row.content in exclude:
        skipped.excluded += 1
        if isinstance(exclude, Mapping):
            skipped.also_in[exclude[row.content]] += 1
    elif key in seen:
        skipped.duplicate += 1
    else:
        example = example or (read(reader, row) if isinstance(row, Problem) else row)
        if example is None:
            return None
        if len(example.tokens) <= reader.limit:
            seen.add(key)
            skipped.open_turns += getattr(row, "open_turns", 0)
            return example
        skipped.too_long += 1
    return None


def taken(
    reader: Reader,
    name: str,
    split: Split,
    count: int | None,
    *,
    exclude: Exclude = frozenset(),
    seen: Seen | None = None,
) -> list[Example]:
    """Return the first `count` usable examples of a source (None: all), or those that there are, as `enough` allows."""
    before = reader.skipped.copy()
    found = list(itertools.islice(draw(reader, name, split, exclude=exclude, seen=seen), count))
    out = reader.skipped.since(before)
    shown = name if split == "calibration" else f"{name}, to measure"
    room = None if reader.limit == reader.max_tokens else f"the model has {reader.limit} positions"
    enough(shown, count, len(found), out, room=room)
    if out.open_turns:
        warnings.warn(f"{shown}: {out.open_turns} turns after the last answer are left out", stacklevel=2)
    return found


def enough(
    name: str,
    wanted: int | None,
    usable: int,
    skipped: Skipped | None = None,
    unit: str = "examples",
    room: str | None = None,
) -> None:
    """Check that as much as was asked for is usable (None: something); warn where it is less, but all that there is or almost.

    `room` says why no higher limit of tokens would help.

    Raises:
        DataError: nothing is usable, or less than `ENOUGH` of what was asked for and is there.
    """
    out = skipped or Skipped()
    if usable >= (wanted or max(1, usable + out.too_long)):
        return
    there, asked = (
        usable + (out.examples if wanted or not usable else out.too_long),
        f"{name}: {wanted or 'all'} {unit} asked for",
    )
    also = "".join(f"; {n} of {there} are also in {place}" for place, n in out.also_in.items())
    if not usable or (wanted and usable < ENOUGH * min(wanted, there)):
        why = f"{usable} of {there} usable ({out}{also})" if there else "none is there"
        more = f" ({room})" if room else " or raise the token limit"
        apart = ", or measure on others" if also else ""
        raise DataError(f"{asked}, {why}: ask for fewer{more if out.too_long else ''}{apart}")
    left = f" but {out}{also}" if there > usable else ""
    left += " (more fit with a higher limit of tokens)" if out.too_long and not room else ""
    warnings.warn(f"{asked}, {usable} taken: all that it holds{left}", stacklevel=2)


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """Return the items in an order that depends on `seed` and their contents only."""
    return sorted(items, key=lambda item: shuffle_key(item.content, seed))


def shuffle_key(content: str, seed: int) -> bytes:
    """Return the sort key of a content: random-like, and the same on every machine."""
    return hashlib.sha256(f"{seed}:{content}".encode()).digest()


def few(examples: Sequence[Example]) -> list[Example]:
    """Return the examples on which divergences are measured: few are enough (docs/attribution.md).

    Taken evenly from the whole list, so that every source has its share: at least `FEW`, and as many more as it takes
    to have `FEW_TOKENS` target tokens, up to four times `FEW`.
    """
    n = len(examples)
    for k in range(min(FEW, n), min(4 * FEW, n) + 1):
        chosen = [examples[(2 * i + 1) * n // (2 * k)] for i in range(k)]
        if sum(e.target_tokens for e in chosen) >= FEW_TOKENS:
            break
    return chosen


def check_positions(decoder: Decoder, examples: Sequence[Example]) -> None:
    """Raise `DataError` for an example that is longer than the model has positions."""
    longest, room = max(len(e.tokens) for e in examples), positions(decoder.model.config)
    if room is not None and longest > room:
        raise DataError(
            f"an example of {longest} tokens does not fit into the {room} positions of {decoder.name}: "
            f"calibrate it with max_tokens={room} at most"
        )


def batches(examples: Sequence[Example], *, max_batch_tokens: int) -> list[Batch]:
    """Return the examples in batches of similar length, the longest first.

    A batch holds at most `max_batch_tokens` tokens, padding included; a longer example is a batch of
    its own. Padding is token 0 on the right, at most `PADDING` of each sequence's length.
    """
    if max_batch_tokens < 1:
        raise OptionError(f"a batch holds at least 1 token, not max_batch_tokens={max_batch_tokens}")
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    groups: list[list[int]] = []
    for i in order:
        longest = len(examples[groups[-1][0]].tokens) if groups else 0
        room = groups and (len(groups[-1]) + 1) * longest <= max_batch_tokens
        if room and longest <= (1 + PADDING) * len(examples[i].tokens):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [batch_of(examples, group) for group in groups]


def batch_of(examples: Sequence[Example], indices: Sequence[int]) -> Batch:
    """Return these examples as one batch, padded on the right with token 0."""
    lengths = torch.tensor([len(examples[i].tokens) for i in indices])
    tokens = torch.zeros(len(indices), int(lengths.max()), dtype=torch.long)
    for row, i in enumerate(indices):
        tokens[row, : len(examples[i].tokens)] = torch.tensor(examples[i].tokens)
    time = torch.arange(tokens.shape[1])
    starts = torch.tensor([examples[i].target_start for i in indices])
    is_target = (time >= starts[:, None]) & (time < lengths[:, None])
    for row, i in enumerate(indices):
        if (mask := examples[i].mask) is not None:
            is_target[row, : len(mask)] = torch.tensor(mask)
    other = None
    if all(examples[i].counterfactual for i in indices):
        other = torch.zeros_like(tokens)
        for row, i in enumerate(indices):
            other[row, : int(lengths[row])] = torch.tensor(examples[i].counterfactual)
    return Batch(tokens, lengths, is_target, tuple(indices), other)


def _blocks(reader: Reader, name: str, split: Split, exclude: Exclude) -> list[Example]:
    tokens = text_tokens(reader.tokenizer, name, split, data_dir=reader.data_dir, exclude=exclude)
    return windows(reader.tokenizer, tokens, name, reader.limit)
