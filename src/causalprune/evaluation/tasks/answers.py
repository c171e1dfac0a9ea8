"""Reading the final answer out of a generated solution."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal, get_args

AnswerKind = Literal["number", "yes_no", "letter"]
KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)

NUMBER = re.compile(r"(?:(?<![\w)])-\s?)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")
YES_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)


def is_correct(text: str, kind: AnswerKind, gold: str, labels: Sequence[str] = ()) -> bool:
    """Tell whether the final answer in `text` is `gold`; a text without an answer is wrong."""
    found = extract(text, kind, labels)
    if found is None:
        return False
    if kind == "number":
        return found == extract(gold, kind)
    return found.casefold() == gold.casefold()


def extract(text: str, kind: AnswerKind, labels: Sequence[str] = ()) -> str | None:
    """Return the answer that follows the last `####`, else the last one in `text`, else None.

    Numbers come without separators, currency sign and trailing zeros, yes and no in lower case.
    `labels` are the options of a `letter` answer.
    """
    if kind == "letter":
        return _letter(text, labels)
    pattern = NUMBER if kind == "number" else YES_NO
    marked = text.rpartition("####")[2] if "####" in text else ""
    first = pattern.search(marked)
    found = first.group() if first else next(iter(reversed(pattern.findall(text))), None)
    if found is None:
        return None
    return _plain(found) if kind == "number" else found.lower()


def _plain(number: str) -> str:
    value = Decimal(re.sub(r"[,$\s]", "", number))
    return format(value.normalize() + 0, "f")  # + 0 turns -0 into 0


def _letter(text: str, labels: Sequence[str]) -> str | None:
    label = "|".join(re.escape(name) for name in labels)
    marked = text.rpartition("####")[2] if "####" in text else ""
    if first := re.search(rf"(?<!\w)(?:{label})(?!\w)", marked):
        return first.group()
    said = re.findall(rf"(?:answer|option|choice)\s*(?:is|:)?[\s:(*]*({label})(?!\w)", text, re.IGNORECASE)
    if said and said[-1] in labels:
        return str(said[-1])
    # Alone, and not the article of "A plant": a label is not followed by a word in lower case.
    alone = re.findall(rf"(?<![\w'])({label})(?![\w'])(?!\s+[a-z])", text)
    return str(alone[-1]) if alone else None
