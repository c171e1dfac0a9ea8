"""Where this library keeps what it has made, for itself alone, and whose a file is that is not complete."""

import os
from pathlib import Path

import psutil


def cache_folder() -> Path:
    """Where the embedded model and what models have written are kept: `causalprune` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "causalprune"


def is_being_written(draft: Path) -> bool:
    """Tell whether another process that runs here has its number in the name of a draft: `NAME.partial-NUMBER…`."""
    number = draft.name.rpartition(".partial-")[2].partition("-")[0]
    return number.isdigit() and int(number) != os.getpid() and psutil.pid_exists(int(number))
