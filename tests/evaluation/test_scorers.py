"""Functions of a user's as measures."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from speaking import own_file, speak
from tinydata import tiny_decoder, write_data, write_jsonl

from causalprune.core.errors import DataError, OptionError
from causalprune.evaluation.measures import check_tasks, evaluate, evaluation_contents, source_of
from causalprune.evaluation.results import headline, interval, paired_difference, read_results, write_results
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.tasks.scorers import load_scorers
from causalprune.evaluation.written import together


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of scorers that can be imported."""
    module = ModuleType("mymetrics")
    vars(module)["length"] = lambda texts, targets: [len(text) for text in texts]
    vars(module)["constant"] = 7
    monkeypatch.setitem(sys.modules, "mymetrics", module)
    return module


def test_a_scorer_makes_a_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: ModuleType
) -> None:
    path = own_file(tmp_path, ["Paris", "Rome", "Bern"])
    speak(monkeypatch, lambda prompt: "a" * (1 + int(prompt.split("?")[0][-1])))
    seen: list[tuple[list[str], list[str] | None]] = []

    def brief(texts: list[str], targets: list[str] | None) -> list[float]:
        seen.append((texts, targets))
        return [len(text) / 2 for text in texts]

    vars(brief)["higher_is_better"] = False
    (found,) = evaluate(tiny_decoder(), [f"{path}_too_long:3"], scorers={"long": brief, "too_long": brief})
    assert (found.task, found.metric, found.values) == (f"{path}_too_long", "too_long", (0.5, 1.0, 1.5))
    assert seen[-1] == (["a", "aa", "aaa"], ["Paris", "Rome", "Bern"])
    assert found.description["higher_is_better"] is False
    assert headline(found) == interval(found).value == 1.0
    speak(monkeypatch, lambda _: "a" * 9)
    (worse,) = evaluate(tiny_decoder(), [f"{path}_too_long"], scorers={"too_long": brief})
    assert paired_difference(worse, found).verdict == "worse"
    write_results(tmp_path / "r.json", [worse])
    (again,) = read_results(tmp_path / "r.json")
    assert paired_difference(again, found).verdict == "worse"
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    bare = write_jsonl(tmp_path / "bare.jsonl", rows)
    evaluate(tiny_decoder(), [f"{bare}_long"], scorers={"long": brief})
    assert seen[-1][1] is None
    assert evaluation_contents([f"{bare}_long"], Settings(scorers={"long": brief}), None)
    with pytest.raises(DataError, match="no text under 'target'"):
        evaluate(tiny_decoder(), [f"{bare}_answers"])


def test_a_scorer_may_end_in_a_word_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speak(monkeypatch, lambda _: "four")
    own = {"short_answers": lambda texts, targets: [len(text) for text in texts]}
    data = write_data(tmp_path / "data")
    (found,) = evaluate(tiny_decoder(), ["gsm8k_short_answers:3"], scorers=own, data_dir=data)
    assert (found.metric, set(found.values)) == ("short_answers", {4.0})


def test_scorers_are_named_by_tasks() -> None:
    check_tasks(["a.jsonl_polite:5", "gsm8k_polite", "arc_challenge"], ["polite", "challenge"])
    assert source_of("a.jsonl_very_polite", ["polite", "very_polite"]) == "a.jsonl"
    assert source_of("gsm8k_polite", ["polite"]) == "gsm8k"
    assert source_of("arc_challenge", ["challenge"]) == "arc_challenge"
    for name in ("short_answers", "long_loops"):
        assert source_of(f"gsm8k_{name}", [name]) == "gsm8k"
    assert together(["gsm8k_long_loops", "gsm8k_loops"], ["long_loops"]) == [
        ("gsm8k_long_loops",),
        ("gsm8k_loops",),
    ]
    with pytest.raises(OptionError, match="gsm8k_nll:3 and gsm8k_nll:5 would both be called gsm8k_nll"):
        check_tasks(["gsm8k_nll:3", "gsm8k_loops", "gsm8k_nll:5"])
    with pytest.raises(OptionError, match="--scorer rude scores nothing"):
        check_tasks(["gsm8k_polite"], ["polite", "rude"])
    with pytest.raises(OptionError, match="FILE_NAME with --scorer NAME=module:function"):
        check_tasks(["a.jsonl_polite"])
    with pytest.raises(OptionError, match="did you mean 'gsm8k_polite'"):
        check_tasks(["gsm8k_polit"], ["polite"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("length", "is written NAME=module:function"),
        ("a=mymetrics", "is written NAME=module:function"),
        ("nll=mymetrics:length", "another measure's name"),
        ("own_kl=mymetrics:length", "ends in another measure's name"),
        ("a=nowhere_at_all:length", "No module named 'nowhere_at_all', neither installed nor in the current"),
        ("a=mymetrics:absent", "a function absent is wanted, and mymetrics has none"),
        ("a=mymetrics:constant", "is int, which cannot be called"),
        ("a=broken_one:f", "cannot be imported"),
    ],
)
def test_scorers_that_cannot_be_had(
    word: str, message: str, metrics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_one.py").write_text("1 / 0\n")
    with pytest.raises(OptionError, match=message):
        load_scorers([word])


def test_a_scorer_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_scorer.py").write_text("def f(texts, targets):\n    return [1] * len(texts)\n")
    assert load_scorers(["a=my_own_scorer:f"])["a"](["x"], None) == [1]
    del sys.modules["my_own_scorer"]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda texts, targets: [1.0], "gave 1 numbers for 2 texts"),
        (lambda texts, targets: [1.0, float("nan")], "gave nan for '11'"),
        (lambda texts, targets: [1.0, "good"], "failed .ValueError"),
        (lambda texts, targets: 1 / 0, "failed .ZeroDivisionError"),
    ],
)
def test_a_scorer_that_fails_does_so_before_anything_is_written(
    scorer: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak(monkeypatch, lambda _: pytest.fail("generated"))
    with pytest.raises(OptionError, match=message):
        evaluate(tiny_decoder(), [f"{own_file(tmp_path, ['10', '11'])}_a"], scorers={"a": scorer})
