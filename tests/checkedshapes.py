"""Shapes in signatures are checked when functions are called; what names no shape is left to mypy, as checking all doubles the tests' time."""

import ast
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from beartype import beartype
from jaxtyping import _import_hook, install_import_hook

checked = beartype
"""Named here, so that what was compiled by another rule is not taken from the cache."""
Node = TypeVar("Node", ast.FunctionDef, ast.ClassDef)
SHAPE = re.compile(r"(Float|Bool|Int|UInt8)\[Tensor")


class _Transformer(_import_hook.JaxtypingTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802
        own = [node.args, *([node.returns] if node.returns else [])]
        return self._where(node, own, super().visit_FunctionDef)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:  # noqa: N802
        return self._where(
            node, [own for own in node.body if isinstance(own, ast.AnnAssign)], super().visit_ClassDef
        )

    def _where(self, node: Node, shown: Sequence[ast.AST], visit: Callable[[Node], object]) -> Node:
        """Visit a node; without the decorator unless a shape stands in what is shown."""
        decorators = [*node.decorator_list]
        visit(node)
        if not any(SHAPE.search(ast.unparse(own)) for own in shown):
            node.decorator_list = decorators
        return node


def check_shapes(packages: Sequence[str]) -> None:
    """Check functions of these packages, from their first import on."""
    _import_hook.JaxtypingTransformer = _Transformer
    install_import_hook(packages, "checkedshapes.checked")
