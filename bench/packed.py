"""How result files hold what was measured on every example, and a proof that nothing was lost.

    python bench/packed.py REVISION   # result files of another revision against those here, value by value

Rows of one task share their examples, and mostly the weights of these. So a file has each such list once, in `raw["shared"]`, and
rows name it. Examples are the first digits of their hashes. Problems and right answers are in the data sets.
"""

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from causalprune.evaluation.results import write_json, write_text

DIGITS = 12
COLUMNS = ("examples", "weights")
LEFT_OUT = ("prompts", "golds")
HERE = Path(__file__).parent


def is_result(value: Any) -> bool:
    """Tell whether a value of a result file is an EvalResult."""
    return isinstance(value, dict) and {"task", "metric", "values", *COLUMNS} <= value.keys()


def light(value: Any) -> Any:
    """Return what was measured with short hashes of examples, and without problems and right answers.

    Rows that are compared with others must all be light, as examples are paired by their hashes.
    """
    if isinstance(value, list | tuple):
        return [light(item) for item in value]
    if not isinstance(value, dict):
        return value
    if is_result(value):
        kept = {key: light(item) for key, item in value.items() if key not in LEFT_OUT}
        return {**kept, "examples": _shortened(value["examples"])}
    return {key: light(item) for key, item in value.items()}


def packed(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a light record with every list that rows share once, in `shared`: `unpacked` undoes it."""
    shared: dict[str, dict[str, Any]] = {column: {} for column in COLUMNS}

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        if is_result(value):
            return value | {key: _name(lists, value["task"], value[key]) for key, lists in shared.items()}
        return {key: walk(item) for key, item in value.items()}

    without = walk(raw)
    return {**without, "shared": shared} if shared["examples"] else without


def unpacked(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the lists of every row in their places."""
    rest = {key: value for key, value in raw.items() if key != "shared"}

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        if is_result(value):
            return value | {key: lists[value[key]] for key, lists in raw["shared"].items()}
        return {key: walk(item) for key, item in value.items()}

    return dict(walk(rest)) if "shared" in raw else rest


def write_dense(path: Path, record: dict[str, Any]) -> None:
    """Write a record that `read_json` reads, without indentation."""
    write_json(path, record)
    dense(path)


def dense(path: Path) -> None:
    """Take the indentation out of a JSON file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n")


def _shortened(examples: Any) -> list[str]:
    short = [name[:DIGITS] for name in examples]
    if len(set(short)) != len(set(examples)):
        raise SystemExit(f"two examples have the same first {DIGITS} digits: raise DIGITS in bench/packed.py")
    return short


def _name(lists: dict[str, Any], task: str, column: Any) -> str:
    """Return the name of a list, which gets one where it has none: the task, and a number from the second on."""
    own = [name for name in lists if name.partition(" ")[0] == task]
    for name in own:
        if repr(lists[name]) == repr(column):  # 1 is not 1.0 in a file
            return name
    name = f"{task} {len(own) + 1}" if own else task
    lists[name] = column
    return name


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield the places where two records are not equal to the bit; 1 and 1.0 are not."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if key in before and key in after:
                yield from differences(before[key], after[key], f"{place}/{key}")
            else:
                yield f"{place}/{key} is on one side only"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}/{number}")
    elif type(before) is not type(after) or repr(before) != repr(after):
        yield place


def main() -> None:
    """Compare every result file of a revision with the one here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision")
    revision, lost = parser.parse_args().revision, False
    for path in sorted((HERE / "results").glob("*.json")):
        command = ["git", "show", f"{revision}:./{path.name}"]
        found = subprocess.run(command, cwd=path.parent, capture_output=True, check=True, text=True).stdout
        records = [json.loads(text) for text in (found, path.read_text(encoding="utf-8"))]
        before, after = (record | {"raw": light(unpacked(record["raw"]))} for record in records)
        different = list(differences(before, after))
        lost |= bool(different)
        print(f"{path.name}: {'different at ' + ', '.join(different[:9]) if different else 'equal'}")
    raise SystemExit(int(lost))


if __name__ == "__main__":
    main()
