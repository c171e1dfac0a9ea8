"""What a long pruning has finished, on disk, so that a stopped one goes on."""

import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from causalprune.core.errors import CheckpointError, MismatchError

SELDOM = 600.0
"""Seconds between two times that something large is kept."""


class State:
    """Values by name: numbers, tensors, and lists and dictionaries of them.

    With a path they are on disk when `keep` returns, in one file that is replaced as a whole; `identity` is everything they
    depend on. What cannot be written is lost with the process, and a warning says so.

    Raises:
        CheckpointError: the file cannot be read, or is damaged.
        MismatchError: the file is of another identity.
    """

    def __init__(self, path: Path | None = None, identity: Sequence[Any] = ()) -> None:
        self.path, self.values = path, dict[str, Any]()
        self._identity, self._kept = json.dumps(identity, sort_keys=True), time.monotonic()
        if path is not None and path.exists():
            try:
                found = torch.load(path, weights_only=True, mmap=True)
                own, self.values = found["identity"], found["values"]
            except OSError as cause:
                raise CheckpointError(f"cannot read {path}: {cause.strerror or cause}") from cause
            except Exception as cause:  # torch has many for a damaged file
                raise CheckpointError(
                    f"{path}, kept of a stopped pruning, is damaged: delete it to begin again"
                ) from cause
            if own != self._identity:
                raise MismatchError(
                    f"{path} is of a stopped pruning with other options: delete it, or choose another output"
                )

    def due(self) -> bool:
        """Tell whether it is time to keep something large, and count from now on if so."""
        found = self.path is not None and time.monotonic() - self._kept >= SELDOM
        self._kept = time.monotonic() if found else self._kept
        return found

    def keep(self, **values: Any) -> None:
        """Remember these values, in place of earlier ones of the same names."""
        self.values |= values
        if self.path is None:
            return
        partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"identity": self._identity, "values": self.values}, partial)
            partial.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch's own for a full disk
            partial.unlink(missing_ok=True)
            self.path = None
            warnings.warn(
                f"a stopped pruning will begin again: cannot write {partial}: {error}", stacklevel=2
            )
