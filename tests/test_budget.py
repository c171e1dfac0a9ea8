"""The package stays small: lines per file and per function, and lines of code in all."""

import ast
import tokenize
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
FILES = [*SOURCES, *sorted((REPOSITORY / "tests").rglob("*.py"))]
FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 400, 60, 9200


def lines(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def code_lines(path: Path) -> int:
    """Count the lines that carry code: neither blank, nor comment, nor docstring (as tinygrad counts its own)."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found: set[int] = set()
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in silent][1:-1]
    for token in tokens:
        alone = token.type == tokenize.STRING and token.line.strip().startswith(('"""', 'r"""'))
        if not alone:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found)


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
    assert sum(map(code_lines, SOURCES)) <= PACKAGE_LINES


def test_a_long_function_is_noticed() -> None:
    body = "\n    pass" * FUNCTION_LINES
    assert long_functions(f"def f():{body}") == ["f: 61 lines"]
    assert not long_functions(f"def f():{body.removesuffix('    pass')}")


def test_code_is_counted_without_comments_and_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Doc."""\n\n# comment\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """Doc.\n\n    More."""\n    return x\n'
    )
    assert code_lines(path) == 5
