"""Append-only record of finished jobs that survives a kill at any byte.

```python
with Ledger(folder / "ledger.jsonl", {"model": fingerprint, "method": "exact"}) as ledger:
    for key, job in jobs.items():
        if key not in ledger.rows:
            ledger.append(key, job())
```

A ledger is a text file: a header line with the identity of the run, then one line per finished
job. Every line is JSON and begins with the CRC-32 of the rest of the line. A row is on disk when
`append` returns; a last line that was cut short by a kill is removed when the ledger is opened, and
its job is simply done again. Damage anywhere else is an error, never skipped over.

Floats are written as their shortest exact representation, so float64 values, and float32 values
widened to float64, come back bit for bit (-0.0 and subnormals too). NaN and infinities are
refused: a loss that is not finite is a broken run, not a result worth keeping.
"""

import fcntl
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from causalprune.core.errors import CheckpointError, MismatchError
from causalprune.core.provenance import METHOD_VERSION, changes_since

FORMAT = "causalprune-ledger-1"
TOLD = {
    "model": "the model",
    "problems": "the set of problems (--task, -n, --seed, or how they are read)",
    "calibration": "the set of examples (--task, -n, --seed, or how they are read)",
    "decide": "the set of problems that decides (--on, --task, -n or --seed)",
    "batches": "the way that problems are batched (--batch-tokens)",
}
"""What values of an identity are called that are too long to be shown, the first first."""
NAMED = {"max_batch_tokens": "the number of tokens of a batch (--batch-tokens)"}
"""What other values of an identity are called, before what they were and are."""
SHOWN = 60
Json = dict[str, Any] | list[Any] | str | int | float | bool | None


class Ledger:
    """The finished jobs of one run, as `rows` in memory and as lines on disk.

    `identity` is everything the values depend on: model and calibration fingerprints, method,
    options. A file that was begun with another identity raises `MismatchError`; a file that another
    process (or another `Ledger` of this one) holds open, or that is damaged, `CheckpointError`. With `wait`,
    the other is waited for, with a warning; one that this thread holds would be waited for in vain. A file without rows is
    nobody's: it gets this identity, and is removed where an error ends the work before there is one. `whole` is what errors
    say to delete, where the file alone is not all that is kept.

    The method's version belongs to the identity. A file of an earlier one goes on where all else is the same and `unchanged`
    tells that what came since makes no difference to its values.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        wait: bool = False,
        unchanged: Callable[[], bool] = lambda: True,
        whole: str = "the file",
    ) -> None:
        self.path, self._wait, self._unchanged, self._whole = path, wait, unchanged, whole
        self.rows: dict[str, Any] = {}
        own = {**identity, "method_version": METHOD_VERSION}
        self._identity = json.loads(_dump(own, f"the identity of {path}"))
        self._fd: int | None = None
        self._end = 0

    def __enter__(self) -> "Ledger":
        """Open or create the file, lock it, and read its rows."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"cannot open ledger {self.path}: {error.strerror}") from error
        try:
            self._lock(self._fd)
            self._recover(self._fd)
            self._unchanged = bool  # it may hold a model, and is not asked again
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the file and release the lock."""
        if kind is not None and not self.rows and not self._wait:
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file and release the lock; closing twice is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def append(self, key: str, value: Json) -> None:
        """Record that job `key` gave `value`; on return the row is on disk.

        Costs one fsync. A failed write is taken back, so that the file stays well formed.
        """
        if self._fd is None:
            raise CheckpointError(f"ledger {self.path} is not open: use it in a `with` statement")
        if key in self.rows:
            raise CheckpointError(f"ledger {self.path} already has a row for job {key!r}")
        line = _line({"key": key, "value": value}, f"job {key!r}")
        self._write(self._fd, line)
        self.rows[key] = json.loads(line)["value"]  # as a reopened ledger would give it: tuples are lists

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not self._wait:
                raise CheckpointError(
                    f"ledger {self.path} is in use by another run: wait for it or choose another folder"
                ) from error
            warnings.warn(f"waiting for another run, which writes {self.path}", stacklevel=2)
            fcntl.flock(fd, fcntl.LOCK_EX)
        if not self.path.exists() or not os.path.samestat(os.fstat(fd), self.path.stat()):
            raise CheckpointError(f"ledger {self.path} was removed meanwhile: run this again")

    def _recover(self, fd: int) -> None:
        data = self.path.read_bytes()
        header = _line({"format": FORMAT, "identity": self._identity}, "the header")
        new = header.startswith(data) and data != header  # or killed while the header was written
        lines = data.splitlines(keepends=True)
        try:
            if not new:
                self._check_header(lines[0])
        except MismatchError:
            if any(_intact(lines, self.path)):
                raise
            new = True
        if new:
            os.ftruncate(fd, 0)
            self._write(fd, header)
            sync(self.path.parent)
            return
        self._end = len(lines[0])
        for number, size, row in _intact(lines, self.path):
            if row["key"] in self.rows:
                raise CheckpointError(
                    f"{self.path}, line {number}: second row for job {row['key']!r}: delete one of them"
                )
            self.rows[row["key"]] = row["value"]
            self._end += size
        os.ftruncate(fd, self._end)
        os.fsync(fd)

    def _check_header(self, line: bytes) -> None:
        header = _parse(line)
        if header is None or header.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path}, line 1: not a ledger of this version of causalprune: "
                "delete the file or choose another folder"
            )
        found = {"method_version": 1, **header["identity"]}  # the first releases did not note it
        if (version := found["method_version"]) != METHOD_VERSION:
            found["method_version"] = METHOD_VERSION
            if found != self._identity or not self._unchanged():
                raise MismatchError(
                    f"ledger {self.path} was begun by version {version} of the method, and since then "
                    f"{changes_since(version)}: delete {self._whole} to start again, or choose another folder",
                    self.path,
                )
        if found != self._identity:
            raise MismatchError(
                f"ledger {self.path} belongs to another run: {difference(found, self._identity)}: "
                f"delete {self._whole} to start again, or choose another folder",
                self.path,
            )

    def _write(self, fd: int, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(fd, line[written:], self._end + written)
            os.fsync(fd)
        except BaseException as error:
            os.ftruncate(fd, self._end)
            if isinstance(error, OSError):
                free = shutil.disk_usage(self.path.parent).free
                raise CheckpointError(
                    f"cannot write ledger {self.path}: {error.strerror} ({free / 1e9:.2f} GB free)"
                ) from error
            raise
        self._end += len(line)


def read_rows(path: Path) -> dict[str, Any]:
    """Return the finished rows of a ledger without opening it for work: another process may be adding to it."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise CheckpointError(f"cannot read ledger {path}: {error.strerror}") from error
    if not lines or (len(lines) == 1 and not lines[0].endswith(b"\n")):
        return {}  # killed while the header was written, which is written again
    if (_parse(lines[0]) or {}).get("format") != FORMAT:
        raise CheckpointError(f"{path}, line 1: not a ledger of this version of causalprune")
    return {row["key"]: row["value"] for _, _, row in _intact(lines, path)}


