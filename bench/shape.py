"""How easy the code is to see, and that none of it became slower: writes `results/shape.json`.

    python bench/shape.py                 # all steps that are not there yet; `shape` is always counted anew
    python bench/shape.py help wanda      # some of them, anew

Steps: shape (seconds), help, wanda, gradient, evaluate (each against the build before, in turn), tests (`make test` on a fresh
clone), coverage (both builds, default and slow tests: more than an hour), wheel.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from before import alternate, before
from common import ROOT, Found, carry_out, data_folder, record, step_parser

sys.path.insert(0, str(ROOT / "tests"))
import shapes
from test_wings import WINGS

CALIBRATION = ("-t", "gsm8k", "-n", "16")
COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "wanda": ("prune", "embedded", "-o", "OUTPUT", "--method", "wanda", *CALIBRATION),
    "gradient": ("attribute", "embedded", "-o", "OUTPUT", "--estimator", "gradient", *CALIBRATION),
    "evaluate": ("evaluate", "embedded", "-t", "gsm8k_nll:50", "-o", "OUTPUT"),
}
PAIRS = {"help": 20, "gradient": 12}
"""Pairs of runs where five do not settle it."""


def shape() -> Found:
    """Count wings, imports between them, and the largest pieces."""
    pairs = shapes.wing_pairs()
    figures = {
        "wings": len(WINGS),
        "wing_pairs": len(pairs),
        "wing_pairs_back": sum(WINGS.index(a) < WINGS.index(b) for a, b in pairs),
        "largest_file_lines": max(map(shapes.lines, shapes.sources())),
        "largest_function_lines": shapes.largest(shapes.every(ast.FunctionDef)),
        "largest_class_lines": shapes.largest(shapes.every(ast.ClassDef)),
        "most_parameters": max(shapes.parameters(function) for _, function in shapes.counted()),
        "bench_mb": _tracked_bytes("bench") / 1e6,
    }
    return {"figures": figures, "raw": {"pairs": sorted(pairs)}}


def _tracked_bytes(folder: str) -> int:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return sum((ROOT / name).lstat().st_size for name in listed.stdout.splitlines())


def timed(name: str) -> Callable[[], Found]:
    """Return the step that times a command of both builds, in the environment of the build before."""

    def step() -> Found:
        python = before()
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "output"
            words = [str(output) if word == "OUTPUT" else word for word in COMMANDS[name]]
            command = [str(python), "-c", "from causalprune.cli import main; main()", *words]
            data = {"CAUSALPRUNE_DATA": str(data_folder())}
            env = {"ours": data, "theirs": data}
            ledgers = [output.with_name(f"output.{end}") for end in ("attribution", "pruning", "ledger")]
            how = {"caches": [output, *ledgers], "cwd": Path(scratch), "env": env}
            alternate(command, command, 1, **how)  # files of packages are read from disk once
            found = alternate(command, command, PAIRS.get(name, 5), **how)
        median = found["ours_over_theirs"]["wall"]["median"]
        return {"figures": {f"{name}_time_over_before": median}, "raw": found}

    return step


def tests() -> Found:
    """Time the tests of a fresh clone, installation apart."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["git", "clone", "-q", str(ROOT), scratch], check=True)
        environment = {**os.environ, "CAUSALPRUNE_DATA": str(data_folder())}
        subprocess.run(["make", ".venv/.installed"], cwd=scratch, env=environment, check=True)
        start = time.perf_counter()
        subprocess.run(["make", "test"], cwd=scratch, env=environment, check=True)
        minutes = (time.perf_counter() - start) / 60
    return {"figures": {"test_minutes": minutes}, "raw": {"minutes": minutes}}


def coverage() -> Found:
    """Measure the lines and branches that the default and the slow tests reach; of the build before once."""
    known = record("shape")["raw"].get("coverage", {}).get("raw", {}).get("percent", {})
    totals = {"before": known.get("before") or _covered(before().parents[2] / "source")}
    totals["ours"] = _covered(ROOT)
    differences = {kind: totals["ours"][kind] - totals["before"][kind] for kind in ("lines", "branches")}
    return {
        "figures": {"coverage_minus_before": min(differences.values())},
        "raw": {"percent": totals, "differences": differences},
    }


def _covered(tree: Path) -> dict[str, Any]:
    """Return the percentages of lines and of branches of a tree that its tests reach, and what the tests said.

    The tests of the wheel are left out: they use the package in an environment of their own.
    """
    said = []
    with tempfile.TemporaryDirectory() as scratch:
        covered, settings = Path(scratch) / "coverage.json", Path(scratch) / "settings"
        settings.write_text("[run]\nbranch = true\nrelative_files = true\n")
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "COVERAGE_FILE": f"{scratch}/data"}
        environment |= {"OMP_NUM_THREADS": "1", "CAUSALPRUNE_DATA": str(data_folder())}
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2"]
        pytest += ["--dist", "loadgroup", "--cov=src/causalprune", "--cov-branch", f"--cov-config={settings}"]
        pytest += ["--cov-report=", "--ignore=tests/test_wheel.py"]
        for marked, more in (("not slow", []), ("slow", ["--cov-append"])):
            command = [*pytest, "-m", marked, *more]
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, check=False
            )
            said.append(done.stdout.splitlines()[-1])
            print(*done.stdout.splitlines()[-8:], sep="\n", file=sys.stderr, flush=True)
            if done.returncode not in (0, 1):  # 1: tests failed, which is told
                raise RuntimeError(f"pytest -m {marked!r} in {tree} stopped:\n{done.stdout}{done.stderr}")
        report = [sys.executable, "-m", "coverage", "json", "-q", f"--rcfile={settings}", "-o", str(covered)]
        subprocess.run(report, cwd=tree, env=environment, check=True)
        found = json.loads(covered.read_text())["totals"]
    lines = found["covered_lines"] / found["num_statements"]
    branches = found["covered_branches"] / found["num_branches"]
    return {"lines": 100 * lines, "branches": 100 * branches, "said": said}


def wheel() -> Found:
    """Build the wheel, install it into an empty environment and use it: the tests that do so."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "tests/test_wheel.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "figures": {"wheel_works": float(done.returncode == 0)},
        "raw": {"said": done.stdout.splitlines()[-1]},
    }


STEPS: dict[str, Callable[[], Found]] = {
    "shape": shape,
    **{name: timed(name) for name in COMMANDS},
    "tests": tests,
    "coverage": coverage,
    "wheel": wheel,
}


def main() -> None:
    """Carry out the steps asked for, or those not done yet, and write `results/shape.json`."""
    parser = step_parser(__doc__, STEPS)
    carry_out("shape", STEPS, parser, parser.parse_args().steps, ("shape",))


if __name__ == "__main__":
    main()
