"""Corrections in a report: what was taken out, the curve that decided, before and after in pairs, and texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causalprune.checkpoints import MANIFEST, read_manifest
from causalprune.correction import CLEAN, CORRECTION
from causalprune.evaluation import headline, interval, paired_difference, read_json, rows_of

PLACES = (CORRECTION, f"*/{CORRECTION}", f"*/*/{CORRECTION}")
"""Where records are in a folder: its own, of checkpoints in it, and of those of a run."""


def corrections_in(folder: Path) -> list[dict[str, Any]]:
    """Return what is to be said of the corrections in a folder."""
    files = dict.fromkeys(file for place in PLACES for file in sorted(folder.glob(place)))
    return [_told(file.parent, read_json(file)) for file in files]


def _told(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    own = record["correction"]
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    calibration = manifest.get("run", {}).get("calibration", {})
    (_, before), (_, after) = rows_of(record)
    return {
        "name": folder.resolve().name,
        "model": manifest.get("base", {}).get("name", ""),
        "made": {
            "seed": own["contrast"]["seed"],
            "model SHA-256": own["model_fingerprint"],
            "calibration SHA-256": calibration.get("fingerprint"),
            "calibration": calibration or None,
            "versions": record.get("versions"),
            "commit": record.get("git_commit"),
        },
        "behaviour": own["behaviour"],
        "sentences": own["sentences"],
        "sources": [
            f"divergence on {name}" if name.startswith(CLEAN) else f"rise of the loss of {name}"
            for name in own["chosen"]["harm"]
        ],
        "points": [{**point, "chosen": _same(point, own["chosen"])} for point in own["curve"]],
        "pairs": [
            {
                "task": one.task,
                "before": vars(interval(one)),
                "after": vars(interval(other)),
                "difference": vars(paired_difference(other, one))
                | {"value": headline(other) - headline(one)},
            }
            for one, other in zip(before, after, strict=True)
        ],
        "texts": record["texts"],
        "about": {
            **{
                key: own[key]
                for key in ("contrast", "halves", "prompts", "preserved", "continuations")
                if key in own
            },
            "minutes": record["minutes"],
        },
    }


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two points are one: what is not known of them is equal to nothing."""
    return bool(one["count"] == other["count"] and one["benefit"]["value"] == other["benefit"]["value"])
