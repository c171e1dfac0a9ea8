"""Reading the final answer out of a generated solution: functions of texts alone."""

import re
import string
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal, get_args

from causalprune.calibration import TRACE_END, TRACE_START
from causalprune.core import OptionError, unknown

AnswerKind = Literal["number", "number_comma", "yes_no", "letter", "text"]
KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)
REGEX = "regex:"
"""Before a pattern that reads answers, in place of a kind."""

NUMBER = re.compile(r"(?:(?<![\w)])-\s?)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")
NUMBER_COMMA = re.compile(r"(?:(?<![\w)])-\s?)?(?:\d{1,3}(?:[.'’\u00a0\u202f]\d{3})+(?!\d)|\d+)(?:,\d+)?")
"""A number whose decimals follow a comma, as 1.234,5: digits go in threes after a point, an apostrophe or a narrow space."""
BEFORE, AFTER = (
    re.compile(r"(?:\d ?[/^] ?-?|\d[:-]|\de[+-]?|\}\{)\Z"),
    re.compile(r" ?[/^] ?-?\d|[:-]\d|e[+-]?\d"),
)
"""What a number stands between that is part of a fraction, a power, a time, a date or a range."""
COMMAS = re.compile(r"\d,(?!\d{3}(?!\d))\d|\d\.\d{3}[.,]\d|\d[\u00a0\u202f’']\d{3}")
"""What numbers are written like that say."""
YES_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)
SAID = re.compile(
    r"\b(?:yes|no(?![^\S\n]+(?!(?:because|since|as|if|but|and|or|for|in|it)\b)(?-i:[a-z])))\b", re.IGNORECASE
)
"""Yes, or a no that is an answer: not the one of `no rule`."""
FINAL = re.compile(r"\banswer\b(?:\s+is\b|\s*:)?[\s:*\"(]*(yes|no)\b", re.IGNORECASE)
MARK = "####"
ENDINGS: dict[AnswerKind, re.Pattern[str]] = {
    "yes_no": re.compile(r"\b(?:yes|no)[\s.!)*]*\Z", re.IGNORECASE),
    "number": re.compile(
        rf"(?<![\w/^])(?<!\d[:.-])(?:{NUMBER_COMMA.pattern}|{NUMBER.pattern})\s?(?:[%°€£$]|[^\W\d_]+(?:/[^\W\d_]+)?)?[\s.!)*\]}}$]*\Z"
    ),  # and a unit; no part of a fraction, a date, a time or a name
    "letter": re.compile(r"(?:\A|[\s(*:])[A-Z][\s.!)*]*\Z"),
}
"""How targets end from which the way to read answers is guessed."""
FEWEST_LABELS = 4


def check_kind(kind: str) -> str:
    """Return a way to read answers; `OptionError` where there is none of this name, or a pattern cannot be used."""
    if not kind.startswith(REGEX):
        if kind not in KINDS:
            raise unknown("way to read answers", kind, (*KINDS, f"{REGEX}PATTERN"))
        return kind
    try:
        re.compile(kind.removeprefix(REGEX))
    except re.error as cause:
        raise OptionError(f"{kind}: the pattern is no regular expression ({cause})") from cause
    return kind


def guess(targets: Sequence[str]) -> AnswerKind | None:
    """Return how answers are read where all targets end alike: in yes or no, a number (with a unit), a letter; else None.

    Numbers are read with decimals after a comma where one of them can only be read so.
    """
    ends = [target.rpartition(MARK)[2] for target in targets]
    found = (kind for kind, ending in ENDINGS.items() if all(map(ending.search, ends)))
    kind = next(found, None) if ends else None
    last = (NUMBER_COMMA.findall(end)[-1:] for end in ends) if kind == "number" else ()
    return "number_comma" if any(COMMAS.search(own) for one in last for own in one) else kind


