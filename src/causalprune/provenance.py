"""What produced a file: versions of the software that counts, and the commit it ran from."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("causalprune", "torch", "transformers", "tokenizers", "datasets", "lm_eval")


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


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
