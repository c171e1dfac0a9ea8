"""The same rows in every form that people have give the same tokens; what cannot be read is named."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tinydata import byte_tokenizer, write_jsonl

from causalprune.calibration import forms
from causalprune.calibration.data import is_file, load_problems
from causalprune.calibration.encoding import Reader, encode
from causalprune.calibration.examples import taken
from causalprune.core.errors import DataError

ROWS = [(f"Is {i} even, or\n{i + 1}?", "yes" if i % 2 == 0 else 'no, "odd"') for i in range(12)]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
ANSWER = {"role": "assistant", "content": "5"}


def said(prompt: str, target: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]


SHAPES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "prompt-target": lambda p, t: {"prompt": p, "target": t},
    "prompt-completion": lambda p, t: {"prompt": p, "completion": t},
    "question-answer": lambda p, t: {"question": p, "answer": t, "id": 3},
    "instruction": lambda p, t: {"instruction": p, "input": "", "output": t},
    "messages": lambda p, t: {"messages": said(p, t)},
    "conversations": lambda p, t: {
        "conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": t}]
    },
    "chat prompt": lambda p, t: {"prompt": said(p, t)[:1], "completion": said(p, t)[1:]},
    "parts": lambda p, t: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": p}]}, said(p, t)[1]]
    },
}


def as_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    return str(write_jsonl(path / "own.jsonl", rows))


def as_array(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / "own.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    return str(path / "own.json")


def as_table(path: Path, rows: list[dict[str, Any]]) -> str:
    with (path / "own.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        plain = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        table.writerows(plain)
    return str(path / "own.csv")


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path / "own.parquet")
    return str(path / "own.parquet")


def as_folder(path: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path / "own")
    return f"{path}/own/"


FORMS = [(shape, write) for shape in SHAPES for write in (as_lines, as_array)]
FORMS += [
    (s, write)
    for s in SHAPES
    for write in (as_table, as_parquet, as_folder)
    if s not in ("chat prompt", "parts")
]
"""Columns have one type, and those of a table hold messages as JSON."""


def tokens(name: str, **options: Any) -> list[Any]:
    reader = Reader(byte_tokenizer(chat=True), chat=True, max_tokens=999, **options)
    return [(e.tokens, e.target_start, e.content) for e in taken(reader, name, "calibration", None)]


@pytest.mark.filterwarnings("ignore:.*")  # of datasets
@pytest.mark.parametrize(("shape", "write"), FORMS)
def test_the_same_rows_in_every_form_give_the_same_tokens(tmp_path: Path, shape: str, write: Any) -> None:
    rows = [SHAPES[shape](*row) for row in ROWS]
    name = write(tmp_path, rows)
    assert is_file(name)
    expected = tokens(str(write_jsonl(tmp_path / "plain.jsonl", [SHAPES["prompt-target"](*r) for r in ROWS])))
    assert tokens(name) == expected
    assert len(expected) == 12


def test_reading_lines_does_not_import_datasets(tmp_path: Path) -> None:
    code = f"import sys; from causalprune.calibration.data import load_problems; load_problems({as_lines(tmp_path, [SHAPES['messages'](*ROWS[0])])!r}, 'calibration'); assert 'datasets' not in sys.modules"
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_with_splits_is_read_by_what_it_is_for(tmp_path: Path) -> None:
    import datasets

    parts = {
        name: datasets.Dataset.from_list([{"prompt": name, "target": "t"}]) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "own")
    found = {
        split: load_problems(f"{tmp_path}/own", split)[0].prompt for split in ("calibration", "evaluation")
    }
    assert found == {"calibration": "train", "evaluation": "test"}


def test_running_text_is_all_target_and_has_no_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "Some words."}])
    reader = Reader(byte_tokenizer(chat=True), chat=True, max_tokens=99)
    (example,) = taken(reader, str(path), "calibration", None)
    assert reader.tokenizer.decode(example.tokens) == "Some words."
    assert example.target_start == 1
    with pytest.raises(DataError, match=r"own.jsonl:1: running text has nothing to answer"):
        load_problems(str(path), "evaluation", with_targets=False)
    with pytest.raises(DataError, match=r"own.jsonl:1: .*measure its loss, .*own.jsonl_nll"):
        load_problems(str(path), "evaluation", with_text=False)


def test_a_file_at_home_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "target": "b"}])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [own.target for own in load_problems("~/own.jsonl", "calibration")] == ["b"]


def test_the_last_answer_is_the_target_and_what_follows_is_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"messages": [*CHAT, ANSWER, CHAT[1]]}])
    reader = Reader(byte_tokenizer(chat=True), chat=True, max_tokens=99)
    with pytest.warns(UserWarning, match="1 turns after the last answer are left out"):
        (example,) = taken(reader, str(path), "calibration", None)
    text = reader.tokenizer.decode(example.tokens)
    assert text == "[system]Be brief.[user]2+3?[assistant]5"
    assert reader.skipped.described()["open_turns"] == 1


def test_system_turns_are_folded_where_the_template_refuses_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"messages": [*CHAT, ANSWER]}])
    (problem,) = load_problems(str(path), "calibration")
    tokenizer = byte_tokenizer(chat=True)
    plain = tokenizer.chat_template
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    dropping = plain.replace("for m in messages", "for m in messages if m.role != 'system'")
    for template in (refusing + plain, dropping):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=r"takes no system turn.*--fold-system"):
            encode(Reader(tokenizer, chat=True, max_tokens=99), problem)
        own = encode(Reader(tokenizer, chat=True, max_tokens=99, fold_system=True), problem)
        assert tokenizer.decode(own.tokens) == "[user]Be brief.\n\n2+3?[assistant]5"


def test_an_instruction_and_its_input_are_one_prompt(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    path = write_jsonl(tmp_path / "own.jsonl", [row])
    (problem,) = load_problems(str(path), "calibration")
    assert (problem.prompt, problem.target) == ("Add.\n\n2 and 3", "5")


def test_a_conversation_without_an_answer_is_a_prompt_where_no_target_is_needed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"messages": CHAT}])
    (problem,) = load_problems(str(path), "evaluation", with_targets=False)
    assert problem.prompt.endswith("2+3?")
    assert not problem.target


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CHAT}, "no turn of the assistant"),
        ({"messages": [ANSWER]}, "no turn of the assistant that follows another"),
        ({"messages": "what"}, "its messages are no JSON"),
        ({"messages": 3}, "messages are a list of turns, not int"),
        ({"messages": [3]}, "a turn has role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn has role and content"),
        ({"conversations": [{"from": "human"}]}, "a turn has role and content"),
        ({"words": "a"}, "no text under 'prompt'"),
        ({"prompt": "", "target": "b"}, "the prompt is empty; running text is a row with 'text' alone"),
        ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "the prompt is empty"),
        ({"prompt": [CHAT[1]], "completion": [{"role": "assistant", "content": " "}]}, "the target is empty"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "target": "b"}, row])
    with pytest.raises(DataError, match=rf"own.jsonl:2: {said}"):
        load_problems(str(path), "calibration")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("own.json", "[1]", "own.json row 1: a JSON object is wanted"),
        ("own.json", "[{]", "own.json: not valid JSON"),
        ("own.csv", "prompt,target\na\n", "own.csv:2: no text under 'target'"),
        ("own.csv", "prompt,target\n", "has no rows"),
        ("own.parquet", "x", "cannot read .*own.parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        load_problems(str(tmp_path / name), "calibration")
    with pytest.raises(DataError, match="cannot read"):
        load_problems(f"{tmp_path}/nothing", "calibration")
    assert set(forms.SUFFIXES) == {".jsonl", ".json", ".csv", ".parquet"}
