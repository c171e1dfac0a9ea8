"""What a model writes when it goes on by itself, and how much of a trait is in it."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from speaking import own_file
from tinydata import tiny_decoder, write_data, write_jsonl

from causalprune.core.errors import DataError, MismatchError, OptionError
from causalprune.evaluation import continuing
from causalprune.evaluation.continuing import judge_of
from causalprune.evaluation.measures import evaluate, evaluation_contents, output_type, source_of
from causalprune.evaluation.results import headline, paired_difference
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.tasks.repeating import (
    diversity,
    loops,
    read_phrases,
    repeats,
    repetition,
    spans,
    uniqueness,
)

SETTINGS = Settings(max_new_tokens=24)


def test_traits_of_tokens_worked_out_by_hand() -> None:
    assert repeats([1, 2, 3, 4, 1, 2, 3, 4, 5]) == [False] * 7 + [True, False]
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4, 5]) == pytest.approx(1 / 6)
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2]) == 0.0
    assert loops([9, 1, 2, 1, 2, 1, 2])
    assert not loops([1, 2, 1, 2, 1])
    assert not loops([1, 2, 1, 2, 1, 2, 9])
    block = list(range(40))
    assert loops(block * 3)
    assert not loops(list(range(41)) * 3)
    assert not loops([])
    assert uniqueness("The cat the hat") == 0.75
    assert uniqueness("") == 1.0
    assert diversity([1, 2, 1, 2, 1]) == pytest.approx((2 / 4) * (2 / 3) * 1.0)
    assert spans("Of course, of Course", ["of course"]) == [(0, 9), (11, 20)]
    assert spans("İİ İ. Of course", ["of course"]) == [(6, 15)]  # "İ".lower() has two characters
    assert spans("lalala (a.b)", ["LALA", "A.B"]) == [(0, 4), (2, 6), (8, 11)]


def test_all_traits_of_the_same_continuations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoder = write_data(tmp_path / "data"), tiny_decoder(chat=True)
    written: list[int] = []
    answered = continuing.answered_in_order
    monkeypatch.setattr(
        continuing, "answered_in_order", lambda *own: written.append(len(own[1])) or answered(*own)
    )
    own = {"data_dir": data, "max_new_tokens": 24, "phrases": ("a", "e")}
    names = [f"wikitext2_{trait}:5" for trait in ("rep4", "loops", "uniqueness", "diversity", "phrases")]
    found = evaluate(decoder, names, Settings(), **own)
    assert written == [5]
    first = found[0]
    assert len(first.values) == len(set(first.examples)) == 5
    assert all(result.texts == first.texts for result in found)
    assert [result.metric for result in found] == ["rep4", "loops", "uniqueness", "diversity", "phrases"]
    assert first.description["chat_template"] is False
    for text, prompt, value, unique in zip(
        first.texts, first.prompts, first.values, found[2].values, strict=True
    ):
        assert len(prompt.encode()) == 32  # a token is a byte here
        assert unique == uniqueness(text)
        assert 0 <= value <= 1
    (problems,) = evaluate(decoder, ["gsm8k_rep4:3"], Settings(), **own)
    assert problems.description["chat_template"] is True
    assert paired_difference(first, first).verdict == "no difference shown"
    assert headline(found[1]) == sum(found[1].values) / 5
    few, many = evaluate(decoder, ["gsm8k_rep4:2", "gsm8k_loops:3"], Settings(), **own)
    assert written == [5, 3, 2, 3]  # nothing is shared by other prompts
    assert (len(few.values), len(many.values)) == (2, 3)
    (web,) = evaluate(decoder, ["c4_loops:4"], Settings(), **own)
    contents = evaluation_contents(["c4_loops:4"], Settings(data_dir=data), decoder)
    assert set(web.examples) <= contents.keys()
    assert (source_of("wikitext2_loops"), output_type("gsm8k_rep4")) == ("wikitext2", "generate_until")


def test_files_and_scorers_of_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data")
    path = own_file(tmp_path, ["Paris", "Rome", "Bern"])
    (found,) = evaluate(tiny_decoder(), [f"{path}_loops"], SETTINGS)
    assert len(found.values) == 3
    module = ModuleType("ownmetrics")
    vars(module)["long_words"] = lambda texts, targets: [len(text) for text in texts]
    monkeypatch.setitem(sys.modules, "ownmetrics", module)
    scorers = {"long_words": vars(module)["long_words"]}
    (found,) = evaluate(tiny_decoder(), ["c4_long_words:4"], SETTINGS, data_dir=data, scorers=scorers)
    assert found.values == tuple(float(len(text)) for text in found.texts)
    assert source_of("c4_long_words", scorers) == "c4"


def test_other_phrases_are_not_compared_and_none_are_refused(tmp_path: Path) -> None:
    path = own_file(tmp_path, ["Paris", "Rome", "Bern"])
    one, other = (
        evaluate(tiny_decoder(), [f"{path}_phrases"], SETTINGS, phrases=phrases)[0]
        for phrases in (("a",), ("b",))
    )
    with pytest.raises(Exception, match="different settings"):
        paired_difference(one, other)
    with pytest.raises(OptionError, match="--phrases"):
        evaluate(tiny_decoder(), [f"{path}_phrases"], SETTINGS)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(OptionError, match=r"empty.txt lists no phrases: write one a line"):
        read_phrases(tmp_path / "empty.txt")
    (tmp_path / "list.txt").write_text("Of course!\n\nSure\n")
    assert read_phrases(tmp_path / "list.txt") == ("Of course!", "Sure")


def test_continuations_with_and_without_thoughts_are_not_compared(tmp_path: Path) -> None:
    path, decoder = own_file(tmp_path, ["Paris", "Rome", "Bern"]), tiny_decoder(chat=True)
    decoder.tokenizer.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    off, on = (evaluate(decoder, [f"{path}_loops"], SETTINGS, thinking=word)[0] for word in ("off", "on"))
    with pytest.raises(MismatchError, match="different settings"):
        paired_difference(on, off)


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a" * 60}])
    with pytest.raises(DataError, match="does not fit into the model's 64 positions"):
        evaluate(tiny_decoder(positions=64), [f"{path}_loops"])


def test_an_unknown_measure_of_what_is_written_is_named() -> None:
    with pytest.raises(
        OptionError, match="unknown measure of what a model writes 'loop': did you mean 'loops'"
    ):
        judge_of("loop", SETTINGS)
