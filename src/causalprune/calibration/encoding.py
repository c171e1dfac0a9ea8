"""How problems become tokens: one text, tokenised as a whole, and which of its tokens are targets."""

import bisect
import copy
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from causalprune.calibration.data import SHORTEST_LEAK, Problem, Split, content_hash, load_texts
from causalprune.calibration.templates import TRACE_END, TRACE_START, check_tokenizer, folded, lead, opened
from causalprune.core import DataError, Example

Turns = Literal["last", "all"]
Span = tuple[int, int]
"""From which place to which."""
BLANK = "\n\n"
"""What stands between prompt and target where there is no chat template."""


class UnequalError(DataError):
    """A prompt and its counterfactual have different numbers of tokens."""


@dataclass
class Skipped:
    """Examples that were looked at and left out, by reason; and turns after the last answer, which are left out too.

    `unequal` are pairs of our own templates whose names have different numbers of tokens here; `also_in` says where those that
    are `excluded` are measured, where that is known.
    """

    too_long: int = 0
    duplicate: int = 0
    excluded: int = 0
    open_turns: int = 0
    unequal: int = 0
    also_in: Counter[str] = field(default_factory=Counter)

    @property
    def examples(self) -> int:
        """Number of examples that were left out."""
        return self.too_long + self.duplicate + self.excluded + self.unequal

    def since(self, before: "Skipped") -> "Skipped":
        """Return what was left out since an earlier count."""
        pairs = zip(vars(self).values(), vars(before).values(), strict=True)
        return Skipped(*(now - then for now, then in pairs))

    def copy(self) -> "Skipped":
        """Return the count as it is now."""
        return copy.deepcopy(self)

    def described(self) -> dict[str, Any]:
        """Return the count as descriptions have it: what is rare only where there is any."""
        return {k: v for k, v in vars(self).items() if v or k in ("too_long", "duplicate", "excluded")}

    def __str__(self) -> str:
        words = ("too long", "repeated", "kept for measuring", "turns after the last answer", "unequal")
        return ", ".join(f"{n} {word}" for n, word in zip(vars(self).values(), words, strict=False) if n)


@dataclass(frozen=True)
class Reader:
    """How problems are drawn and become tokens.

    `chat` says whether prompts go through the tokenizer's template, `max_tokens` is the longest
    sequence, unless the model has fewer `positions`; `seed` fixes the order of the draw. `skipped` counts what was left out.
    `thinking` says whether the model thinks first where it writes answers itself. Targets are the `turns` of the assistant;
    with `fold_system` a system turn is put before the user's.
    """

    tokenizer: Any
    chat: bool
    max_tokens: int
    seed: int = 0
    data_dir: Path | str | None = None
    skipped: Skipped = field(default_factory=Skipped)
    thinking: bool = False
    turns: Turns = "last"
    fold_system: bool = False
    positions: int | None = None

    @property
    def limit(self) -> int:
        """Tokens of the longest sequence."""
        return min(self.max_tokens, self.positions or self.max_tokens)


def prompt_text(reader: Reader, problem: Problem, *, thinking: bool = False) -> str:
    """Return the text that precedes the target: the chat template's, or the prompt and a blank line."""
    if not _templated(reader, problem):
        return problem.prompt + ("" if problem.plain or problem.instead or problem.counterfactual else BLANK)
    turns = problem.messages
    return opened(reader.tokenizer, folded(turns) if reader.fold_system else turns, thinking=thinking)


def _templated(reader: Reader, problem: Problem) -> bool:
    return reader.chat and not problem.plain


def question_text(reader: Reader, problem: Problem, *, thinking: bool = False) -> str:
    """Return the text that the model goes on from when it writes an answer.

    Without a template white space at the end goes: tokens of what follows may hold it.
    """
    text = prompt_text(reader, problem, thinking=thinking)
    return text if _templated(reader, problem) else text.rstrip()


