import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
from conftest import PACKAGE, Run

from causalprune.cli.groups import grouped
from causalprune.cli.options import LoadingOptions

PANELS = {
    "inspect": ["Model"],
    "attribute": ["Model", "Data", "Method", "Running"],
    "stability": ["Model", "Data", "Method", "Running"],
    "circuit": ["Model", "Data", "Method", "Running"],
    "prune": ["Model", "Data", "Method", "Running", "Hub"],
    "sweep": ["Model", "Data", "Method", "Answers", "Running"],
    "shrink": ["Model", "Data", "Method", "Running", "Hub"],
    "evaluate": ["Model", "Data", "Answers", "Running"],
    "verify": ["Model"],
    "reapply": ["Model"],
}
SHARED = ("revision", "dtype", "seed", "n", "damping", "effect", "preserve", "batch_tokens")
"""An option of every shared group."""
OWN = {"preserve": {"correct"}}
"""Options of the same name that commands have for themselves."""
LISTED = """
import json, typer
from causalprune.cli.app import app
found = typer.main.get_command(app).commands
print(json.dumps({name: {p.name: p.default for p in own.params} for name, own in found.items()}, default=str))
"""


def options(source: Path) -> dict[str, dict[str, Any]]:
    """Return the defaults of all options of every command of the package in a folder, by their names."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", LISTED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", PANELS)
def test_help_shows_own_options_and_then_panels(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert re.findall(r"─ (\w+) ─", out) == ["Arguments", "Options", *PANELS[command]]


@pytest.mark.thorough
def test_a_new_line_in_a_group_reaches_every_command_that_takes_it(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "causalprune", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "causalprune" / "cli" / "options.py"
    text = file.read_text(encoding="utf-8")
    for name in SHARED:
        line = f"    added_{name}: Annotated[int, typer.Option()] = 7\n"
        text, changed = re.subn(
            rf"^    {name}: Annotated", f"{line}    {name}: Annotated", text, flags=re.MULTILINE
        )
        assert changed == 1
    file.write_text(text, encoding="utf-8")
    found = options(tmp_path)
    for name in SHARED:
        takers = {
            command for command, own in found.items() if name in own and command not in OWN.get(name, ())
        }
        assert len(takers) > 1
        assert {command for command, own in found.items() if own.get(f"added_{name}") == 7} == takers


def test_every_command_that_loads_a_model_can_be_told_how() -> None:
    found = options(PACKAGE.parent)
    told = [own for name, own in found.items() if name in PANELS]
    how = {field.name: getattr(LoadingOptions(), field.name) for field in fields(LoadingOptions)}
    assert how.keys() == {"dtype", "device", "attention", "trust_remote_code", "allow_pickle"}
    assert all({key: own[key] for key in how} | {"device": "auto"} == how for own in told)


def test_commands_have_defaults_of_their_own() -> None:
    found = options(PACKAGE.parent)
    assert [found[command]["device"] for command in ("prune", "verify", "reapply")] == ["auto", "cpu", "cpu"]
    assert [found[command]["n"] for command in ("prune", "sweep", "shrink", "stability")] == [128, 48, 48, 8]
    assert [found[command]["batch_tokens"] for command in ("prune", "evaluate")] == [2048, 4096]


@dataclass(frozen=True)
class Inner:
    panel: ClassVar[str] = "Inner"

    depth: Annotated[int, typer.Option("--depth", "-d", min=1)] = 1


@dataclass(frozen=True)
class Outer:
    panel: ClassVar[str] = "Outer"

    name: Annotated[str, typer.Argument()]
    inner: Inner = Inner()
    width: Annotated[float | None, typer.Option()] = None


@pytest.mark.parametrize(
    ("given", "outer"),
    [(["a"], Outer("a")), (["a", "-d", "3", "--width", "0.5"], Outer("a", Inner(3), 0.5))],
)
def test_a_command_gets_its_groups(given: list[str], outer: Outer) -> None:
    app, got = typer.Typer(), list[tuple[Outer, bool]]()

    @app.command()
    @grouped
    def own(outer: Outer, sure: Annotated[bool, typer.Option("--sure")] = False) -> None:
        got.append((outer, sure))

    app([*given, "--sure"], standalone_mode=False)
    assert got == [(outer, True)]


def test_groups_of_a_command_share_no_name() -> None:
    def own(outer: Outer, depth: Annotated[int, typer.Option()] = 2) -> None:
        """Have an option of its own with the name of one of a group."""

    with pytest.raises(ValueError, match="duplicate parameter name: 'depth'"):
        grouped(own)