def labels_of(targets: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of options: A, B, C, D, and on to the last letter that is the answer of a target."""
    letters = string.ascii_uppercase
    found = [extract(target, "letter", letters) for target in targets]
    last = max((letters.index(letter) for letter in found if letter), default=0)
    return tuple(letters[: max(last + 1, FEWEST_LABELS)])


def after_trace(text: str, *, opened: bool = False) -> str | None:
    """Return what follows the trace of thoughts, all of it where there is none; None if the trace does not end.

    A trace begins with the text, or was `opened` by the prompt.
    """
    if TRACE_END in text:
        return text.rpartition(TRACE_END)[2].lstrip()
    return None if opened or text.lstrip().startswith(TRACE_START) else text


def is_correct(
    text: str, kind: str, gold: str, labels: Sequence[str] = (), *, marked: bool | None = None
) -> bool:
    """Tell whether the final answer in `text` is that in `gold`; a text without an answer is wrong.

    Where targets have answers after `####`, they are `marked` (None: as `gold` is); else that is a heading in the text.
    A gold text in which a pattern finds nothing is the answer itself.
    """
    marked = MARK in gold if marked is None else marked
    found, wanted = extract(text, kind, labels, marked=marked), extract(gold, kind, labels, marked=marked)
    if wanted is None and kind.startswith(REGEX):
        wanted = _normal(gold.rpartition(MARK)[2])
    return found is not None and wanted is not None and found.casefold() == wanted.casefold()


def extract(text: str, kind: str, labels: Sequence[str] = (), *, marked: bool = True) -> str | None:
    """Return the answer in the line of the last `####`, where answers are `marked` so, else the last one in `text`, else None.

    Numbers (`number_comma`: as 1.234,5) come without separators, currency sign and trailing zeros, yes and no in lower case, a `text` (all that follows
    the mark, or all of it) without regard to case and white space. `labels` are the options of a `letter` answer. A pattern
    gives the first group of its last match, or all of it where there is no group.
    """
    if kind.startswith(REGEX):
        last = next(iter(reversed(list(re.finditer(kind.removeprefix(REGEX), text)))), None)
        return None if last is None else _normal(last[1 if last.re.groups else 0] or "") or None
    text = _plainly(text)
    if kind == "text":
        return _normal(text.rpartition(MARK)[2] if marked else text) or None
    line, rest = _marked(text) if marked else ("", "")
    if kind == "letter":
        return _letter(text, labels, line)
    if kind == "yes_no":
        first = YES_NO.search(line) or YES_NO.search(rest)
        every = FINAL.findall(text) or SAID.findall(text) or YES_NO.findall(text)
        return (first.group() if first else next(iter(reversed(every)), "")).lower() or None
    if (number := _number(text, kind, line, rest)) is None:
        return None
    found = number.group()
    if kind == "number_comma":
        found = re.sub(r"[^\d,-]", "", found).replace(",", ".")
    return _plain(found)


def is_part(text: str, kind: str) -> bool:
    """Tell whether the number that is read in a target is but a part of its answer, as in `1/3`, `2^10`, `12:45` and `1e23`."""
    if kind not in ("number", "number_comma"):
        return False
    text = _plainly(text)
    number = _number(text, kind, *_marked(text))
    if number is None:
        return False
    whole, start, end = number.string, number.start(), number.end()
    return bool(BEFORE.search(whole[:start]) or AFTER.match(whole[end:]))


def _number(text: str, kind: str, line: str, rest: str) -> re.Match[str] | None:
    pattern = NUMBER_COMMA if kind == "number_comma" else NUMBER
    first = pattern.search(line) or pattern.search(rest)
    return first or next(iter(reversed([*pattern.finditer(text)])), None)


def _plainly(text: str) -> str:
    return text.replace("\u2212", "-").replace("{,}", ",")


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _plain(number: str) -> str:
    value = Decimal(re.sub(r"[,$\s]", "", number))
    return format(value.normalize() + 0, "f")  # + 0 turns -0 into 0


def _marked(text: str) -> tuple[str, str]:
    """Return the line of the last `####` and what follows it, unless that is the heading of a step."""
    line, _, rest = text.rpartition(MARK)[2].lstrip().partition("\n") if MARK in text else ("", "", "")
    return ("", "") if re.match(r"\W*step\b", line, re.IGNORECASE) else (line, rest)


def _letter(text: str, labels: Sequence[str], line: str) -> str | None:
    label = "|".join(re.escape(name) for name in labels)
    if first := re.search(rf"(?<!\w)(?:{label})(?!\w)", line):
        return first.group()
    if boxed := re.findall(rf"\\boxed\{{(?:\\text\{{)?\(?({label})\W", text):
        return str(boxed[-1])
    for words in (r"(?:correct|right|best|final)\s+(?:answer|option|choice)", "answer", "option|choice"):
        said = re.findall(
            rf"(?:{words})\s*(?:is|:|would be)?[\s:(*]*(?:option\s+)?({label})(?!\w)", text, re.IGNORECASE
        )
        if said and said[-1] in labels:
            return str(said[-1])
    listed = re.findall(
        rf"(?<!\w)({label})\s*[).:\]]", text
    )  # `B. vitamin C`, and not one option after the other
    if len(listed) == 1 and re.match(rf"\W*{re.escape(listed[0])}\W", text):
        return str(listed[0])
    # Alone, and not the article of "A plant": a label is not followed by a word in lower case.
    alone = re.findall(rf"(?<![\w'])({label})(?![\w'])(?!\s+[a-z])", text)
    return str(alone[-1]) if alone else None
