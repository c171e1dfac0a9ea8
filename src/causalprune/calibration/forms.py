"""Rows of a user's own file, in the forms that people have, as problems.

| keys of a row | prompt | target |
|---|---|---|
| `prompt` and `target` or `completion`, `question` and `answer` | the first | the second |
| `instruction`, `input` (may be empty) and `output` | both, with a blank line between | the last |
| `messages` (`role`, `content`), `conversations` (`from`, `value`), or `prompt` and `completion` as lists of messages | the turns before | the last turn of the assistant |
| `text` | – | all of it |
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from causalprune.core import DataError

Row = Mapping[str, Any]
Turn = tuple[str, str]
"""Who speaks, and what."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PAIRS = (("prompt", "target"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
CHATS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
"""Who speaks, in other words than the usual ones."""
LONGEST = 2**31 - 1
"""Characters of a cell, at most: what all systems take."""
FORMS = "a row has prompt and target (or completion), question and answer, messages, conversations, or text"


def own_rows(path: Path, *, measured: bool) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file or of a `datasets` folder with the place they come from, for error messages.

    Of a folder with several splits: `train` to calibrate on, `test` or `validation` for what is `measured`.
    """
    if path.is_dir() or path.suffix == ".parquet":
        for number, row in enumerate(_stored_rows(path, measured=measured), 1):
            yield f"{path} row {number}", row
    elif path.suffix == ".csv":
        csv.field_size_limit(LONGEST)
        lines = csv.DictReader(io.StringIO(read_text(path), newline=""))
        try:
            for row in lines:
                yield f"{path}:{lines.line_num}", row
        except csv.Error as cause:
            raise DataError(f"{path}:{lines.line_num}: cannot be read as CSV: {cause}") from cause
    else:
        yield from read_json_rows(path)


def _stored_rows(path: Path, *, measured: bool) -> Iterator[Row]:
    import datasets  # noqa: PLC0415 (takes a second)

    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                names = ("test", "validation") if measured else ("train",)
                found = found[next((name for name in names if name in found), next(iter(found)))]
        else:
            found = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from found
    except Exception as cause:  # pyarrow and datasets have many
        raise DataError(f"cannot read {path}: {' '.join(str(cause).split())}") from cause


def read_text(path: Path) -> str:
    """Return a text file, without the mark that some programs put at its start."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(
            f"cannot read {path}: {cause}; check the path, or the layout of --data-dir"
        ) from cause


def read_json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a file with one a line, or with an array of them."""
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; every line must be a JSON object")
    parts = enumerate(text.split("\n"), 1)
    if text.lstrip().startswith("["):
        parts = enumerate([text])
    for number, part in parts:
        if not part.strip():
            continue
        where = f"{path}:{number}" if number else str(path)
        try:
            found = json.loads(part)
        except json.JSONDecodeError as cause:
            raise DataError(f"{where}: not valid JSON ({cause})") from cause
        for at, row in enumerate(found, 1) if not number else [(0, found)]:
            place = f"{where} row {at}" if at else where
            if not isinstance(row, dict):
                raise DataError(f"{place}: a JSON object is wanted, not {type(row).__name__}")
            yield place, row


def parts_of(where: str, row: Row, *, with_targets: bool) -> tuple[list[Turn], str, int]:
    """Return the turns before the target of a row, the target, and how many turns after it are left out.

    Running text has no turns before it. The target may be missing, and is empty then, unless `with_targets`.
    """
    pair = next((own for own in PAIRS if set(own) <= row.keys()), None)
    if pair is None and not with_targets:
        pair = next((own for own in PAIRS if own[0] in row), None)
    chat = next((key for key in CHATS if key in row), None)
    if chat is None and pair is not None and isinstance(row[pair[0]], list):
        chat, row = "messages", {"messages": [*row[pair[0]], *_listed(row.get(pair[1]) or [])]}
    if chat is not None:
        return _spoken(where, row[chat], with_targets=with_targets)
    if pair is None and "text" in row and "prompt" not in row:
        return [], _text(where, row, "text"), 0
    prompt, target = pair or PAIRS[0]
    asked = _text(where, row, prompt)
    if prompt == "instruction" and row.get("input"):
        asked = f"{asked}\n\n{_text(where, row, 'input')}"
    given = target in row or with_targets
    return [("user", asked)], _text(where, row, target) if given else "", 0


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [{"role": "assistant", "content": value}]


def _text(where: str, row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: no text under {key!r}; {FORMS}")
    return value


def _spoken(where: str, messages: Any, *, with_targets: bool) -> tuple[list[Turn], str, int]:
    turns = [_turn(where, own) for own in _messages(where, messages)]
    last = next((at for at in reversed(range(len(turns))) if turns[at][0] == "assistant"), None)
    if last is None and not with_targets and turns:
        return turns, "", 0
    if not last:
        raise DataError(f"{where}: no turn of the assistant that follows another; it would be the target")
    return turns[:last], turns[last][1], len(turns) - last - 1


def _messages(where: str, messages: Any) -> Sequence[Any]:
    if isinstance(messages, str):  # a table has no lists
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError as cause:
            raise DataError(f"{where}: its messages are no JSON ({cause})") from cause
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages are a list of turns, not {type(messages).__name__}")
    return messages


def _turn(where: str, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a turn has role and content (or from and value), {message!r} has not")
    if message.get("tool_calls") or message.get("function_call"):
        raise DataError(
            f"{where}: calls of tools are not read: write them into the content as the model sees them"
        )
    role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if isinstance(content, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{where}: a turn has role and content (or from and value) as text, {message!r} has not"
        )
    return ROLES.get(role, role), content
