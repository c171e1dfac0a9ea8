"""Answers that a model writes: to data sets and to files of a user's, with and without thoughts, read or scored."""

from pathlib import Path
from typing import Any

import pytest
from speaking import own_file, speak
from tinydata import byte_tokenizer, tiny_decoder, write_data, write_jsonl

from causalprune.calibration.data import TASK_FILES, load_problems
from causalprune.calibration.encoding import Reader, encode, question_text, question_tokens
from causalprune.calibration.templates import Thinking, uses_thinking
from causalprune.core.errors import DataError, OptionError
from causalprune.core.types import Decoder
from causalprune.evaluation import answering
from causalprune.evaluation.measures import evaluate, evaluation_contents
from causalprune.evaluation.results import (
    answered,
    paired_difference,
    read_as,
    read_results,
    write_results,
)
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.tasks.answers import after_trace, extract, guess, is_correct, is_part, labels_of
from causalprune.evaluation.tasks.generation import Answer

QWEN = (
    "{{ messages[0].content }}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""A template that lets the model think unless it is told not to."""
R1 = "{{ messages[0].content }}[assistant]<think>\n"
"""A template that opens the trace itself."""
OLD_R1 = "{{ messages[0].content.split('</think>')[-1] }}[assistant]"
"""A template that knows of traces, and leaves it to the model to begin one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def thinking(template: str, **options: Any) -> Decoder:
    decoder = tiny_decoder(chat=True, **options)
    decoder.tokenizer.chat_template = template
    return decoder


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("source", ["gsm8k", "strategyqa", "arc_challenge"])
def test_answers_are_those_of_the_harness(folder: Path, source: str, chat: bool) -> None:
    decoder = tiny_decoder(chat=chat)
    options: dict[str, Any] = {"data_dir": folder, "max_new_tokens": 6, "limit": 5, "batch_size": 1}
    file = TASK_FILES / f"{source}_cot.yaml"
    harness, new, old = evaluate(decoder, [str(file), f"{source}_answers", f"{source}_cot"], **options)
    assert (harness.task, new.task, old.task) == (f"{source}_cot", f"{source}_answers", f"{source}_cot")
    assert any(harness.texts)
    for found in (new, old):
        assert (found.texts, found.values, found.examples) == (
            harness.texts,
            harness.values,
            harness.examples,
        )
        assert found.golds == harness.golds
        assert found.description["answers"]["tokens"] == [6] * 5
    assert paired_difference(old, harness).n == 5, "results of earlier releases can be compared"


GOLDEN = [
    ("That makes $1,234.50 in all", "number", "1234.5"),
    ("so -7 degrees", "number", "-7"),
    ("...\n#### 18", "number", "18"),
    (r"thus \boxed{42}", "number", "42"),
    ("It weighs 18.50 kg.", "number", "18.5"),
    ("1,000,000 people", "number", "1000000"),
    ("YES, it is.", "yes_no", "yes"),
    ("Yes. Then again, nO!", "yes_no", "no"),
    ("The answer is (C).", "letter", "C"),
    ("(b) or (B)", "letter", "B"),
    ("  New\n YORK ", "text", "new york"),
    ("He moved.\n#### New York", "text", "new york"),
    ("", "text", None),
    ("x = 3; x = 4", r"regex:x = (\d)", "4"),
    ("x = 3; x = 4", r"regex:x = \d", "x = 4"),
    ("y", r"regex:x = (\d)", None),
    ("x = \u22125", "number", "-5"),
    (r"\boxed{1{,}250}", "number", "1250"),
    ("#### Step 2: Change\n54-28=26\n\n**The change is 26 dollars.**", "number", "26"),
    ("#### 26\n\nCheck: 28 + 26 = 54", "number", "26"),
    ("B. vitamin C", "letter", "B"),
    ("(B) Hepatitis A", "letter", "B"),
    ("The answer is C. Option A is wrong.", "letter", "C"),
    ("The answer is \\boxed{B}.\n\nNote: option D is close.", "letter", "B"),
    ("A) is wrong. B) is right, so B", "letter", "B"),
    ("Yes, because there is no rule against it.", "yes_no", "yes"),
    ("The answer is no because it melts.", "yes_no", "no"),
    ("Many would say yes, but the answer is no in this case.", "yes_no", "no"),
    ("Some say yes.\n\nAnswer: No\n\nExplanation: It sinks.", "yes_no", "no"),
    ("Yes, it might seem. #### no it cannot", "yes_no", "no"),
    ("If the answer is A, heat rises. But the correct option is C.", "letter", "C"),
    ("First, see whether the answer A fits. It does not. The best choice is (D).", "letter", "D"),
    ("A. is wrong; the right answer would be option D", "letter", "D"),
    ("#### Answer\n26 dollars\n\nCheck: 28 + 26 = 54", "number", "26"),
    ("#### Final Answer:\n\n**$18** for 3 days", "number", "18"),
    ("answer: \u22125", r"regex:answer: (\S+)", "\u22125"),
    ("a", r"regex:a(b)?", None),
]


@pytest.mark.parametrize(("text", "kind", "expected"), GOLDEN)
def test_how_answers_are_read(text: str, kind: str, expected: str | None) -> None:
    assert extract(text, kind, "ABCD") == expected


def test_a_pattern_reads_the_target_too_or_takes_it_whole() -> None:
    kind = r"regex:(\d+) pears"
    assert is_correct("3 pears, or 4 pears", kind, "It is 4 pears.")
    assert is_correct("3 pears", kind, "3")
    assert not is_correct("no pears", kind, "It is 4 pears.")
    assert is_correct("new\nyork", "text", "New York")
    assert not is_correct("", "text", " ")


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (["#### 18", "so 3 pears\n#### 4"], "number"),
        (["18", "-3.5", "1,200"], "number"),
        (["It is 18 km/h.", "It is $3.", "5 %"], "number"),
        (["Yes", "so NO.", "#### yes"], "yes_no"),
        (["B", "The answer is (C).", "**A**"], "letter"),
        (["18", "eighteen"], None),
        (["#### 3/4", "#### 1/4"], None),
        (["2024-05-12", "2023-01-12"], None),
        (["12:30", "9:30"], None),
        (["A12", "B12"], None),
        (["2^10", "3^10"], None),
        (["1.2.3.4", "1.2.3.5"], None),
        (["Answer:18", "Answer:5"], "number"),
        (["1.234.567", "2.345.678"], "number_comma"),
        (["1.234.567 €", "12,5 €"], "number_comma"),
        (["Paris", "Rome"], None),
        (["yes", "4"], None),
        ([], None),
    ],
)
def test_the_way_to_read_is_guessed_where_targets_end_alike(targets: list[str], kind: str | None) -> None:
    assert guess(targets) == kind


@pytest.mark.parametrize(
    "text",
    ["Step 1: 42", "6 / 2 = 3", "It goes 5 km/h.", "Answer:18", "1,200 - 3 = 1,197", "-3.5", "x is -5"],
)
def test_a_number_on_its_own_is_no_part_of_another(text: str) -> None:
    assert not is_part(text, "number")


def test_a_heading_is_no_answer_where_targets_have_no_mark() -> None:
    text = "#### 1. Add\n2 + 3 = 5\n\nIt is 5."
    assert is_correct(text, "number", "It is 5.")
    assert not is_correct(text, "number", "5", marked=True)
    assert is_correct("2 + 3\n#### 5\n", "number", "5", marked=True)


def test_labels_reach_as_far_as_targets() -> None:
    assert labels_of(["A", "B"]) == tuple("ABCD")
    assert labels_of(["(F)", "C."]) == tuple("ABCDEF")


def test_what_follows_the_thoughts_is_the_answer() -> None:
    assert after_trace("<think>2, or 3</think>\n\n4") == "4"
    assert after_trace("2, or 3</think>4", opened=True) == "4"
    assert after_trace("2, or 3", opened=True) is None
    assert after_trace("\n<think>2") is None
    assert after_trace(" 4") == " 4"


def test_answers_to_a_file_are_right_or_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own_file(tmp_path, ["So many\n#### 10", "#### 11", "#### 1,012", "#### 13"])
    said = {"0": "It is 10 pears", "1": "No: 12", "2": "$1012.00", "3": "nothing"}
    calls = speak(monkeypatch, lambda prompt: said[prompt.split("?")[0][-1]])
    told: list[str] = []

    class Shown:
        def __call__(self, done: int, total: int) -> None: ...

        def remark(self, text: str) -> None:
            told.append(text)

    (found,) = evaluate(tiny_decoder(chat=True), [f"{path}_answers"], on_progress=Shown())
    assert (found.metric, found.values) == ("accuracy", (1.0, 0.0, 1.0, 0.0))
    assert found.texts == tuple(said.values())
    assert found.golds[1] == "#### 11"
    assert {limit for _, limit, _ in calls} == {512}
    assert all(not stop for *_, stop in calls), "the template ends answers"
    assert told == ["answers are read as number, as all targets end so"]
    assert read_as(found) == "answers read as number, as all targets end so"
    write_results(tmp_path / "r.json", [found])
    assert read_results(tmp_path / "r.json") == [found]
    (two,) = evaluate(tiny_decoder(chat=True), [f"{path}_answers:2"])
    assert set(two.examples) < set(found.examples)
    seen = evaluation_contents([f"{path}_answers:2"], Settings(), tiny_decoder())
    assert seen == dict.fromkeys(two.examples, str(path))
    for how, values in (("text", (0.0,) * 4), (r"regex:(\d+) pears", (1.0, 0.0, 0.0, 0.0))):
        (own,) = evaluate(tiny_decoder(chat=True), [f"{path}_answers"], answer=how)
        assert own.values == values, how
        assert read_as(own) == f"answers read as {how}"


def test_a_way_to_read_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speak(monkeypatch, lambda _: pytest.fail("generated"))
    path, decoder = own_file(tmp_path, ["Paris", "Rome"]), tiny_decoder()
    with pytest.raises(
        OptionError, match="--answer number, number_comma, yes_no, letter, text or regex:PATTERN"
    ):
        evaluate(decoder, [f"{path}_answers"])
    with pytest.raises(DataError, match="2 of 2 targets have no answer to read as number, such as 'Paris'"):
        evaluate(decoder, [f"{path}_answers"], answer="number")
    for target in ("so 1/3", "#### 1/3", "12:45", "1e23", "2^10", "2024-05-12", r"\frac{1}{3}"):
        path = own_file(tmp_path, ["3", target])
        with pytest.raises(
            DataError, match=r"1 of 2 targets are more than the number .*--answer text or regex:"
        ):
            evaluate(decoder, [f"{path}_answers"], answer="number")
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "It rained."}])
    with pytest.raises(DataError, match=r"text.jsonl:1: running text has nothing to answer: .*_nll"):
        evaluate(decoder, [f"{path}_answers"], answer="text")
    with pytest.raises(OptionError, match="did you mean 'number'"):
        Settings(answer="nummer")
    with pytest.raises(OptionError, match="no regular expression"):
        Settings(answer="regex:(")


def test_prompts_of_a_base_model_end_cleanly_and_its_answers_at_a_blank_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = speak(monkeypatch, lambda _: "\n\n10\n\nQuestion 1? 99")
    path = own_file(tmp_path, ["10", "11"], prompt="Q{}: \n")
    (found,) = evaluate(tiny_decoder(), [f"{path}_answers"])
    assert [text for text, *_ in calls] == ["Q0:", "Q1:"]
    assert [stop for *_, stop in calls] == [["\n\n"]] * 2
    assert (found.texts, found.values) == (("10", "10"), (1.0, 0.0))
    path = own_file(tmp_path, ["a\n\n10", "11"])
    evaluate(tiny_decoder(), [f"{path}_answers"])
    assert calls[-1][2] == [], "blank lines are part of such answers"


def test_answers_without_an_end_are_counted_and_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, decoder = own_file(tmp_path, ["10", "11"]), tiny_decoder(chat=True)
    speak(monkeypatch, lambda _: "10", ended=False)
    (found,) = evaluate(decoder, [f"{path}_answers"], max_new_tokens=2)
    assert found.values == (1.0, 0.0)
    told = found.description["answers"]
    assert told == {"not_ended": 1.0, "mean_tokens": 2, "tokens": [2, 2], "unended": [0, 1]}
    assert answered(found) == "100% did not end, 2 tokens"


def test_an_answer_that_does_not_fit_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    path = own_file(tmp_path, ["10", "11"], prompt="{}" + "a" * 41)
    with pytest.raises(DataError, match="ask for --max-new-tokens 8 at most"):
        evaluate(tiny_decoder(positions=50), [f"{path}_answers"], max_new_tokens=9)
    (found,) = evaluate(tiny_decoder(positions=50), [f"{path}_answers"], max_new_tokens=8)
    assert found.description["answers"]["tokens"] == [8, 8]
    with pytest.raises(DataError, match="shorten it"):
        evaluate(tiny_decoder(positions=40), [f"{path}_answers"])


def test_progress_counts_problems(tmp_path: Path) -> None:
    path, told = own_file(tmp_path, [str(i) for i in range(9)]), list[tuple[int, int]]()
    evaluate(
        tiny_decoder(),
        [f"{path}_answers"],
        batch_size=1,
        max_new_tokens=3,
        on_progress=lambda *now: told.append(now),
    )
    assert told == sorted(told)
    assert {done for done, _ in told} >= {4, 8, 9}
    assert {total for _, total in told} == {9}


@pytest.mark.parametrize(
    ("template", "auto", "on", "off"),
    [(QWEN, False, True, False), (R1, True, True, None), (OLD_R1, False, True, False), ("{{ messages[0].content }}", False, None, False)],
)  # fmt: skip
def test_whether_a_model_thinks(template: str, auto: bool, on: bool | None, off: bool | None) -> None:
    words = thinking(template).tokenizer
    cases: list[tuple[Thinking, bool | None]] = [("auto", auto), ("on", on), ("off", off)]
    for wanted, expected in cases:
        if expected is None:
            with pytest.raises(OptionError, match="thinking cannot be switched"):
                uses_thinking(words, wanted, chat=True)
        else:
            assert uses_thinking(words, wanted, chat=True) == expected
    with pytest.raises(OptionError, match="no chat template"):
        uses_thinking(words, "on", chat=False)


@pytest.mark.parametrize("template", [QWEN, R1])
def test_thoughts_are_no_answer(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoder = own_file(tmp_path, ["10", "11", "12"]), thinking(template, positions=8000)
    start = "" if template == R1 else "<think>"
    said = {"0": f"{start}11?</think>\n\n10", "1": f"{start}11</think>12", "2": f"{start}so 12"}
    calls = speak(monkeypatch, lambda prompt: said[prompt.split("?")[0][-1]])
    (found,) = evaluate(decoder, [f"{path}_answers"], thinking="on")
    assert found.values == (1.0, 0.0, 0.0)
    assert found.texts == ("10", "12", f"{start}so 12")
    assert found.description["answers"]["unended"] == [2], "a trace without an end"
    assert {limit for _, limit, _ in calls} == {4096}
    assert all("</think>" not in prompt for prompt, *_ in calls)
    decoder = thinking(template, positions=900)
    (short,) = evaluate(decoder, [f"{path}_answers"], thinking="on")
    longest = max(len(byte_tokenizer()(prompt)["input_ids"]) for prompt, *_ in calls[-3:])
    assert short.description["generation"]["max_gen_toks"] == 900 - longest
    assert short.description["thinking"] is True
    if template == QWEN:
        (plain,) = evaluate(decoder, [f"{path}_answers"])
        assert "thinking" not in plain.description
        assert calls[-1][0].endswith("</think>\n\n")
        assert calls[-1][1] == 512


def test_what_ends_an_answer_to_a_data_set_does_not_end_thoughts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, decoder = speak(monkeypatch, lambda _: "#### 102"), thinking(QWEN, positions=8000)
    for wanted, stop in (("auto", ["\nQuestion:"]), ("on", [])):
        (found,) = evaluate(decoder, ["gsm8k_answers"], data_dir=folder, thinking=wanted)
        assert (sum(found.values), calls[-1][2]) == (1.0, stop)


def test_special_tokens_around_thoughts_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoder = own_file(tmp_path, ["10"]), thinking(R1)
    decoder.tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    tokens = tuple(decoder.tokenizer("11</think>10")["input_ids"])
    monkeypatch.setattr(answering, "answers", lambda *_: [Answer(tokens, 9, ended=True, broken=False)])
    (found,) = evaluate(decoder, [f"{path}_answers"])
    assert found.texts == ("10",)


def test_a_target_with_thoughts_follows_a_prompt_that_asks_for_them(tmp_path: Path) -> None:
    reader = Reader(thinking(QWEN).tokenizer, chat=True, max_tokens=999)
    path = own_file(tmp_path, ["10", "<think>1</think>11"])
    for problem, thinks in zip(load_problems(str(path), "evaluation"), (False, True), strict=True):
        found, asked = encode(reader, problem), question_text(reader, problem, thinking=thinks)
        assert list(found.tokens[: found.target_start]) == question_tokens(reader, problem, asked)
