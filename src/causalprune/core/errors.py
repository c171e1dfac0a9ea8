"""Errors that a user can act on.

```
CausalPruneError          every error below; the command line prints it on one line and exits with 2
├── OptionError           an option, method, task or recipe key that cannot be used
├── ModelError            a model that cannot be loaded or is not understood
├── DataError             calibration or evaluation data that is missing, malformed or too small
├── CheckpointError       a folder or file that cannot be written, read or verified
└── MismatchError         effects, ledgers or manifests that belong to another model, data set or run
```
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class CausalPruneError(Exception):
    """Base of all errors raised for a reason that the user can mend; `path` is what may be deleted to start again."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class OptionError(CausalPruneError):
    """An option, method, task or recipe key that cannot be used."""


class ModelError(CausalPruneError):
    """A model that cannot be loaded or whose structure is not understood."""


class DataError(CausalPruneError):
    """Data that is missing, malformed, or too small for what was asked."""


class CheckpointError(CausalPruneError):
    """A checkpoint folder or file that cannot be written, read or verified."""


class MismatchError(CausalPruneError):
    """A side file that belongs to another model, data set or run."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> OptionError:
    """Return the error for a name that is none of `choices`, with the nearest one suggested."""
    known = sorted(choices)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return OptionError(f"unknown {kind} {name!r}: {hint}choices are {', '.join(known)}")
