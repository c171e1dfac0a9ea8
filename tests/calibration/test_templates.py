"""What templates write depends on no moment: not on the day, nor on what is drawn at random."""

import copy
import random
from datetime import datetime
from typing import Any

import pytest
import transformers.utils.chat_template_utils as inside
from tinydata import byte_tokenizer, tiny_decoder

from causalprune.calibration.templates import DATE, date_of, folded, on_date, opened, rendered, seeded
from causalprune.core.errors import DataError, OptionError
from causalprune.evaluation.tasks import harness

LLAMA = (
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '26 Jul 2024' %}{%- endif %}\n"
    "  Today is {{ day }}, {{ strftime_now('%-d.%-m.%y %A') }}\n{{ messages[0].content }}"
)
DRAWS = "{{ range(1000) | random }} {{ lipsum(n=1, html=false) }}{{ messages[0].content }}"


class Later(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "Later":
        return cls(2031, 7, 9)


def tokenizer(template: str) -> Any:
    found = byte_tokenizer(chat=True)
    found.chat_template = template
    return found


def test_templates_write_one_date(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer(LLAMA)
    assert "01 Jan 2026, 1.1.26 Thursday\nHello" in opened(words, "Hello")
    monkeypatch.setattr(inside, "datetime", Later)
    assert "09 Jul 2031" in words.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert "01 Jan 2026" in opened(words, "Hello")
    on_date(words, "2024-02-29")
    assert "29 Feb 2024, 29.2.24 Thursday" in opened(copy.deepcopy(words), "Hello")
    assert date_of(words) == "2024-02-29"


def test_a_pinned_date_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Then":
            return cls.fromisoformat(DATE)

    monkeypatch.setattr(inside, "datetime", Then)
    for template in (LLAMA, " \n" + LLAMA, "{{ strftime_now('%Y-%m-%d %H:%M %j %B') }}"):
        words = tokenizer(template)
        messages = [{"role": "user", "content": "Hello"}]
        assert rendered(words, messages) == words.apply_chat_template(messages, tokenize=False)


def test_templates_that_write_none_have_no_date() -> None:
    assert date_of(byte_tokenizer(chat=True)) is None
    assert date_of(byte_tokenizer()) is None
    assert date_of(None) is None


@pytest.mark.parametrize("day", ["today", "2026-13-01", ""])
def test_a_wrong_date_is_named(day: str) -> None:
    with pytest.raises(OptionError, match="a date is written as 2026-01-01"):
        on_date(None, day)


def test_what_templates_draw_is_the_same_each_time() -> None:
    words = tokenizer(DRAWS)
    assert len({opened(words, "Hello") for _ in range(3)}) == 1
    before = random.getstate()
    with seeded():
        random.random()
    assert random.getstate() == before


def test_refused_turns_are_named() -> None:
    with pytest.raises(DataError, match="refuses turns of the data: must alternate"):
        opened(tokenizer("{{ raise_exception('must alternate') }}"), "Hello")


def test_the_harness_writes_the_same_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "datetime", Later)
    decoder = tiny_decoder(chat=True)
    decoder.tokenizer.chat_template = LLAMA
    with harness.quiet():
        engine = harness._Engine(
            pretrained=decoder.model, tokenizer=copy.deepcopy(decoder.tokenizer), batch_size=1
        )
    found = engine.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert found == opened(decoder.tokenizer, "Hello")


def test_only_a_system_turn_before_another_is_folded() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}
    assert folded([system, user]) == [{"role": "user", "content": "Be brief.\n\n2+3?"}]
    for turns in ([user], [user, system], [system]):
        assert folded(turns) == turns
