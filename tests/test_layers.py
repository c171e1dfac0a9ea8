"""Who may import whom: our modules among each other, and third parties where they belong."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "causalprune"
MODULES = sorted(PACKAGE.rglob("*.py"))

EVERYONE = {"types", "errors"}
LAYERS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "provenance": set(),
    "ledger": set(),
    "anatomy": set(),
    "memory": set(),
    "shards": {"memory"},
    "model": {"anatomy", "shards"},
    "criteria": set(),
    "allocation": set(),
    "obs": set(),
    "results": {"provenance"},
    "progress": set(),
    "data": set(),
    "units": set(),
    "uncertainty": set(),
    "importance": {"uncertainty"},
    "ablation": {"units"},
    "statistics": {"ablation"},
    "card": {"results"},
    "checkpoint": {"card", "ledger", "memory", "model", "provenance", "results"},
    "embedded": {"card", "checkpoint", "model", "results"},
    "verification": {"checkpoint", "model"},
    "losses": {"ablation"},
    "tasks": {"data", "memory"},
    "calibration": {"data"},
    "gradients": {"ablation", "losses", "statistics", "units"},
    "questions": set(),
    "measuring": {
        "ablation",
        "anatomy",
        "calibration",
        "gradients",
        "ledger",
        "losses",
        "memory",
        "questions",
        "units",
    },
    "sampling": {"uncertainty"},
    "attribution": {"measuring", "questions", "sampling"},
    "stability": {"attribution", "measuring", "questions", "uncertainty"},
    "resuming": set(),
    "distillation": {"ablation", "calibration", "losses", "resuming"},
    "grading": {"ablation", "losses", "resuming"},
    "methods": {"calibration", "criteria", "distillation", "grading", "obs"},
    "pruned": {"grading", "methods"},
    "pruning": {
        "ablation",
        "allocation",
        "anatomy",
        "calibration",
        "criteria",
        "distillation",
        "gradients",
        "grading",
        "importance",
        "memory",
        "methods",
        "obs",
        "pruned",
        "resuming",
        "statistics",
    },
    "structure": {"anatomy"},
    "shrinking": {
        "attribution",
        "calibration",
        "checkpoint",
        "criteria",
        "distillation",
        "pruning",
        "questions",
        "statistics",
        "structure",
        "units",
    },
    "merging": set(),
    "cluster": {"attribution", "ledger", "measuring"},
    "kept": {"anatomy", "checkpoint", "model"},
    "spectra": {"allocation", "criteria", "importance", "memory", "methods"},
    "stored": {"anatomy", "shards"},
    "residence": {"ablation", "anatomy", "memory", "shards", "stored"},
    "streaming": {
        "anatomy",
        "checkpoint",
        "criteria",
        "importance",
        "memory",
        "methods",
        "model",
        "pruned",
        "pruning",
        "residence",
    }
    | {"shards", "spectra", "stored"},
    "evaluation": {"calibration", "data", "losses", "memory", "results", "tasks"},
    "evidence": {"checkpoint", "importance", "ledger", "results", "uncertainty"},
    "heatmap": {"evidence"},
    "report": {"evidence", "provenance", "results"},
    "recipe": {"calibration", "criteria", "data", "methods", "questions"},
    "options": {"recipe"},
    "plan": {
        "calibration",
        "checkpoint",
        "criteria",
        "data",
        "embedded",
        "evaluation",
        "model",
        "questions",
        "recipe",
    },
    "tables": {"plan", "results", "uncertainty", "verification"},
}
TOP = (
    "traces",
    "cells",
    "run",
    "sweeping",
    "cli_measuring",
    "cli_pruning",
    "cli_reporting",
    "cli",
    "__init__",
    "__main__",
)  # may import LAYERS and what precedes

ANYWHERE = {"torch", "jaxtyping"}
THIRD_PARTIES: dict[str, set[str]] = {
    "accelerate": {"anatomy", "model"},
    "transformers": {"anatomy", "model", "checkpoint", "kept", "tasks"},
    "safetensors": {"model", "checkpoint"},
    "datasets": {"calibration", "data", "tasks"},
    "reasoning_gym": {"calibration", "data"},
    "jinja2": {"calibration", "data", "report"},
    "markupsafe": {"report"},
    "plotly": {"report"},
    "matplotlib": {"report"},
    "lm_eval": {"evaluation", "tasks"},
    "tqdm": {"tasks"},
    "huggingface_hub": {"card", "structure"},
    "yaml": {"card", "data", "evaluation", "recipe"},
    "numpy": {
        "data",
        "calibration",
        "evaluation",
        "memory",
        "results",
        "stability",
        "uncertainty",
    },
    "scipy": {"results", "uncertainty"},
    "psutil": {"distillation"},
    "ray": {"cluster"},
    "typer": {"cli", "cli_measuring", "cli_pruning", "cli_reporting", "options"},
    "click": {"cli"},
    "rich": {"heatmap", "options", "progress", "tables"},
}


def imported(source: str) -> Iterator[str]:
    """Yield the dotted names of all modules that a source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import from causalprune by its full name"
            if node.module == "causalprune":
                yield from (f"causalprune.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def allowed(module: str) -> set[str]:
    """Return the modules of ours that `module` may import."""
    if module in TOP:
        return {*LAYERS, *TOP[: TOP.index(module)], "__init__"}
    assert module in LAYERS, f"give {module} its place in LAYERS"
    return LAYERS[module] | (EVERYONE if module not in EVERYONE else set())


def violations(module: str, source: str) -> list[str]:
    """Return the imports of `module` that break a table; the modules of a folder go by its name."""
    found = []
    for name in imported(source):
        top, _, rest = name.partition(".")
        if top == "causalprune":
            ours = rest.partition(".")[0]
            ours = (
                ours if ours in LAYERS or ours in TOP else "__init__"
            )  # else a name from the package itself
            if ours not in {*allowed(module), module}:
                found.append(name)
        elif top not in sys.stdlib_module_names | ANYWHERE and module not in THIRD_PARTIES.get(top, set()):
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_stay_in_their_layer(path: Path) -> None:
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert not violations(module, path.read_text(encoding="utf-8"))


def test_layers_have_no_cycle() -> None:
    placed: set[str] = set()
    for module, below in LAYERS.items():
        assert below <= placed, f"{module} is listed above what it imports"
        placed.add(module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("criteria", "import transformers.models"),
        ("importance", "def f():\n    from causalprune.models.loading import load"),
        ("losses", "from causalprune import ledger"),
        ("ledger", "import somethingelse"),
        ("recipe", "import causalprune.cli.app"),
        ("run", "import causalprune.cli.app"),
        ("ledger", "from causalprune import __version__"),
    ],
)
def test_a_violation_is_noticed(module: str, source: str) -> None:
    assert violations(module, source)
