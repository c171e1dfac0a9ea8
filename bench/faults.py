"""Steps of bench/large.py that break things: runs killed at random moments, files of random content."""

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from common import ROOT

KILLS = 50


def kills(count: int = KILLS, *stages: str) -> dict[str, Any]:
    """Kill runs with SIGKILL at random moments of their work, start each again, and compare every byte."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tests" / "disturbed.py"), folder, "--kills", str(count)]
        command += ["--stages", *stages] if stages else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return {"kills": found["kills"], "undisturbed_seconds": found["seconds"]}


def fuzz() -> dict[str, Any]:
    """Try random files of every kind, as many of each as CAUSALPRUNE_FUZZ says (10,000); count what is not one of our errors."""
    cases = int(os.environ.get("CAUSALPRUNE_FUZZ", "10000"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rf", "tests/test_fuzz.py"]
    environment = {**os.environ, "CAUSALPRUNE_FUZZ": str(cases)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counted = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    return {
        "cases_of_each": cases,
        **counted,
        "tracebacks": failed,
        "output": done.stdout[-2000:] if failed else "",
    }


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that claims rest on, from the steps that are done."""
    found: dict[str, float] = {}
    if (one := done.get("kills")) is not None:
        found["kills"] = len(one["kills"])
        found["kills_lost"] = sum(bool(kill["lost"]) for kill in one["kills"])
    if (one := done.get("fuzz")) is not None:
        found["fuzz_cases"] = one["cases_of_each"] * (one.get("passed", 0) + one.get("failed", 0))
        found["fuzz_tracebacks"] = len(one["tracebacks"])
    return found
