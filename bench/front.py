"""What a new user meets: writes `results/front.json`.

    python bench/front.py                 # all steps that are not there yet
    python bench/front.py resumed         # some of them, anew

Steps: pages (README, and the commands that the pages show; seconds), demo (`make demo` on a fresh clone), first_table (an own
task, from an empty cache to the verdict), resumed (what a kill costs `causal`: once whole, then killed ten times on its way;
about 45 minutes on two cores), silence (how long a command says nothing, as a log and on a terminal; about 40 minutes).
"""

import argparse
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from before import variables
from common import ROOT, Found, carry_out, data_folder, step_parser

sys.path.insert(0, str(ROOT / "tests"))
import typer
from test_commands import SHOWN

from causalprune.cli.app import app
from causalprune.pruning import Method
from causalprune.runs import CalibrationSpec, ModelSpec, Options, prune_checkpoint

EXAMPLES = int(os.environ.get("FRONT_EXAMPLES", "128"))
"""Examples that `resumed` calibrates on, those of the default; fewer for a trial."""
KILLS = 10
SPOKEN_EXAMPLES = int(os.environ.get("FRONT_SPOKEN", "48"))
"""Examples in `silence`: everything that takes long is there, in less time."""
FIRST_DATA, CALIBRATED, MEASURED = "gsm8k/train.jsonl", 60, 40
"""An own task of a hundred problems."""
COMMAND = [sys.executable, "-c", "from causalprune.cli import main; main()"]
ANSWERS = ("gsm8k_nll:20", "gsm8k_cot:16")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def pages() -> Found:
    """Count what the README has, which of the commands shown are run by the tests, and which commands print JSON."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    run = [mark is None for _, _, mark in SHOWN]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    as_json = sorted(name for name, own in commands.items() if any("--json" in p.opts for p in own.params))
    return {
        "figures": {
            "readme_characters": len(readme),
            "readme_longest_line": max(map(len, readme.splitlines())),
            "commands_run_share": sum(run) / len(run),
            "commands_with_json": len(as_json),
        },
        "raw": {"commands_shown": len(run), "with_json": as_json, "all": sorted(commands)},
    }


def demo() -> Found:
    """Time `make demo` on a fresh clone, installation and the model's first loading included."""
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        said, minutes = _timed(["make", "demo"], clone, Path(scratch) / "cache")
        results = json.loads((clone / "runs/demo/results.json").read_text(encoding="utf-8"))
        kept = sorted(path.name for path in (clone / "runs/demo/checkpoints").iterdir())
    labels = [row["label"] for row in results["rows"]]
    figures = {
        "demo_minutes": minutes,
        "demo_has_causal": float(any(label.startswith("causal") for label in labels)),
    }
    return {"figures": figures, "raw": {"rows": labels, "checkpoints": kept, **said}}


