"""The build before, in an environment of its own, and times of both builds taken in turn.

    python bench/before.py        # makes the environment where it is not there yet, and prints its interpreter

The environment is in `bench/.before`, or where $CAUSALPRUNE_BEFORE says. How many packages an environment holds counts in
times of start-up: there, run both builds with this interpreter, and today's with `src` on PYTHONPATH.
"""

import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
COMMIT = "be6997250ff4d9d823e3b8440988c8135bd12a07"
EXTRAS = "dev,demo"
"""What `make` installs, so that both builds see the same packages."""
SINCE = ("lazy-loader==0.6",)
"""What today's build needs beside, so that it runs in the same environment."""
PLACE = Path(os.environ.get("CAUSALPRUNE_BEFORE", ROOT / "bench" / ".before"))
RESAMPLES = 10_000
Times = dict[str, float]
"""Seconds of one run by `wall` and `cpu`, the latter of the process and all that it waited for."""


def before(place: Path | None = None) -> Path:
    """Return the interpreter of an environment with the build before, made on the first call (minutes)."""
    place = (place or PLACE).absolute()
    python, made = place / "venv" / "bin" / "python", place / "commit"
    if made.exists() and made.read_text() == COMMIT and python.exists():
        return python
    shutil.rmtree(place, ignore_errors=True)  # of another commit, or stopped while it was made
    source = place / "source"
    source.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(_archive())) as archive:
        archive.extractall(source, filter="data")
    (place / ".gitignore").write_text("*\n")  # wherever it lies
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--no-compile", "-c", str(source / "constraints.txt")]
    subprocess.run([*pip, "-e", f"{source}[{EXTRAS}]", *SINCE], check=True, stdout=sys.stderr)
    made.write_text(COMMIT)
    return python


def _here(word: str) -> str:
    """Return a word of a command without folders of this machine."""
    return word.replace(str(PLACE.absolute()), "bench/.before").replace(f"{ROOT}/", "")


def variables(*, ours: bool) -> dict[str, str]:
    """Return the variables with which an interpreter imports this checkout, or the build before and nothing in its way."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src") if ours else ""}


def alternate(
    ours: Sequence[str],
    theirs: Sequence[str],
    pairs: int,
    *,
    caches: Sequence[Path] = (),
    cwd: Path | None = None,
    env: Mapping[str, dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Run two commands in turn, `pairs` times each, and return their seconds and the ratios ours / theirs.

    Files and folders in `caches` are deleted before every run: caches of the product, and outputs that a run would go on
    from. `env` adds to the `variables` of `ours` and of `theirs`. The first pair counts like all others: where files of packages
    have to be read from disk first, run each command once before.

    Raises:
        SystemExit: a command failed, with the end of what it said.
    """
    commands = {"ours": list(ours), "theirs": list(theirs)}
    seconds: dict[str, list[Times]] = {name: [] for name in commands}
    for _ in range(pairs):
        for name, command in commands.items():
            for cache in caches:
                _delete(cache)
            own = variables(ours=name == "ours") | (env or {}).get(name, {})
            seconds[name].append(timed(command, cwd, own))
    found = {kind: _ratios(seconds, kind) for kind in ("wall", "cpu")}
    shown = {name: [_here(word) for word in words] for name, words in commands.items()}
    return {"commands": shown, "seconds": seconds, "ours_over_theirs": found}


def timed(command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Times:
    """Return the seconds that a command takes."""
    used, start = _cpu_of_children(), time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return {"wall": wall, "cpu": _cpu_of_children() - used}


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the median of values, by bootstrap."""
    drawn = np.random.default_rng(seed).choice(np.array(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def _ratios(seconds: Mapping[str, Sequence[Times]], kind: str) -> dict[str, Any]:
    pairs = zip(seconds["ours"], seconds["theirs"], strict=True)
    ratios = [ours[kind] / theirs[kind] for ours, theirs in pairs]
    return {"median": statistics.median(ratios), "interval": median_interval(ratios), "ratios": ratios}


def _archive() -> bytes:
    """Return the files of the commit as a tar archive."""
    done = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode().strip()
        raise SystemExit(
            f"no commit {COMMIT[:7]} in this checkout ({said}): fetch the whole history with `git fetch --unshallow`"
        )
    return done.stdout


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    print(before())