def question_tokens(reader: Reader, problem: Problem, text: str) -> list[int]:
    """Return the tokens of a problem's `question_text`."""
    return tokenize(reader.tokenizer, text, special=not _templated(reader, problem))


def encode(reader: Reader, problem: Problem) -> Example:
    """Return a problem as tokens: its whole text is tokenised at once, as a model meets it.

    A token across the border of prompt and target belongs to the target. A problem without prompt is running text: all
    tokens but the first are predicted. A target that holds a trace of thoughts follows a prompt that asks for one.
    """
    if not problem.prompt:
        tokens = tokenize(reader.tokenizer, problem.target, special=True)
        spans = [(1, len(tokens))]
    else:
        prompt = prompt_text(reader, problem, thinking=TRACE_END in problem.target)
        prompt += _between(reader, problem, prompt)
        text = prompt + problem.target
        where = [(len(prompt), len(text))]
        if reader.turns == "all":
            where = [*_earlier(reader, problem, text), *where]
        tokens, spans = _marked(reader.tokenizer, text, where, special=not _templated(reader, problem))
    start = max(spans[0][0], 1)
    if len(tokens) <= spans[-1][0] or len(tokens) <= start:
        raise DataError(f"{problem.source}: the target {problem.target[:40]!r} has no token to predict")
    mask = None
    if len(spans) > 1:
        mask = tuple(any(a <= i < b for a, b in spans) and i >= start for i in range(len(tokens)))
    example = Example(tuple(tokens), start, problem.source, problem.content, mask)
    return _paired(reader, problem, example) if problem.counterfactual or problem.instead else example


def _between(reader: Reader, problem: Problem, prompt: str) -> str:
    """Return what a template has between the end of a prompt and its target: a blank, or the end of thoughts that it has opened."""
    if not _templated(reader, problem):
        return ""
    if prompt.rstrip().endswith(TRACE_START) and TRACE_END not in problem.target:
        return f"\n{TRACE_END}\n\n"
    return "" if problem.target[:1].isspace() else lead(reader.tokenizer, prompt)


def _paired(reader: Reader, problem: Problem, example: Example) -> Example:
    """Return an example with its counterfactual, which must be as long, and with the wrong answer."""
    pair = replace(problem, instead="", plain=problem.plain or not reader.chat)  # one text, as they stand
    if problem.counterfactual:
        other = encode(reader, replace(pair, prompt=problem.counterfactual, counterfactual=""))
        own, theirs = example.target_start, other.target_start
        if (own, len(example.tokens)) != (theirs, len(other.tokens)):
            what = ("the prompt", theirs, own)
            if own == theirs:
                what = ("the prompt, with the target,", len(other.tokens), len(example.tokens))
            raise UnequalError(
                f"{problem.where or problem.source}: the counterfactual has {what[1]} tokens and {what[0]} {what[2]}: both must "
                "have the same number"
            )
        example = replace(example, counterfactual=other.tokens)
    if problem.instead:
        example = replace(example, instead=encode(reader, replace(pair, target=problem.instead)))
    wrong = example.instead and example.instead.tokens
    for said, found in (
        ("'counterfactual' is the prompt", example.counterfactual),
        ("'instead' is the target", wrong),
    ):
        if found == example.tokens:  # no unit could make a difference
            raise DataError(
                f"{problem.where or problem.source}: {said} itself: give another, or leave it out"
            )
    return example


def apart(reader: Reader, problem: Problem) -> bool:
    """Tell whether prompt and target have the same tokens apart as in one text."""
    if not problem.prompt:
        return True
    text = prompt_text(reader, problem, thinking=TRACE_END in problem.target)
    if _between(reader, problem, text):
        return False
    prompt = tokenize(reader.tokenizer, text, special=not _templated(reader, problem))
    target, whole = tokenize(reader.tokenizer, problem.target, special=False), encode(reader, problem)
    return (*prompt, *target) == whole.tokens and len(prompt) == whole.target_start


