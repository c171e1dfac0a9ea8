"""What long work has finished, on disk, so that stopped work goes on."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from causalprune.core.errors import CheckpointError, MismatchError
from causalprune.core.ledger import difference, sync
from causalprune.core.provenance import METHOD_VERSION, changes_since

EVERY = 10.0
"""Seconds between two times that something large is written, at least."""
LOCK = ".lock"
"""File that tells other processes that a folder is written."""
RARELY = 16.0
"""Times as long as the last writing took, until the next: it costs at most a seventeenth of the time."""


class State:
    """Values by name: numbers, tensors, and lists and dictionaries of them.

    With a path each is in a file of its own in that folder, which is replaced as a whole, and which one process writes at a
    time; `identity` is everything they depend on, and `whole` what errors say to delete. What cannot be written is lost with the process, and a warning says so; where it is `needed` there, that is an
    error. Tensors come back on the CPU.

    Raises:
        CheckpointError: a file cannot be read, is damaged, or cannot be written and is needed; or another process writes there.
        MismatchError: a file is of another identity.
    """

    def __init__(
        self,
        path: Path | None = None,
        identity: Sequence[Any] = (),
        *,
        needed: bool = False,
        whole: str = "it",
    ) -> None:
        self.path, self.values, self.needed = path, dict[str, Any](), needed
        self._identity, self._held = json.dumps(identity, sort_keys=True), dict[str, Any]()
        self._written, self._pause = time.monotonic(), EVERY
        self._lock: _Lock | None = None
        if path is not None and path.is_dir():
            self._lock = locked(path)
            for partial in path.glob("*.partial-*"):  # what a kill has left half-written
                with contextlib.suppress(OSError):
                    partial.unlink()
        for own, values, version in _found(path):
            if version != METHOD_VERSION:
                raise MismatchError(
                    f"{path} is of a stopped run of an earlier version, since when {changes_since(version)}: delete {whole}, "
                    "or choose another output",
                    path,
                )
            if own != self._identity:
                told = difference(json.loads(own), json.loads(self._identity))
                raise MismatchError(
                    f"{path} is of a stopped run with other options{told and f' ({told})'}: delete {whole}, or choose another output",
                    path,
                )
            self.values |= values

    def keep(self, **values: Any) -> None:
        """Remember these values, in place of earlier ones of the same names; they are on disk on return."""
        self.values |= values
        self._write(values)

    def hold(self, **values: Any) -> None:
        """Let the next `flush` write these values too. They must not change until then."""
        if self.path is not None:
            self._held |= values

    def due(self) -> bool:
        """Tell whether it is time to `flush` what is large, if anything is kept at all."""
        return self.path is not None and time.monotonic() - self._written >= self._pause

    def pass_on(self, **values: Any) -> None:
        """Write these values, which are not remembered beyond that, and which a power cut may take: many that soon get others."""
        self._write(values, durable=False)

    def flush(self, **values: Any) -> None:
        """Write what is held, then these values, which are not remembered beyond that."""
        start, held, self._held = time.monotonic(), self._held, {}
        self._write(held | values)
        self._written = time.monotonic()
        self._pause = max(EVERY, RARELY * (self._written - start))

    def read(self, name: str) -> Any:
        """Return a value from its file, as far as it is looked at, and do not remember it."""
        assert self.path is not None
        ((_, values, _),) = _found(self.path / name, self.path)
        return values[name]

    def drop(self, names: Iterable[str]) -> None:
        """Remove the files of these values, where there are any."""
        if self.path is not None:
            for name in names:
                (self.path / name).unlink(missing_ok=True)

    def _write(self, values: dict[str, Any], *, durable: bool = True) -> None:
        for name, value in values.items():
            if self.path is None:
                return
            partial = self.path / f"{name}.partial-{os.getpid()}"
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = self._lock or locked(self.path)
                record = {
                    "identity": self._identity,
                    "method_version": METHOD_VERSION,
                    "values": {name: value},
                }
                torch.save(record, partial)
                if durable:
                    sync(partial)
                partial.replace(self.path / name)
                with contextlib.suppress(OSError):  # some file systems have no such thing for folders
                    sync(self.path)
            except (OSError, RuntimeError) as error:  # torch's own for a full disk
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                if self.needed:
                    raise CheckpointError(
                        f"cannot write {partial}: {error}; what was done before is kept there, and the same command goes on"
                    ) from error
                with contextlib.suppress(OSError):
                    if not [own for own in self.path.iterdir() if own.name != LOCK]:
                        shutil.rmtree(self.path)
                self.path, self._held = None, {}
                warnings.warn(
                    f"nothing more is kept, should this be stopped: cannot write {partial}: {error}",
                    stacklevel=3,
                )


class _Lock:
    """A folder that no other process writes; those who need it in this one share it, and it ends with the last of them."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, self.file)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system that knows no locks
                raise CheckpointError(
                    f"{path} is in use by another run: wait for it, or choose another output"
                ) from error


_LOCKS: "weakref.WeakValueDictionary[tuple[int, int], _Lock]" = weakref.WeakValueDictionary()
"""By device and number of the folder: closing one descriptor of a file would end all locks of this process on it."""


def locked(path: Path) -> _Lock | None:
    """Return the lock of a folder, held as long as the value is there; None where nothing can be written.

    Raises:
        CheckpointError: another process has it.
    """
    try:
        own = path.stat()
        key = own.st_dev, own.st_ino
        lock = _LOCKS.get(key)
        if lock is None:
            lock = _LOCKS[key] = _Lock(path)
    except OSError:  # which writing will say
        return None
    return lock


def kept(path: Path) -> dict[str, Any]:
    """Return the values that this version keeps at a path, whatever they depend on; none where nothing is."""
    found = (values for _, values, version in _found(path) if version == METHOD_VERSION)
    return {name: value for values in found for name, value in values.items()}


def identity_at(path: Path) -> list[Any] | None:
    """Return what the values that are kept at a path depend on; None where nothing is kept."""
    found = next(_found(path), None)
    return None if found is None else list(json.loads(found[0]))


def forget(path: Path) -> None:
    """Remove what was kept at a path, if anything was."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _found(path: Path | None, whole: Path | None = None) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield identity, values and version of the method of file after file, which belong to a `whole` folder."""
    for file in _files(path):
        try:
            found = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
            own, values, version = found["identity"], found["values"], found.get("method_version", 1)
        except OSError as cause:
            raise CheckpointError(f"cannot read {file}: {cause.strerror or cause}") from cause
        except Exception as cause:  # torch has many for a damaged file
            raise CheckpointError(
                f"{file}, kept of a stopped run, is damaged: delete {whole or path} to begin again",
                whole or path,
            ) from cause
        yield own, values, version


def _files(path: Path | None) -> list[Path]:
    """Return the files in a folder, without what a kill has left half-written; a single file as it is."""
    if path is None:
        return []
    if not path.is_dir():
        return [path] if path.exists() else []
    try:
        files = sorted(path.iterdir())
    except OSError as cause:
        raise CheckpointError(f"cannot read {path}: {cause.strerror or cause}") from cause
    return [file for file in files if ".partial-" not in file.name and file.name != LOCK]
