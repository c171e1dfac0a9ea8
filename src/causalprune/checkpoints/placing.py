"""A folder appears under its final name complete and on disk, or not at all: it is written beside it and renamed."""

import glob
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from causalprune.checkpoints.carrying import MANIFEST
from causalprune.checkpoints.writing import WrittenError
from causalprune.core import CausalPruneError, CheckpointError, is_being_written, sync

UNWRITTEN = ("os error", "inline_container")
"""What errors of safetensors and tokenizers, and of torch, say where a file cannot be written."""


def check_destination(folder: Path, overwrite: bool = False) -> None:
    """Raise `CheckpointError` unless `save` can write `folder`: to be called before any work.

    With `overwrite`, an existing folder must be empty or hold a manifest of ours, so that nothing
    else is ever deleted.
    """
    if os.path.lexists(folder):
        if not overwrite:
            raise CheckpointError(f"{folder} exists: choose another folder, or pass --overwrite")
        if folder.is_symlink() or not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder and will not be overwritten: choose another name"
            )
        if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{folder} was not written by causalprune (it has no {MANIFEST}) and will not be "
                "overwritten: choose another folder"
            )
    parent = folder.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {folder}: {parent} is not a folder that you may write to")


@contextmanager
def complete(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give out a temporary folder that gets the name `folder` when all in it is on disk, or vanishes.

    On any failure nothing new is left under the final name; where a file cannot be written, the error is a `CheckpointError`.
    """
    check_destination(folder, overwrite)
    place = folder.absolute()
    temporary = _beside(place, "partial")
    for left in place.parent.glob(f"{glob.escape(place.name)}.partial-*"):
        if not is_being_written(left):
            warnings.warn(
                f"{left} is of a run that was killed, or is not over: delete it if none is", stacklevel=4
            )
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        _replace(temporary, place, overwrite)
    except WrittenError as error:
        kept = temporary.rename(_beside(place, "differs"))
        raise CheckpointError(
            f"{error}: it is in {kept}, do not use it; save again, on another disk"
        ) from error
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        unwritten = isinstance(error, OSError) or any(words in str(error) for words in UNWRITTEN)
        if unwritten and not isinstance(error, CausalPruneError):
            free = free_at(folder)
            raise CheckpointError(
                f"cannot save to {folder}: {error} ({free / 1e9:.2f} GB free there); nothing was left behind"
            ) from error
        raise


def _replace(temporary: Path, folder: Path, overwrite: bool) -> None:
    """Rename `temporary` to `folder`; what was there is deleted only when the new one is in place.

    Without `overwrite`, a folder that another run has written in the meantime makes this fail, and stays.
    """
    old = _beside(folder, "old")
    replaced = overwrite and os.path.lexists(folder)
    if replaced:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if replaced:
            old.rename(folder)
        raise
    sync(folder.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            warnings.warn(f"{folder} was replaced, but {old} could not be deleted", stacklevel=3)


def _beside(folder: Path, kind: str) -> Path:
    """Return a name of this process beside `folder`, not taken: in containers, what was killed had the same number."""
    return folder.with_name(f"{folder.name}.{kind}-{os.getpid()}-{secrets.token_hex(3)}")


def free_at(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or is to be."""
    place = folder.absolute()
    return shutil.disk_usage(next(own for own in (place, *place.parents) if own.is_dir())).free


def check_room(folder: Path, needed: float) -> None:
    """Raise `CheckpointError` where so many bytes have no room in a folder that is, or is to be, there."""
    if (free := free_at(folder)) < needed:
        raise CheckpointError(
            f"{needed / 1e9:.2f} GB are needed for {folder}, and {free / 1e9:.2f} GB are free there"
        )
