"""Data sets to token sequences with target marks, in deterministic disjoint subsets and batches."""

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch

from causalprune.calibration.data import (
    SHORTEST_LEAK,
    SOURCES,
    TEXT_SOURCES,
    Problem,
    Split,
    content_hash,
    contents,
    load_problems,
    load_texts,
)
from causalprune.core import Batch, Calibration, DataError, Example, OptionError

Chat = Literal["auto", "on", "off"]
Thinking = Literal["auto", "on", "off"]
Item = TypeVar("Item", bound=Problem | Example)

PADDING = 0.12
"""The longest sequence of a batch is at most this fraction longer than its shortest."""


ENOUGH = 0.9
"""Share of the examples asked for that has to be usable, where a source holds as many."""

FEW, FEW_TOKENS = 8, 600
"""Examples, and target tokens in them, on which divergences are measured."""
TRACE_START, TRACE_END = "<think>", "</think>"
"""What stands around the thoughts of models that think before they answer."""


@dataclass
class Skipped:
    """Examples that were looked at and left out, by reason."""

    too_long: int = 0
    duplicate: int = 0
    excluded: int = 0

    def since(self, before: "Skipped") -> "Skipped":
        """Return what was left out since an earlier count."""
        return Skipped(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def __str__(self) -> str:
        words = ("too long", "repeated", "kept for measuring")
        return ", ".join(f"{n} {word}" for n, word in zip(astuple(self), words, strict=True) if n)


@dataclass(frozen=True)
class Reader:
    """How problems are drawn and become tokens.

    `chat` says whether prompts go through the tokenizer's template, `max_tokens` is the longest
    sequence, `seed` fixes the order of the draw. `skipped` counts what was left out. `thinking` says
    whether the model thinks first where it writes answers itself.
    """

    tokenizer: Any
    chat: bool
    max_tokens: int
    seed: int = 0
    data_dir: Path | None = None
    skipped: Skipped = field(default_factory=Skipped)
    thinking: bool = False


def calibrate(  # noqa: PLR0913 (the command's options)
    tokenizer: Any,
    sources: Sequence[str],
    *,
    n: int | None = 128,
    subsets: int = 3,
    seed: int = 0,
    max_tokens: int = 512,
    chat: Chat = "auto",
    data_dir: Path | None = None,
    exclude: Set[str] | None = None,
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
    _check_subsets(sum(counts.values()), subsets)
    reader = Reader(tokenizer, uses_chat(tokenizer, chat), max_tokens, seed, data_dir)
    if exclude is None:
        problems = [name for name in counts if name in SOURCES and name not in TEXT_SOURCES]
        exclude = frozenset().union(*(contents(name, "evaluation", data_dir=data_dir) for name in problems))
    examples: list[Example] = []
    seen: set[str] = set()
    for name, count in counts.items():
        pool = given.get(name)
        chosen = (
            taken(reader, name, "calibration", count, exclude=exclude, seen=seen)
            if pool is None
            else list(itertools.islice(pool, count))
        )
        counts[name] = len(chosen)
        examples += chosen
    _check_subsets(len(examples), subsets)
    description = {
        "sources": counts,
        "seed": seed,
        "subsets": subsets,
        "max_tokens": max_tokens,
        "chat_template": reader.chat,
        "skipped": dict(vars(reader.skipped)),
        "excluded_contents": len(exclude),
        "tokens": sum(len(e.tokens) for e in examples),
        "target_tokens": sum(e.target_tokens for e in examples),
    }
    return Calibration(tuple(examples), tuple(i % subsets for i in range(len(examples))), description)


def _check_subsets(examples: int, subsets: int) -> None:
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


def uses_chat(tokenizer: Any, chat: Chat) -> bool:
    """Tell whether prompts go through the tokenizer's chat template."""
    check_tokenizer(tokenizer)
    if chat == "on" and not tokenizer.chat_template:
        raise OptionError("the tokenizer has no chat template: use chat 'off' or 'auto'")
    return chat != "off" and bool(tokenizer.chat_template)


def uses_thinking(tokenizer: Any, thinking: Thinking, *, chat: bool) -> bool:
    """Tell whether the model thinks before it answers; `auto`: only where its chat template always makes it.

    Templates take the word `enable_thinking`, or open the trace of thoughts themselves, or at least cut it from
    earlier answers.

    Raises:
        OptionError: thinking is asked for, and the template knows nothing of it, or the other way round.
    """
    off, on = (_rendered(tokenizer, "Hello", thinking=word) if chat else "" for word in (False, True))
    always = off.rstrip().endswith(TRACE_START)
    if thinking == "on" and not (always or off != on or (chat and TRACE_END in str(tokenizer.chat_template))):
        missing = "the tokenizer's chat template knows nothing of it" if chat else "there is no chat template"
        raise OptionError(f"thinking cannot be switched on, as {missing}: leave it out, or say auto")
    if thinking == "off" and always:
        raise OptionError(
            f"thinking cannot be switched off, as the chat template opens {TRACE_START} itself: say auto or on"
        )
    return always or thinking == "on"


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `DataError` for a model that came without one."""
    if tokenizer is None:
        raise DataError(
            "the model's folder has no tokenizer, which calibration and tasks need: copy its files there (tokenizer.json, …)"
        )


def draw(
    reader: Reader, name: str, split: Split, *, exclude: Set[str] = frozenset(), seen: set[str] | None = None
) -> Iterator[Example]:
    """Yield the usable examples of a source in the order that the seed fixes; count the skipped ones.

    `seen` holds contents already drawn and grows with every example. Lazy: what is not asked for is
    neither tokenised nor counted.
    """
    seen = set() if seen is None else seen
    skipped = reader.skipped
    candidates: Iterable[Problem | Example]
    if name in TEXT_SOURCES:
        candidates = _blocks(reader, name, split, exclude)
    else:
        candidates = load_problems(name, split, data_dir=reader.data_dir)
    for candidate in shuffled(candidates, reader.seed):
        content = candidate.content
        if content in exclude:
            skipped.excluded += 1
        elif content in seen:
            skipped.duplicate += 1
        else:
            example = encode(reader, candidate) if isinstance(candidate, Problem) else candidate
            if len(example.tokens) > reader.max_tokens:
                skipped.too_long += 1
            else:
                seen.add(content)
                yield example


def taken(
    reader: Reader,
    name: str,
    split: Split,
    count: int | None,
    *,
    exclude: Set[str] = frozenset(),
    seen: set[str] | None = None,
) -> list[Example]:
    """Return the first `count` usable examples of a source (None: all), or those that there are, as `enough` allows."""
    before = replace(reader.skipped)
    drawn = draw(reader, name, split, exclude=exclude, seen=seen)
    found = list(itertools.islice(drawn, count))
    shown = name if split == "calibration" else f"{name}, to measure"
    enough(shown, count, len(found), reader.skipped.since(before))
    return found


def enough(
    name: str, wanted: int | None, usable: int, skipped: Skipped | None = None, unit: str = "examples"
) -> None:
    """Check that as much as was asked for is usable (None: something); warn where it is less, but all that there is or almost.

    Raises:
        DataError: nothing is usable, or less than `ENOUGH` of what was asked for and is there.
    """
    if usable >= (wanted or 1):
        return
    out = skipped or Skipped()
    there, asked = usable + sum(astuple(out)), f"{name}: {wanted or 'all'} {unit} asked for"
    if not usable or usable < ENOUGH * min(wanted or there, there):
        why = f"{usable} of {there} usable ({out})" if there else "none is there"
        more = " or raise the token limit" if out.too_long else ""
        raise DataError(f"{asked}, {why}: ask for fewer{more}")
    left = f" but {out}" if there > usable else ""
    warnings.warn(f"{asked}, {usable} taken: all that it holds{left}", stacklevel=2)


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """Return the items in an order that depends on `seed` and their contents only."""
    return sorted(items, key=lambda item: shuffle_key(item.content, seed))


def shuffle_key(content: str, seed: int) -> bytes:
    """Return the sort key of a content: random-like, and the same on every machine."""
    return hashlib.sha256(f"{seed}:{content}".encode()).digest()


def prompt_text(reader: Reader, prompt: str, *, thinking: bool = False) -> str:
    """Return the text that precedes the target: the chat template's, or the prompt and a blank line."""
    return _rendered(reader.tokenizer, prompt, thinking=thinking) if reader.chat else f"{prompt}\n\n"


def _rendered(tokenizer: Any, prompt: str, *, thinking: bool) -> str:
    messages = [{"role": "user", "content": prompt}]
    # Templates that do not know of thinking ignore the word.
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    return str(tokenizer.apply_chat_template(messages, **options))


def prompt_tokens(reader: Reader, prompt: str, *, thinking: bool = False) -> list[int]:
    """Return the tokens of the text that precedes the target."""
    text = prompt_text(reader, prompt, thinking=thinking)
    return tokenize(reader.tokenizer, text, special=not reader.chat)


def encode(reader: Reader, problem: Problem) -> Example:
    """Return prompt and target of a problem as tokens, tokenised apart so that their border is exact.

    A problem without prompt is running text: all tokens but the first are predicted. A target that holds a trace of
    thoughts follows a prompt that asks for one.
    """
    prompt: list[int] = []
    if problem.prompt:
        prompt = prompt_tokens(reader, problem.prompt, thinking=TRACE_END in problem.target)
    target = tokenize(reader.tokenizer, problem.target, special=not problem.prompt)
    start = max(len(prompt), 1)
    if len(prompt) + len(target) <= start:
        raise DataError(f"{problem.source}: the target {problem.target[:40]!r} has no token to predict")
    return Example(tuple(prompt + target), start, problem.source, problem.content)


def text_tokens(
    tokenizer: Any, name: str, split: Split, *, data_dir: Path | None = None, exclude: Set[str] = frozenset()
) -> list[int]:
    """Return running text as tokens: rows joined by two newlines, tokenised once."""
    check_tokenizer(tokenizer)
    rows = load_texts(name, split, data_dir=data_dir)
    if exclude:
        rows = [r for r in rows if len(r) < SHORTEST_LEAK or content_hash(r) not in exclude]
    return tokenize(tokenizer, "\n\n".join(rows), special=True)


def windows(tokenizer: Any, tokens: Sequence[int], source: str, size: int) -> list[Example]:
    """Cut tokens into windows of `size` that do not overlap; the rest at the end is left out.

    All tokens of a window but the first are predicted. Where the tokenizer opens a text with a token of its own, every
    window begins with it: some models, such as Gemma, predict nothing well without.
    """
    opens = list(tokens[:1]) if tokens and tokens[0] == tokenizer.bos_token_id else []
    text, step = tokens[len(opens) :], size - len(opens)
    cuts = [(*opens, *text[i : i + step]) for i in range(0, len(text) - step + 1, step)]
    return [Example(cut, 1, source, content_hash(tokenizer.decode(cut))) for cut in cuts]


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


def batches(examples: Sequence[Example], *, max_batch_tokens: int) -> list[Batch]:
    """Return the examples in batches of similar length, the longest first.

    A batch holds at most `max_batch_tokens` tokens, padding included; a longer example is a batch of
    its own. Padding is token 0 on the right, at most `PADDING` of each sequence's length.
    """
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
    starts = torch.tensor([examples[i].target_start for i in indices])
    return Batch(tokens, lengths, starts, tuple(indices))


def _blocks(reader: Reader, name: str, split: Split, exclude: Set[str]) -> list[Example]:
    tokens = text_tokens(reader.tokenizer, name, split, data_dir=reader.data_dir, exclude=exclude)
    return windows(reader.tokenizer, tokens, name, reader.max_tokens)


def tokenize(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the tokens of a text, with the tokenizer's own ones that open it if they are `special`."""
    # verbose=False: a text longer than the model's window is cut into windows later, no warning wanted.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]  # some tokenizers close every text; ours goes on
    return ids
