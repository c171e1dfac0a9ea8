"""What a chat template makes of messages: the same text on every day and every machine."""

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from typing import Any, Literal

import jinja2

from causalprune.core import DataError, OptionError

Chat = Literal["auto", "on", "off"]
Thinking = Literal["auto", "on", "off"]
Message = Mapping[str, str]

TRACE_START, TRACE_END = "<think>", "</think>"
"""What stands around the thoughts of models that think before they answer."""
DATE = "2026-01-01"
"""What templates write as today, unless another date is asked for."""
NOW = "strftime_now"
"""The function that templates ask for the date."""
DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRSTuUVwWxXyYzZ"
DATED = (
    "{%- macro strftime_now(format) -%}{%- set own = namespace(text=format) -%}"
    "{%- for mark, value in causalprune_date -%}{%- set own.text = own.text.replace(mark, value) -%}{%- endfor -%}"
    "{{ own.text }}{%- endmacro +%}"
)
"""Takes the place of that function: what is given to a template may be data only."""


def on_date(tokenizer: Any, day: str) -> None:
    """Let the chat template of a tokenizer (None: there is none) write this day, `YYYY-MM-DD`, as today."""
    try:
        own = date.fromisoformat(day)
    except ValueError:
        raise OptionError(f"a date is written as {DATE}, not {day!r}") from None
    if tokenizer is not None:
        tokenizer.causalprune_date = str(own)


def date_of(tokenizer: Any) -> str | None:
    """Return the day that the chat template of a tokenizer writes; None where it writes none."""
    if NOW not in str(getattr(tokenizer, "chat_template", None)):
        return None
    return str(getattr(tokenizer, "causalprune_date", DATE))


def rendered(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """Return a chat as its template writes it; nothing in it depends on the moment.

    Raises:
        DataError: the template refuses the turns, or leaves out a system turn.
    """
    template, day = str(tokenizer.chat_template), date_of(tokenizer)
    if day is not None:
        own = DATED + tokenizer.get_chat_template()
        options |= {"chat_template": own, "causalprune_date": _spelt(day)}
    system = next((m["content"].strip() for m in messages if m["role"] == "system"), "")
    try:
        with seeded() if "random" in template or "lipsum" in template else nullcontext():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except jinja2.TemplateError as error:
        if not system:
            raise DataError(f"the chat template refuses turns of the data: {error}") from error
        text = ""
    if system not in text:
        raise DataError(
            "the chat template takes no system turn: put it before the user's with --fold-system (fold_system: true in a recipe)"
        )
    return text


@contextmanager
def seeded() -> Iterator[None]:
    """Let what Python draws at random be the same each time."""
    before = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(before)


def folded(messages: Sequence[Message]) -> list[Message]:
    """Return messages with a system turn at their head put before the turn that follows it."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    first, second, *rest = messages
    return [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest]


@functools.cache
def _spelt(day: str) -> list[list[str]]:
    """Return what every directive of `strftime` gives on a day."""
    own = date.fromisoformat(day)
    marks = [f"%{flag}{letter}" for flag in ("-", "") for letter in DIRECTIVES]
    return [[mark, own.strftime(mark)] for mark in marks]


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
    off, on = (opened(tokenizer, "Hello", thinking=word) if chat else "" for word in (False, True))
    always = off.rstrip().endswith(TRACE_START)
    if thinking == "on" and not (always or off != on or (chat and TRACE_END in str(tokenizer.chat_template))):
        missing = "the tokenizer's chat template knows nothing of it" if chat else "there is no chat template"
        raise OptionError(f"thinking cannot be switched on, as {missing}: leave it out, or say auto")
    if thinking == "off" and always:
        raise OptionError(
            f"thinking cannot be switched off, as the chat template opens {TRACE_START} itself: say auto or on"
        )
    return always or thinking == "on"


def opened(tokenizer: Any, prompt: str | Sequence[Message], *, thinking: bool = False) -> str:
    """Return a prompt, or the turns of one, with the head of the answer to come."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    # Templates that do not know of thinking ignore the word.
    return rendered(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)


_LEADS: dict[str, str] = {}
"""What was found of templates."""


def lead(tokenizer: Any, prompt: str) -> str:
    """Return the white space that a template puts between the head of an answer (the end of a prompt) and its text.

    Those of Llama 2, Mistral and DeepSeek put a blank there, which the first token of an answer takes in.
    """
    template = str(tokenizer.chat_template)
    if template not in _LEADS:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            head, whole = (
                opened(tokenizer, turns[:1]),
                rendered(tokenizer, turns, add_generation_prompt=False),
            )
        except DataError:
            head = whole = ""
        found = re.match(r"\s+(?=b)", whole[len(head) :]) if whole.startswith(head) else None
        _LEADS[template] = found[0] if found else ""
    return "" if prompt[-1:].isspace() else _LEADS[template]


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `DataError` for a model that came without one."""
    if tokenizer is None:
        raise DataError(
            "the model's folder has no tokenizer, which calibration and tasks need: copy its files there (tokenizer.json, …)"
        )
