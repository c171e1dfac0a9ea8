"""What the pages say about the code holds."""

import importlib
import itertools
import re
from functools import reduce
from pathlib import Path

import pytest

import causalprune

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "src" / "causalprune"
FAULTS = set(
    re.findall(r"`(test_\w+)(?:\.(test_\w+))?`", (REPOSITORY / "docs" / "faults.md").read_text("utf-8"))
)
NAMED = re.findall(r"`(\w+)\.([\w.]+)`", (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8"))


def test_method_names_functions() -> None:
    assert len(NAMED) > 10


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_functions_named_in_the_method_exist(module: str, name: str) -> None:
    files = [f"causalprune.{path.parent.name}.{module}" for path in PACKAGE.glob(f"*/{module}.py")]
    homes = [
        file for file in map(importlib.import_module, files) if hasattr(file, name.split(".", maxsplit=1)[0])
    ]
    defined = [
        file for file in homes if getattr(file, name.split(".", maxsplit=1)[0]).__module__ == file.__name__
    ]
    assert len(defined) == 1, files
    assert reduce(getattr, name.split("."), defined[0])


def test_faults_are_listed() -> None:
    assert len(FAULTS) > 15


@pytest.mark.parametrize(("file", "name"), sorted(FAULTS))
def test_tests_named_beside_faults_exist(file: str, name: str) -> None:
    text = next((REPOSITORY / "tests").rglob(f"{file}.py")).read_text(encoding="utf-8")
    assert f"def {name}(" in text or not name


@pytest.mark.parametrize("name", causalprune.__all__)
def test_public_names_can_be_imported(name: str) -> None:
    assert callable(getattr(causalprune, name))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attribute prun"):
        causalprune.prun  # noqa: B018


def test_pages_use_public_names_only() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    used = {name for page in pages for name in re.findall(r"\bcp\.(\w+)\(", page.read_text(encoding="utf-8"))}
    assert used
    assert used <= set(causalprune.__all__)


API = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", causalprune.__all__)
def test_the_api_page_says_what_docstrings_say(name: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", API, re.MULTILINE))
    own = getattr(causalprune, name)
    assert rows[name] == own.__doc__.strip().splitlines()[0]
    assert f"<!-- api: {own.__module__}.{name} -->" in API


def test_the_readme_is_for_somebody_in_a_hurry() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert sum(len(line) + 1 for line in lines) <= 7000
    assert max(map(len, lines)) <= 140
    tables = [
        list(own) for is_row, own in itertools.groupby(lines, lambda line: line.startswith("|")) if is_row
    ]
    assert tables
    assert all(len(rows) - 2 <= 6 and rows[0].count("|") - 1 <= 5 for rows in tables)
