"""Texts of a model's own become samples: which tokens show a behaviour, and which texts are clean."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tinydata import byte_tokenizer

from causalprune.calibration.data import Problem
from causalprune.core.errors import DataError, OptionError
from causalprune.correction.behaviours import OWN, check_shown, judged, sought
from causalprune.evaluation.answering import Written

WORDS = byte_tokenizer()


def written(*texts: str) -> Written:
    """Return what a model might have written, a token for each byte."""
    prompt = tuple(WORDS("p:")["input_ids"])
    problems = [Problem("some", f"prompt {i}", "") for i in range(len(texts))]
    tokens = tuple((prompt, tuple(WORDS(text)["input_ids"])) for text in texts)
    return Written(problems, texts, (True,) * len(texts), False, {}, tokens)


def test_tokens_that_repeat_are_targets_and_the_rest_is_clean() -> None:
    found = judged("some", written("xabcdabcdabcd", "nothing here"), sought("loops"), WORDS)
    assert found.values == (1.0, 0.0)
    example = found.undesired[0]
    shown = "".join(
        WORDS.decode([token]) for token, own in zip(example.tokens, example.is_target, strict=True) if own
    )
    assert shown == "dabcd"[0:1] + "abcd"  # the second d, and all of the third block
    assert example.target_start == 2 + 8
    clean = found.clean[1]
    assert clean.source == "clean: some"
    assert clean.target_tokens == len("nothing here")
    check_shown([found], sought("loops"))


def test_what_a_clean_text_has_of_the_behaviour_is_not_to_stay() -> None:
    clean = judged("some", written("abcdabcd!"), sought("loops"), WORDS).clean[0]
    kept = [token for token, own in zip(clean.tokens, clean.is_target, strict=True) if own]
    assert WORDS.decode(kept) == "abcdabc!"  # not the d that repeats four letters


def test_phrases_are_found_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("of course\n")
    wanted = sought(f"phrases:{tmp_path / 'list.txt'}")
    found = judged("some", written("Well, Of course. é of course", "no"), wanted, WORDS)
    example = found.undesired[0]
    marked = [token for token, own in zip(example.tokens, example.is_target, strict=True) if own]
    assert WORDS.decode(marked) == "Of courseof course"
    assert set(found.clean) == {1}


def test_a_function_scores_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("ownscores")
    vars(module)["rude"] = lambda texts: [
        float("!" in text) for text in texts
    ]  # as others write them: texts alone
    monkeypatch.setitem(sys.modules, "ownscores", module)
    found = judged("some", written("go!", "please", ""), sought("ownscores:rude"), WORDS)
    assert found.undesired[0].target_tokens == 3
    assert set(found.clean) == {1}  # where nothing was written, nothing can be targeted
    vars(module)["broken"] = lambda texts: [1 / (len(text) - 2) for text in texts]
    with pytest.raises(
        OptionError, match=r"scorer broken .test_behaviours:.*failed .*division by zero.* on 'no'"
    ):
        judged("some", written("yes", "no"), sought("ownscores:broken"), WORDS)
    vars(module)["blank"] = lambda texts: [float("nan")] * len(texts)
    with pytest.raises(OptionError, match=r"scorer blank .test_behaviours:.*gave nan for 'One text"):
        sought("ownscores:blank")
    vars(module)["one"] = lambda texts: [1.0]
    with pytest.raises(OptionError, match="gave 1 numbers for 2 texts"):
        sought("ownscores:one")
    vars(module)["leaves"] = lambda texts: sys.exit(3)
    with pytest.raises(OptionError, match=r"scorer leaves .*failed \(SystemExit: 3\) on 'One text"):
        sought("ownscores:leaves")
    vars(module)["loops"] = vars(module)["rude"]  # is no measure of ours
    assert [sought(f"ownscores:{name}").judge.name for name in ("rude", "loops")] == ["rude", OWN]


def test_nothing_or_everything_shown_says_how_to_go_on() -> None:
    wanted = sought("loops")
    none = judged("some", written("abcdabcd!", "nothing"), wanted, WORDS)
    with pytest.raises(
        DataError,
        match=r"0 of 2 .* is 'abcdabcd!' \(0.17\): lower the bar \(--behaviour rep4 --bar 0\.16{15}7?\d*\)",
    ):
        check_shown([none], wanted)
    every = judged("some", written("aaaaaaaa", "bbbbbbbb"), wanted, WORDS)
    with pytest.raises(DataError, match="all 2 continuations show loops"):
        check_shown([every], wanted)
    empty = judged("some", written("aaaaaaaa", ""), wanted, WORDS)
    with pytest.raises(DataError, match="the 1 continuations that do not show loops are empty"):
        check_shown([empty], wanted)
    lower = sought("rep4", 1 / 6)
    check_shown([judged("some", written("abcdabcd!", "nothing"), sought("rep4", 0.16), WORDS)], lower)


def test_a_bar_is_offered_where_it_tells_texts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("ownscores")
    vars(module)["lower"] = lambda texts: [-float("!" in text) for text in texts]
    monkeypatch.setitem(sys.modules, "ownscores", module)
    wanted = sought("ownscores:lower")
    for texts, words in (
        (("go!", "please"), r"0 of 2 .* is 'please' \(0\): lower the bar \(--bar 0\.0\), or take more"),
        (("go!", "no!"), r"0 of 2 .*nothing to take out: take more or other prompts$"),
    ):
        with pytest.raises(DataError, match=words):
            check_shown([judged("some", written(*texts), wanted, WORDS)], wanted)
    all_shown = sought("ownscores:lower", -1)
    with pytest.raises(DataError, match=r"raise the bar \(--bar above -1\.0\)"):
        check_shown([judged("some", written("go!", "please"), all_shown, WORDS)], all_shown)
    with pytest.raises(DataError, match="no clean text beside them: take more or other prompts"):
        check_shown([judged("some", written("go!", "no!"), all_shown, WORDS)], all_shown)
    loops = sought("loops")
    with pytest.raises(DataError, match=r"0 of 2 .*nothing to take out: take more or other prompts$"):
        check_shown([judged("some", written("abc", "xyz"), loops, WORDS)], loops)


@pytest.mark.parametrize("bar", [math.nan, math.inf])
def test_a_bar_is_finite(bar: float) -> None:
    with pytest.raises(OptionError, match=f"a bar is a finite number, as 0.5, not {bar}"):
        sought("loops", bar)
