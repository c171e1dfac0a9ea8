"""What produced a file: versions of the software that counts, and the commit it ran from."""

import contextlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("causalprune", "torch", "transformers", "tokenizers", "datasets", "lm_eval")

METHOD_VERSION = 2
"""Of the way in which models are measured and pruned. What was begun with another one is not continued with other numbers."""
CHANGES = {
    2: "prompt and target are tokenised as one text, with the blank that a template puts between them, equal prompts with other targets count, templates write one date, "
    "training remembers no moments of each weight and goes through the data three times at most, causal prunes all "
    "matrices alike unless +graded is written, and shrink trains what stays, on text of the model's own too; kinds of units compete for a share of the parameters"
}
"""What each version brought that numbers depend on."""


def changes_since(version: int) -> str:
    """Return what changed after a version of the method, in words."""
    return "; ".join(text for number, text in CHANGES.items() if number > version)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def git_commit() -> str | None:
    """Return the commit of the checkout that this file is tracked in, with `-dirty`, or None."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_bytes() -> dict[str, int]:
    """Return the most memory that this process has held so far, and the most on GPUs where there are any."""
    found = {"process": _most_resident()}
    if torch.cuda.is_available():
        found["gpu"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


def _most_resident() -> int:
    """Return bytes; on Linux not what getrusage says, which counts the process that started this one too."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
