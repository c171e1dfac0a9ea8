"""The package stays small: lines per file, per function and in all."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
FILES = [*SOURCES, *sorted((REPOSITORY / "tests").rglob("*.py"))]
FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 400, 60, 6000


def lines(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def long_functions(source: str) -> list[str]:
    """Return the functions longer than `FUNCTION_LINES`, with their lengths."""
    functions = (
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > FUNCTION_LINES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_and_functions_are_short(path: Path) -> None:
    assert lines(path) <= FILE_LINES
    assert not long_functions(path.read_text(encoding="utf-8"))


def test_the_package_is_small() -> None:
    assert SOURCES
    assert sum(map(lines, SOURCES)) <= PACKAGE_LINES


def test_a_long_function_is_noticed() -> None:
    body = "\n    pass" * FUNCTION_LINES
    assert long_functions(f"def f():{body}") == ["f: 61 lines"]
    assert not long_functions(f"def f():{body.removesuffix('    pass')}")
