"""Check a saved folder against its manifest: hashes, zeros of every matrix, keep masks.

```python
report = verify(Path("out"))
report.sparsity_holds  # False: somewhere between saving and now, zeros were lost
[finding.message for finding in report.findings]
```
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from causalprune.checkpoints.saving import KEEP, count_zeros, hash_file, iterate_keep, read_manifest
from causalprune.core import CheckpointError, Decoder
from causalprune.models import load, open_checkpoint


@dataclass(frozen=True)
class Finding:
    """One difference between a folder and its manifest; `subject` is a file or a projection.

    `changed`: the file's hash differs, or its weights are in other files. `zeros`: the count of zeros differs. `lost`: weights that
    were pruned are no longer zero. `shape`: the matrix is absent, new or of another shape.
    """

    subject: str
    problem: Literal["changed", "zeros", "lost", "shape"]
    message: str


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`: what was recounted, and every difference found."""

    folder: Path
    matrices: int
    weights: int
    zeros: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether files and matrices are as the manifest says."""
        return not self.findings

    @property
    def sparsity_holds(self) -> bool:
        """Whether every matrix has its zeros, even where files were written again since."""
        return all(f.problem == "changed" for f in self.findings)


def verify(folder: Path | str, *, against: Path | str | None = None, **loading: Any) -> Verification:
    """Compare a saved folder with its manifest: hashes, zeros per matrix, and keep masks if any.

    Loads the model, in the dtype of its files unless another is asked for; `loading` is what `load` takes. A file that was written again with the same zeros, or whose weights are in
    others now, is reported as `changed` only; missing or unreadable files raise `CheckpointError`. `against` is the pruned checkpoint that
    the model in `folder` was made from, by fine-tuning say: zeros are compared with those, and hashes with nothing.
    """
    folder, origin = Path(folder), Path(against or folder)
    manifest = read_manifest(origin)
    findings = _changed_files(folder, manifest["files"]) if against is None else []
    try:
        decoder = load(str(folder), **{"device": "cpu", **loading, "dtype": _dtype(folder, loading)})
    except Exception as error:  # whatever it is: these files cannot be read as a model
        changed = (
            f" (changed since it was saved: {', '.join(f.subject for f in findings)})" if findings else ""
        )
        raise CheckpointError(f"{folder} cannot be loaded{changed}: {error}") from error
    found = count_zeros(decoder)
    findings += _recount(manifest["sparsity"]["projections"], found["projections"], more=against is not None)
    if (masks := origin / KEEP).exists():
        findings += _lost_zeros(decoder, masks)
    return Verification(folder, len(found["projections"]), found["weights"], found["zeros"], tuple(findings))


def _dtype(folder: Path, loading: Mapping[str, Any]) -> str:
    """Return the dtype in which zeros are counted: in a narrower one than the files have, small weights are zeros too."""
    asked = str(loading.get("dtype", "auto"))
    if asked != "auto" or not (folder / "config.json").is_file():
        return asked
    stored = open_checkpoint(folder, pickles=bool(loading.get("allow_pickle"))).dtype
    return str(stored).removeprefix("torch.") if stored.itemsize in (2, 4) else asked


def _changed_files(folder: Path, hashes: dict[str, str]) -> list[Finding]:
    findings = []
    others = {path.name for path in folder.glob("*.safetensors")} - {KEEP}
    for name, expected in hashes.items():
        if (
            not (folder / name).exists()
            and name.endswith(".safetensors")
            and name != KEEP
            and others - {name}
        ):
            message = f"{name} is gone: its weights were looked for by name in {len(others)} other files"
            findings.append(Finding(name, "changed", message))
            continue
        try:
            found = hash_file(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != expected:
            message = f"{name} was changed since it was saved (SHA-256 {found[:12]}…, was {expected[:12]}…)"
            findings.append(Finding(name, "changed", message))
    return findings


def _recount(
    expected: list[dict[str, Any]], found: list[dict[str, Any]], *, more: bool = False
) -> list[Finding]:
    """Return where counts are others than promised, or fewer where there may be `more`: a narrower type makes zeros of its own."""
    was, now = ({row["name"]: row for row in rows} for rows in (expected, found))
    findings = []
    for name in was | now:
        shapes = [rows[name]["shape"] if name in rows else "absent" for rows in (now, was)]
        if shapes[0] != shapes[1]:
            message = f"{name}: shape is {shapes[0]}, the manifest says {shapes[1]}"
            findings.append(Finding(name, "shape", message))
        elif (zeros := now[name]["zeros"]) != (promised := was[name]["zeros"]) and not (
            more and zeros > promised
        ):
            message = f"{name}: {zeros} zeros, the manifest says {promised} of {was[name]['weights']} weights"
            findings.append(Finding(name, "zeros", message))
    return findings


def _lost_zeros(decoder: Decoder, path: Path) -> list[Finding]:
    projections = {p.name: p for p in decoder.projections}
    findings = []
    for name, keep in iterate_keep(path):
        if name not in projections or projections[name].shape != tuple(keep.shape):
            message = f"{name}: the keep mask of shape {list(keep.shape)} fits no matrix of the model"
            findings.append(Finding(name, "shape", message))
            continue
        weight = projections[name].read()
        if lost := int(((weight != 0) & ~keep.to(weight.device)).sum()):
            message = f"{name} lost its zeros: {lost} of {int((~keep).sum())} pruned weights are not zero"
            findings.append(Finding(name, "lost", message))
    return findings
