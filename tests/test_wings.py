"""Who may import whom: wings from wings above them, by what those offer, and third parties where they belong."""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "causalprune"
MODULES = sorted(PACKAGE.rglob("*.py"))

WINGS = (
    "core",
    "models",
    "calibration",
    "interventions",
    "evaluation",
    "attribution",
    "checkpoints",
    "pruning",
    "streaming",
    "shrinking",
    "shipping",
    "circuits",
    "correction",
    "reports",
    "runs",
    "cli",
)
"""The wings in the order that data flows through: each imports from those above it."""

ANYWHERE = {"torch", "jaxtyping", "lazy_loader"}
THIRD_PARTIES: dict[str, set[str]] = {
    "accelerate": {"models"},
    "transformers": {"models", "checkpoints", "evaluation"},
    "safetensors": {"models", "checkpoints"},
    "tokenizers": {"models"},
    "datasets": {"calibration", "evaluation"},
    "reasoning_gym": {"calibration"},
    "jinja2": {"calibration", "reports"},
    "markupsafe": {"reports"},
    "plotly": {"reports"},
    "matplotlib": {"reports"},
    "lm_eval": {"evaluation"},
    "tqdm": {"core", "evaluation"},
    "huggingface_hub": {"checkpoints", "models", "shrinking"},
    "yaml": {"calibration", "checkpoints", "evaluation", "runs"},
    "numpy": {
        "core",
        "models",
        "calibration",
        "evaluation",
        "attribution",
        "checkpoints",
        "shipping",
        "circuits",
    },
    "gguf": {"models", "shipping"},
    "libgguf": {"shipping"},
    "xllamacpp": {"shipping"},
    "scipy": {"evaluation", "attribution", "circuits"},
    "psutil": {"core"},
    "ray": {"attribution"},
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"core", "cli", "reports"},
}
PLACES = {
    "lm_eval": {"evaluation/measures", "evaluation/tasks/harness"},
    "ray": {"attribution/cluster"},
    "safetensors": {"models/loading", "checkpoints/saving"},
}
"""Third parties that stay in single files, however many their wing has."""


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Yield module and name (empty: the module itself) of all imports of a source, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import from causalprune by its full name"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_violation(wing: str, module: str, name: str) -> bool:
    """Tell whether a wing may not import this name from this module of ours."""
    parts = module.split(".")[1:]
    if not parts:  # from causalprune import …
        if name not in WINGS:
            return wing != "cli"
        parts, name = [name], ""
    if parts[0] == wing:
        return False
    above = parts[0] in WINGS[: WINGS.index(wing)]
    offered = len(parts) == 1 and (not name or name in import_module(f"causalprune.{parts[0]}").__all__)
    return not (above and offered)


def violations(file: str, source: str) -> list[str]:
    """Return the imports of a file, as `pruning/layers`, that break a rule."""
    wing, found = file.split("/", maxsplit=1)[0], []
    for module, name in imported(source):
        top = module.partition(".")[0]
        if top == "causalprune":
            if own_violation(wing, module, name):
                found.append(f"{module}.{name}")
        elif top not in sys.stdlib_module_names | ANYWHERE and (
            wing not in THIRD_PARTIES.get(top, set()) or file not in PLACES.get(top, {file})
        ):
            found.append(module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_come_from_wings_above(path: Path) -> None:
    file = str(path.relative_to(PACKAGE).with_suffix(""))
    assert not violations(file if "/" in file else "cli/x", path.read_text(encoding="utf-8"))


def test_every_folder_is_a_wing_that_says_what_it_is_for() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(WINGS)
    for wing in WINGS:
        module = import_module(f"causalprune.{wing}")
        assert module.__doc__
        assert module.__doc__.splitlines()[0].endswith(".")
        assert all(hasattr(module, name) for name in module.__all__)


def test_what_a_wing_offers_is_used_by_another_or_public() -> None:
    wanted: dict[str, set[str]] = {wing: set() for wing in WINGS}
    for path in [*MODULES, PACKAGE / "__init__.pyi"]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                wing = node.module.removeprefix("causalprune.")
                wanted.get(wing, set()).update(alias.name for alias in node.names)
                if node.module == "causalprune":  # from causalprune import wing, used as wing.name
                    for name in {alias.name for alias in node.names} & set(WINGS):
                        wanted[name] |= {
                            a.attr
                            for a in ast.walk(ast.parse(text))
                            if isinstance(a, ast.Attribute) and getattr(a.value, "id", "") == name
                        }
    wanted["cli"].add("main")  # the command itself
    unused = {wing: set(import_module(f"causalprune.{wing}").__all__) - wanted[wing] for wing in WINGS}
    assert not {wing: names for wing, names in unused.items() if names}


def test_names_say_where_they_are() -> None:
    for wing in WINGS:
        files = {path.stem for path in (PACKAGE / wing).glob("*.py")} - {"__init__"}
        assert wing not in files
        assert not files & set(import_module(f"causalprune.{wing}").__all__), "a function would hide its file"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pruning/criteria", "import transformers.models"),
        ("pruning/importance", "def f():\n    from causalprune.streaming import prune_stream"),
        ("interventions/losses", "from causalprune.attribution import estimate"),
        ("evaluation/results", "from causalprune.core.ledger import Ledger"),
        ("evaluation/results", "from causalprune.core import FORMAT"),
        ("evaluation/results", "from causalprune import pruning"),
        ("core/ledger", "import somethingelse"),
        ("runs/recipe", "import causalprune.cli"),
        ("checkpoints/kept", "from safetensors.torch import load_file"),
        ("core/ledger", "from causalprune import __version__"),
    ],
)
def test_a_violation_is_noticed(file: str, source: str) -> None:
    assert violations(file, source)
