"""The wheel holds all that the package reads: commands run from it alone, with the dependencies of this environment."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow
BEFORE = REPOSITORY / "tests" / "before"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the command of an empty environment into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        sysconfig.get_paths()["purelib"]
    )  # links to sources are not followed
    home = subprocess.run(
        [python, "-c", "import causalprune; print(causalprune.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    assert home.stdout.startswith(str(packages))
    return environment / "bin" / "causalprune"


def called(command: Path, folder: Path, *arguments: object) -> str:
    """Run the installed command and return what it printed."""
    done = subprocess.run(
        [command, *map(str, arguments)], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("smollm2")
def test_a_recipe_that_comes_along_is_planned(installed: Path, tmp_path: Path) -> None:
    assert "gsm_symbolic" in called(installed, tmp_path, "run", "demo", "--dry-run")


def test_a_report_is_written(installed: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    called(installed, tmp_path, "report", BEFORE / "finished", "-o", page)
    text = page.read_text(encoding="utf-8")
    assert "<style>" in text
    assert "<script" in text


def test_a_card_is_written(installed: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned"
    called(
        installed,
        tmp_path,
        "prune",
        BEFORE / "model",
        "-o",
        output,
        "--method",
        "magnitude",
        "--sparsity",
        "0.5",
    )
    assert "magnitude" in (output / "README.md").read_text(encoding="utf-8")
