"""How large the pieces of the package are and which wings import which: numbers that a test bounds and the bench writes."""

import ast
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "causalprune"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(package: Path = PACKAGE) -> list[Path]:
    """Return all Python files of a package."""
    return sorted(package.rglob("*.py"))


def lines(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def code_lines(path: Path) -> int:
    """Count the lines that carry code: no blank lines, comments, docstrings or imports."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found: set[int] = set()
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in silent][1:-1]
    for token in tokens:
        alone = token.type == tokenize.STRING and token.line.strip().startswith(('"""', 'r"""'))
        if not alone:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in nodes(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


@cache
def nodes(source: str) -> list[ast.AST]:
    """Return all nodes of a source."""
    return [*ast.walk(ast.parse(source))]


def length(node: Function | ast.ClassDef) -> int:
    """Count lines from `def` or `class` to the end, docstring and inner functions included, decorators not."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def functions(source: str) -> list[Function]:
    """Return all functions of a source, methods and inner ones too."""
    return [node for node in nodes(source) if isinstance(node, Function)]


def classes(source: str) -> list[ast.ClassDef]:
    """Return all classes of a source."""
    return [node for node in nodes(source) if isinstance(node, ast.ClassDef)]


def parameters(function: Function) -> int:
    """Count the parameters of a function without `self` and `cls`; `*args` and `**changes` count as one each."""
    own = function.args
    named = [a.arg for a in (*own.posonlyargs, *own.args, *own.kwonlyargs)]
    return len([n for n in named if n not in ("self", "cls")]) + sum(
        a is not None for a in (own.vararg, own.kwarg)
    )


@cache
def public() -> set[str]:
    """Return the names that the package itself offers."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    return {a.name for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}


def counted(package: Path = PACKAGE) -> Iterator[tuple[str, Function]]:
    """Yield the functions whose parameters count, with their file: all outside `cli` that are not public."""
    for path in sources(package):
        if path.relative_to(package).parts[0] != "cli":
            yield from (
                (str(path.relative_to(package)), f)
                for f in functions(path.read_text(encoding="utf-8"))
                if f.name not in public()
            )


def _run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those that are for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        test = getattr(node, "test", None)
        if not (isinstance(node, ast.If) and isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"):
            yield node
            yield from _run_time(node)


def _wings_of(path: Path) -> Iterator[str]:
    for node in _run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{a.name}" for a in node.names] if module == "causalprune" else [module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("causalprune."))


def wing_pairs() -> set[tuple[str, str]]:
    """Return the ordered pairs of wings of which the first imports the second; the package's own file not counted."""
    wings = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    found = (
        (wing, own) for wing in wings for path in (PACKAGE / wing).rglob("*.py") for own in _wings_of(path)
    )
    return {(a, b) for a, b in found if a != b and b in wings}


def largest(nodes: Iterator[Function] | Iterator[ast.ClassDef]) -> int:
    """Return the length of the longest of these."""
    return max(map(length, nodes))


def every(kind: type, package: Path = PACKAGE) -> Iterator[ast.ClassDef] | Iterator[Function]:
    """Yield all functions, or all classes, of a package."""
    find = classes if kind is ast.ClassDef else functions
    return chain.from_iterable(find(path.read_text(encoding="utf-8")) for path in sources(package))
