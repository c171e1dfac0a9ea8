"""The package stays easy to see: sizes of files, functions, classes and parameter lists, and of it all."""

from pathlib import Path

import pytest
import shapes
from shapes import classes, code_lines, counted, functions, length, parameters, sources
from test_wings import WINGS

FILES = [*sources(), *sorted(Path(__file__).parent.rglob("*.py"))]
FILE_LINES, FUNCTION_LINES, CLASS_LINES, PARAMETERS, PACKAGE_LINES = 400, 60, 150, 6, 21_600
PAIRS = 70
"""Ordered pairs of wings with an import, for the first 13; a later wing may bring 10 more."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_functions_and_classes_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert shapes.lines(path) <= FILE_LINES
    assert not [f.name for f in functions(source) if length(f) > FUNCTION_LINES]
    assert not [c.name for c in classes(source) if length(c) > CLASS_LINES]


def test_functions_take_few_parameters() -> None:
    assert not [f"{file}: {f.name}" for file, f in counted() if parameters(f) > PARAMETERS]


def test_the_package_is_small() -> None:
    assert sources()
    assert sum(map(code_lines, sources())) <= PACKAGE_LINES


def test_few_wings_import_each_other_and_none_back() -> None:
    pairs = shapes.wing_pairs()
    assert len(pairs) <= PAIRS + 10 * (len(WINGS) - 13)
    assert not [(a, b) for a, b in pairs if WINGS.index(a) < WINGS.index(b)]


def test_what_is_too_long_is_noticed() -> None:
    body = "\n    pass" * FUNCTION_LINES
    assert [length(f) for f in functions(f"@x\ndef f():{body}")] == [61]
    assert [length(c) for c in classes(f"class C:{body}")] == [61]


def test_parameters_are_counted_without_self_and_with_what_hides() -> None:
    (method,) = functions("class C:\n    def f(self, a, /, b, *c, d=1, **e): ...")
    assert parameters(method) == 5
    assert "prune" not in {f.name for _, f in counted()}


def test_code_is_counted_without_comments_docstrings_and_imports(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Doc."""\n\nfrom a import (\n    b,\n)\n\n# comment\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """Doc.\n\n    More."""\n    return x\n'
    )
    assert code_lines(path) == 5