def _intact(lines: Sequence[bytes], path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield number, bytes and content of the rows after the header, up to one that was being written."""
    for number, line in enumerate(lines[1:], start=2):
        row = _parse(line)
        if row is None and number == len(lines):
            return  # being written, or cut short by a kill
        if row is None or row.keys() != {"key", "value"}:
            raise CheckpointError(
                f"{path}, line {number}: damaged row (checksum or form is wrong): "
                f"restore the file, or delete line {number} and what follows to redo those jobs"
            )
        yield number, len(line), row


def difference(was: Json, now: Json, key: str = "") -> str:
    """Return in words what is first among the differences of two values; nothing where it has no name."""
    if isinstance(was, dict) and isinstance(now, dict):
        names, ranks = was.keys() | now.keys(), {name: rank for rank, name in enumerate(TOLD)}
        each = {name: (was.get(name, "(absent)"), now.get(name, "(absent)")) for name in names}
        other = [name for name, (a, b) in each.items() if a != b]
        # batches follow from all else
        first = min(other, key=lambda name: (name.endswith("batches"), ranks.get(name, len(TOLD)), name))
        return difference(*each[first], f"{key}.{first}".lstrip("."))
    if isinstance(was, list) and isinstance(now, list) and (len(was) == len(now) or not key):
        return next((difference(a, b, key) for a, b in zip(was, now, strict=False) if a != b), "")
    name = key.rpartition(".")[2]
    if key and max(len(repr(own)) for own in (was, now)) > SHOWN:
        return f"{TOLD.get(name, key)} is another"
    return f"{NAMED.get(name, key)} was {was!r} and is now {now!r}" if key else ""


def _dump(value: Json, what: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except ValueError as error:
        raise CheckpointError(f"{what} holds a value that is not finite, or refers to itself") from error


def _line(record: dict[str, Any], what: str) -> bytes:
    """Return `{"crc":"…",<rest>}` and a newline, where the checksum is that of `<rest>}`."""
    rest = _dump(record, what)[1:].encode()
    return b'{"crc":"%08x",' % zlib.crc32(rest) + rest + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record in `line` without its checksum, or None where the line is not intact."""
    start = len(b'{"crc":"00000000",')
    rest = line[start:-1]
    if line != b'{"crc":"%08x",' % zlib.crc32(rest) + rest + b"\n":
        return None
    record = json.loads(b"{" + rest)
    return record if isinstance(record, dict) else None


def sync(path: Path) -> None:
    """Make the bytes of a file, or the entries of a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
