"""Where this library keeps what it has made, for itself alone."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where the embedded model and what models have written are kept: `causalprune` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "causalprune"