def first_table() -> Found:
    """Time the recipe that own-task.md shows on a hundred problems of one's own, where the product has no cache."""
    with (data_folder() / FIRST_DATA).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(MEASURED + CALIBRATED), strict=False)]
    problems = [{"prompt": row["question"], "target": row["answer"]} for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, own in {"train": problems[:CALIBRATED], "test": problems[CALIBRATED:]}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        recipe = (ROOT / "examples/own.yaml").read_text(encoding="utf-8").replace("examples/", "")
        (folder / "own.yaml").write_text(re.sub(r"(?m)^  n: \d+", f"  n: {CALIBRATED}", recipe))
        words = ["run", "own.yaml", "-o", "own"]
        said, minutes = _timed([*COMMAND, *words], folder, folder / "cache")
        labels = [row["label"] for row in json.loads((folder / "own/results.json").read_text())["rows"]]
    if not any(label.startswith("causal") for label in labels):
        raise SystemExit(f"the recipe has no causal: {labels}")
    return {"figures": {"first_table_minutes": minutes}, "raw": {"rows": labels, **said}}


def _timed(command: list[str], folder: Path, cache: Path) -> tuple[dict[str, Any], float]:
    """Run a command with an empty cache of the product; return its stages, the end of what it printed, and its minutes."""
    env = variables(ours=command[0] != "make")
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    env |= {"XDG_CACHE_HOME": str(cache), "PIP_CACHE_DIR": pip}  # packages may be there, models not
    env.pop("CAUSALPRUNE_DATA", None)  # who is new has no data sets
    said, printed = heard(command, env, folder)
    stages = [[round(at, 1), text] for at, text in said if not text.startswith((" ", "WARNING"))]
    return {"stages": stages, "said": printed[-60:]}, said[-1][0] / 60


class Recorder:
    """A stage, and the progress of all of them: writes down when what was reported."""

    def __init__(self, path: Path) -> None:
        self.file, self.stage = path.open("a", encoding="utf-8"), ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Open a stage."""
        self.stage = name
        self.write(0, 0)
        yield self.write

    def write(self, done: int, total: int) -> None:
        """Take note of the work done."""
        self.file.write(json.dumps([time.time(), self.stage, done, total]) + "\n")
        self.file.flush()


def work(folder: Path) -> None:
    """Prune the embedded model to `folder`, and write down what it reports in `<folder>.log`."""
    options = Options(data_folder(), stage=Recorder(folder.with_suffix(".log")))
    calibration = CalibrationSpec(("gsm8k",), EXAMPLES)
    prune_checkpoint(ModelSpec("embedded"), Method("causal", 0.5), folder, calibration, None, options)


def reported(folder: Path) -> list[tuple[float, str, int, int]]:
    """Return what was written down so far, without a line that is being written."""
    path = folder.with_suffix(".log")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


def begun(folder: Path) -> "subprocess.Popen[bytes]":
    """Begin, or go on with, the work."""
    command = [sys.executable, str(Path(__file__)), "--work", str(folder)]
    return subprocess.Popen(command, env=variables(ours=True))


def resumed() -> Found:
    """Kill `causal` at ten moments spread over it, and measure what of the work is done again each time."""
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        if begun(whole).wait():
            raise SystemExit("the undisturbed run failed")
        line, end = reported(whole), time.time()
        start = next(at for at, stage, *_ in line if stage == "pruning")
        rows: list[Found] = []
        before: Found | None = None
        for number in range(KILLS + 1):
            moment = (end - start) * (number + 0.5) / KILLS
            process, known = begun(killed), len(reported(killed))
            if number < KILLS:
                _wait_for(killed, known, line, start + moment, process)
                process.send_signal(signal.SIGKILL)
            stopped = time.time() if number < KILLS else None
            if process.wait() not in (0, -signal.SIGKILL):
                raise SystemExit("a run that went on failed")
            own = reported(killed)[known:]
            if before is not None:
                rows.append({**before, "seconds_lost": _again(own, before) + before["since_report_seconds"]})
            last = own[-1]
            before = {
                "moment_seconds": moment,
                "stage": last[1],
                "done": last[2],
                "total": last[3],
                "since_report_seconds": 0.0 if stopped is None else stopped - last[0],
            }
            print(json.dumps(rows[-1:]), flush=True)
        same = _bytes(whole) == _bytes(killed)
    lost = [row["seconds_lost"] for row in rows]
    raw = {
        "examples": EXAMPLES,
        "undisturbed_seconds": end - start,
        "kills": rows,
        "same_bytes": same,
        "timeline": line,
    }
    return {"figures": {"resumed_seconds_lost": max(lost), "resumed_same_bytes": float(same)}, "raw": raw}


def _wait_for(
    folder: Path, known: int, line: list[Any], until: float, process: "subprocess.Popen[bytes]"
) -> None:
    """Return when the work is where the undisturbed one was at that time."""
    at, *place = max(row for row in line if row[0] <= until)
    while process.poll() is None:
        if any(_reached(row, place) for row in reported(folder)[known:]):
            time.sleep(until - at)
            return
        time.sleep(0.05)


def _reached(row: Any, place: list[Any]) -> bool:
    _, stage, done, _ = row
    return bool((stage == place[0] and done >= place[1]) or (stage == "saving" and place[0] != "saving"))


def _again(own: list[Any], before: Found) -> float:
    """Return the seconds from the begin of the work, after loading, until it was where it had been stopped."""
    start = next(at for at, stage, *_ in own if stage == "pruning")
    place = [before["stage"], before["done"]]
    reached = next((row[0] for row in own if row[0] >= start and _reached(row, place)), start)
    return float(reached) - float(start)


def _bytes(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def silence() -> Found:
    """Measure the longest time without anything new, from a command's begin to its end."""
    causal = ("prune", "embedded", "-o", "OUTPUT", "--method", "causal", "-t", "gsm8k", "-n")
    recipe = {
        "model": {"name": "embedded"},
        "calibration": {"task": ["gsm8k"], "n": 16},
        "methods": ["wanda"],
        "sparsities": [0.5],
        "on": list(ANSWERS),
    }
    raw: Found = {}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        for name, words in {
            "causal": (*causal, str(SPOKEN_EXAMPLES)),
            "run": ("run", f"{scratch}/recipe.yaml", "-o", "OUTPUT"),
        }.items():
            for kind, terminal in (("log", False), ("terminal", True)):
                output = Path(scratch) / f"{name}-{kind}"
                given = [str(output) if word == "OUTPUT" else word for word in words]
                raw[f"{name} as a {kind}"] = gaps(given, terminal=terminal)
                shutil.rmtree(output)
    longest = max(own["gaps"][0][0] for own in raw.values())
    return {"figures": {"progress_silence_seconds": longest}, "raw": raw | {"examples": SPOKEN_EXAMPLES}}


def gaps(words: list[str], *, terminal: bool) -> Found:
    """Run a command; return the longest times between two things that it said, which were not the same."""
    env = variables(ours=True) | {"CAUSALPRUNE_DATA": str(data_folder())}
    said, _ = heard([*COMMAND, *words], env, terminal=terminal)
    found = [(after - at, at, text) for (at, text), (after, _) in pairwise([(0.0, ""), *said])]
    return {
        "seconds": said[-1][0],
        "said": len(said),
        "gaps": sorted(found, reverse=True)[:5],
        "lines": [] if terminal else [text for _, text in said],
    }


def heard(
    command: list[str], env: dict[str, str], folder: Path | None = None, *, terminal: bool = False
) -> tuple[list[tuple[float, str]], list[str]]:
    """Run a command; return what else it said after how many seconds, its end as the last, and the lines that it printed."""
    read, write = pty.openpty() if terminal else os.pipe()
    said: list[tuple[float, str]] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        start = time.time()
        process = subprocess.Popen(command, cwd=folder, stderr=write, stdout=printed, env=env)
        os.close(write)
        while data := _more(read):
            for text in re.split(r"[\r\n]+", ESCAPES.sub("", data.decode(errors="replace"))):
                if text.strip() and (not said or text.strip() != said[-1][1].strip()):
                    said.append((time.time() - start, text.rstrip()))
        os.close(read)
        if process.wait():
            raise SystemExit(f"{' '.join(command)} failed: {said[-5:]}")
        said.append((time.time() - start, ""))
        printed.seek(0)
        return said, printed.read().splitlines()


def _more(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how a terminal ends
        return b""


STEPS: dict[str, Callable[[], Found]] = {
    "pages": pages,
    "demo": demo,
    "first_table": first_table,
    "resumed": resumed,
    "silence": silence,
}


def main() -> None:
    """Carry out the steps asked for, or those not done yet, and write `results/front.json`."""
    parser = step_parser(__doc__, STEPS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(given.work)
    else:
        carry_out("front", STEPS, parser, given.steps)


if __name__ == "__main__":
    main()