def _earlier(reader: Reader, problem: Problem, text: str) -> Iterator[Span]:
    """Yield the characters of the assistant's turns before the target; no turn can be told of those that nothing precedes."""
    for at, (role, content) in enumerate(problem.before):
        if role != "assistant" or not at:
            continue
        until = problem.until(at)
        heads = [prompt_text(reader, until, thinking=thinking) for thinking in (False, True)]
        forms = (content, content.strip(), content.rpartition(TRACE_END)[2].strip())
        heads += [head + lead(reader.tokenizer, head) for head in heads if _templated(reader, problem)]
        found = [(head, form) for head in heads for form in forms if form and text.startswith(head + form)]
        if not found:
            raise DataError(
                f"{problem.source}: the chat template rewrites the earlier answer {content[:40]!r}: take the last turn "
                "only, without --turns all"
            )
        head, form = found[0]
        yield len(head), len(head) + len(form)


def _marked(
    tokenizer: Any, text: str, where: Sequence[Span], *, special: bool
) -> tuple[list[int], list[Span]]:
    """Return the tokens of a text, and which of them hold characters of each of these spans.

    Without offsets, which tokenizers written in Python lack, a span begins where the tokens of the text that precedes it
    end to be those of the whole.
    """
    if not getattr(tokenizer, "is_fast", False):
        tokens = tokenize(tokenizer, text, special=special)

        def until(end: int) -> int:
            pairs = zip(tokenize(tokenizer, text[:end], special=special), tokens, strict=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

        return tokens, [(until(a), until(b)) for a, b in where]
    found = tokenizer(text, add_special_tokens=special, verbose=False)
    tokens, (encoding,) = _open_ended(tokenizer, found["input_ids"], text, special=special), found.encodings
    first = encoding.char_to_token(where[0][0]) if where[0][0] < len(text) else None
    if first is not None and [end for _, end in where] == [len(text)]:
        return tokens, [(first, len(tokens))]  # nearly always, and without a look at every token
    offsets = zip(*(encoding.offsets or [(0, 0)]), strict=True)
    begins, ends = (list(itertools.accumulate(own, max)) for own in offsets)
    spans = [(bisect.bisect_right(ends, a), bisect.bisect_left(begins, b)) for a, b in where]
    return tokens, [
        (a, len(tokens) if b == len(text) else end) for (a, end), (_, b) in zip(spans, where, strict=True)
    ]


def tokenize(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the tokens of a text, with the tokenizer's own ones that open it if they are `special`."""
    # verbose=False: a text longer than the model's window is cut into windows later, no warning wanted.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return _open_ended(tokenizer, ids, text, special=special)


def _open_ended(tokenizer: Any, ids: list[int], text: str, *, special: bool) -> list[int]:
    if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        return ids[:-1]  # some tokenizers close every text; ours goes on
    return ids


def text_tokens(
    tokenizer: Any,
    name: str,
    split: Split,
    *,
    data_dir: Path | str | None = None,
    exclude: Collection[str] = frozenset(),
) -> list[int]:
    """Return running text as tokens: rows joined by two newlines, tokenised once."""
    check_tokenizer(tokenizer)
    rows = load_texts(name, split, data_dir=data_dir)
    if exclude:
        rows = [r for r in rows if len(r) < SHORTEST_LEAK or content_hash(r) not in exclude]
    return tokenize(tokenizer, BLANK.join(rows), special=True)


def windows(tokenizer: Any, tokens: Sequence[int], source: str, size: int) -> list[Example]:
    """Cut tokens into windows of `size` that do not overlap; the rest at the end is left out.

    All tokens of a window but the first are predicted. Where the tokenizer opens a text with a token of its own, every
    window begins with it: some models, such as Gemma, predict nothing well without.
    """
    opens = list(tokens[:1]) if tokens and tokens[0] == tokenizer.bos_token_id else []
    text, step = tokens[len(opens) :], size - len(opens)
    cuts = [(*opens, *text[i : i + step]) for i in range(0, len(text) - step + 1, step)]
    return [Example(cut, 1, source, content_hash(tokenizer.decode(cut))) for cut in cuts]
