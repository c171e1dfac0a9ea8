"""What surprised us about other people's software is a program each, of one form (they themselves need a network)."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FINDINGS = sorted((REPOSITORY / "findings").iterdir())
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CHANGELOG.md")),
    *(REPOSITORY / "docs").glob("*.md"),
    *(REPOSITORY / "src").rglob("*.py"),
    *(REPOSITORY / "tests").rglob("*.py"),
    *(REPOSITORY / "bench").glob("*.py"),
]
HEADER = ("# Surprise: ", "# Versions: ", "# Seen", "# To users: ")
PINNED = re.compile(r"([\w.\[\]-]+)==(\d[\w.+]*)")
each = pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.name)


def header_of(text: str) -> list[str]:
    """Return the comment lines between the first line and the first command."""
    rest = text.splitlines()[1:]
    return rest[: next(n for n, line in enumerate(rest) if not line.startswith("#"))]


def not_pinned(text: str) -> list[str]:
    """Return what is installed and has no version; a shell variable stands for what a loop names."""
    found = []
    for command in text.replace("\\\n", " ").splitlines():
        if " install " in command:
            wanted = shlex.split(command.split(" install ", 1)[1])
            found += [w for w in wanted if not w.startswith(("-", "$")) and not PINNED.fullmatch(w)]
    return found


def test_there_are_findings() -> None:
    assert len(FINDINGS) >= 3
    assert all(path.suffix == ".sh" for path in FINDINGS)


@each
def test_it_runs_strictly_and_cleans_up(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert os.access(path, os.X_OK)
    assert lines[0] == "#!/usr/bin/env bash"
    start = lines.index("set -euo pipefail")
    assert lines[start + 1 : start + 3] == ["folder=$(mktemp -d)", "trap 'rm -rf \"$folder\"' EXIT"]
    subprocess.run(["bash", "-n", path], check=True)


@each
def test_its_packages_are_pinned_and_named_in_the_header(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert PINNED.search(text)
    assert not not_pinned(text)
    versions = next(line for line in header_of(text) if line.startswith("# Versions: "))
    for release in re.findall(r"\d+(?:\.\d+)+", versions):
        assert f"=={release}" in text


@each
def test_its_header_says_what_surprises_and_whom(path: Path) -> None:
    header = header_of(path.read_text(encoding="utf-8"))
    starts = [next(n for n, line in enumerate(header) if line.startswith(start)) for start in HEADER]
    assert starts == sorted(starts)
    assert header[starts[2] + 1].startswith("#   "), "no output was noted"


@each
def test_it_needs_nothing_of_this_library_and_can_fail(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "causalprune" not in text
    assert 'sys.exit("changed: ' in text or 'sys.exit(f"changed: ' in text
    assert "|| true" not in text


def test_findings_that_are_named_elsewhere_exist() -> None:
    named = {name for path in PAGES for name in re.findall(r"findings/([\w-]+\.sh)", path.read_text("utf-8"))}
    assert named
    assert named <= {path.name for path in FINDINGS}


def test_packages_without_a_version_are_noticed() -> None:
    text = 'pip install --quiet one==1.0 "$two" \\\n    three four[all]==2 five>=3\necho install\n'
    assert not_pinned(text) == ["three", "five>=3"]
