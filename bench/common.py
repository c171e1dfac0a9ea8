"""What every measuring program writes beside its figures: machine, versions, commit, data."""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packed import light, packed, unpacked, write_dense

from causalprune.core.provenance import git_commit, versions
from causalprune.evaluation.results import read_json

BENCH = Path(__file__).parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
RUNS = BENCH / "runs"
ROWS = BENCH / "rows"
"""Rows of steps that are not finished: small files that go with the checkout, so that another machine goes on with them."""
Found = dict[str, Any]
"""What a step found: its `figures`, and what they come from as `raw`."""


def data_folder() -> Path:
    """Return the folder of data sets: $CAUSALPRUNE_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("CAUSALPRUNE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"no data in {folder}: set CAUSALPRUNE_DATA")
    return folder


def record(name: str) -> dict[str, Any]:
    """Return a result file with the examples of every row in their place, empty where there is none yet."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {"raw": {}, "figures": {}}
    found = read_json(path)
    return found | {"raw": unpacked(found["raw"])}


def write_figures(name: str, figures: dict[str, float | None], raw: dict[str, Any], seeds: list[int]) -> Path:
    """Write `results/<name>.json` with everything needed to judge and repeat the numbers, as bench/packed.py says."""
    path = RESULTS / f"{name}.json"
    found = {
        "figures": figures,
        "machine": machine(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "seeds": seeds,
        "data_sha256": _data_hashes(),
        "raw": packed(light(_elsewhere(raw))),
    }
    path.parent.mkdir(exist_ok=True)
    write_dense(path, found)
    return path


def step_parser(about: str | None, steps: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of a program that takes the names of steps."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(steps))
    return parser


def carry_out(
    name: str,
    steps: Mapping[str, Callable[[], Found]],
    parser: argparse.ArgumentParser,
    given: Sequence[str],
    always: Collection[str] = (),
) -> None:
    """Carry out the steps that are given, or those not done yet and `always` these; write `results/<name>.json` after each."""
    if unknown := set(given) - set(steps):
        parser.error(f"no step {', '.join(sorted(unknown))}: choose from {', '.join(steps)}")
    first = record(name)["raw"]
    for step in given or [own for own in steps if own not in first or own in always]:
        print(f"== {step}", flush=True)
        found = steps[step]()
        done: dict[str, Found] = record(name)["raw"] | {step: found}  # another process may be at other steps
        figures = {key: value for own in done.values() for key, value in own["figures"].items()}
        write_figures(name, figures, done, [0])
        print(json.dumps(found["figures"]), flush=True)


def kept(name: str, make: Callable[[], Any]) -> Any:
    """Return the JSON value of a row, such as `lean/pattern-0`, that is made once."""
    path = ROWS / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_elsewhere(make()), separators=(",", ":")) + "\n")
        partial.replace(path)
        print(f"   {name}", flush=True)
    return json.loads(path.read_text())


def is_kept(name: str) -> bool:
    """Tell whether a row was made."""
    return (ROWS / f"{name}.json").exists()


def machine() -> dict[str, Any]:
    """Return what this machine computes with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def made() -> dict[str, Any]:
    """Return where a row is measured: rows of one file may be of several machines and commits."""
    return {"machine": machine(), "versions": versions(), "git_commit": git_commit()}


def _elsewhere(raw: Any) -> Any:
    """Return what was measured without folders of this machine: `~` is home, `(scratch)` a temporary one, the checkout nothing."""
    text = json.dumps(raw).replace(f'"{ROOT}/', '"').replace(json.dumps(f"{Path.home()}/")[:-1], '"~/')
    return json.loads(re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "(scratch)", text))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _data_hashes() -> dict[str, str]:
    folder = data_folder()
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".jsonl", ".raw", ".txt"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
