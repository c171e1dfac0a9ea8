"""The checkpoint that a run keeps while nothing beats it: only what the run itself wrote is ever deleted."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from causalprune.checkpoints import CARD, MANIFEST, read_manifest, save
from causalprune.core import CheckpointError, Decoder
from causalprune.evaluation import write_text

MARK = "kept_while_best"
"""In the manifest of a checkpoint that its run may delete."""
GONE = ".gone"


def keep(decoder: Decoder, folder: Path, record: dict[str, Any], *, good: bool, **side: Any) -> None:
    """Save a model for good, in place of what an earlier run has left there, or until it is measured and beaten."""
    if good:
        save(decoder, folder, manifest=record, overwrite=True, **side)
    else:
        keep_for_now(decoder, folder, record, **side)


def keep_for_now(decoder: Decoder, folder: Path, record: dict[str, Any], **side: Any) -> None:
    """Save a model that may be the best; where that cannot be, warn, as the run needs no checkpoint to go on."""
    if folder.exists() and not _disposable(folder):
        warnings.warn(
            f"{folder} is not of this run, or was changed, and stays: the model measured now is not kept",
            stacklevel=2,
        )
        return
    try:
        save(decoder, folder, manifest={**record, MARK: True}, overwrite=folder.exists(), **side)
    except CheckpointError as error:
        warnings.warn(f"the model is measured but not kept: {error}", stacklevel=2)


def let_go(folder: Path) -> None:
    """Delete a checkpoint that was beaten, unless a file of it was changed or added; whole or not at all."""
    gone = folder.with_name(f".{folder.name}{GONE}")
    shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
    if folder.exists() and _disposable(folder):
        folder.rename(gone)
        shutil.rmtree(gone)


def for_good(folder: Path) -> None:
    """Keep a checkpoint whatever beats it, if it is there."""
    record = read_manifest(folder) if (folder / MANIFEST).exists() else {"run": {}}
    if record["run"].pop(MARK, False):
        write_text(folder / MANIFEST, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def _disposable(folder: Path) -> bool:
    """Tell whether a run wrote this checkpoint to keep it while it was the best, and nobody touched it since.

    The card, which gets the results later, may be newer than the manifest, which was written last; times of change cannot
    be set back as times of modification can.
    """
    manifest = folder / MANIFEST
    if folder.is_symlink() or not manifest.is_file() or not read_manifest(folder)["run"].get(MARK):
        return False
    own = (manifest.name, CARD)
    others = (path for path in folder.rglob("*") if path.relative_to(folder).as_posix() not in own)
    return all(path.lstat().st_ctime_ns <= manifest.stat().st_ctime_ns for path in others)
