"""Circuits in a report: what they keep by size, where their members are, how sure that is, what they share."""

from collections import Counter
from pathlib import Path
from typing import Any

from causalprune.circuits import CIRCUIT, OVERLAP, Circuit, load_circuit, sentences
from causalprune.evaluation import read_json


def found_in(folder: Path) -> list[dict[str, Any]]:
    """Return what is to be said of the circuits in a folder, and of those in folders within it."""
    return [_told(path.parent.resolve().name, load_circuit(path)) for path in _files(folder, CIRCUIT)]


def overlaps_in(folder: Path) -> list[dict[str, Any]]:
    """Return the overlaps of circuits in a folder, and those in folders within it."""
    return [read_json(path)["overlap"] for path in _files(folder, OVERLAP)]


def _files(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.exists()]


def _told(name: str, own: Circuit) -> dict[str, Any]:
    points = {point.units: point for point in (*own.curve.points, own.chosen)}
    members = set(own.members)
    layers = sorted({unit.layer for unit in own.units})
    kinds = list(dict.fromkeys(unit.kind for unit in own.units))
    inside, every = (Counter((unit.layer, unit.kind) for unit in units) for units in (members, own.units))
    about = own.description
    return {
        "name": name,
        "model": about.get("model", ""),
        "made": {
            "seed": about.get("estimator", {}).get("seed"),
            "model SHA-256": own.model_fingerprint,
            "calibration SHA-256": about.get("calibration_fingerprint"),
            **{key: about.get(key) for key in ("calibration", "versions")},
            "commit": about.get("git_commit"),
        },
        "title": f"{own.size:,} of {len(own.units):,} units",
        "remarks": own.remarks,
        "sentences": sentences(own),
        "sizes_of": about.get("sizes_of", "units"),
        "points": [
            {
                "share": point.share,
                "units": point.units,
                "chosen": point.units == own.size,
                **{key: vars(getattr(point, key)) for key in ("nats", "kl", "faithfulness")},
            }
            for point in sorted(points.values(), key=lambda point: point.units)
        ],
        "curve": {key: vars(getattr(own.curve, key)) for key in ("cpr", "cmd", "intact", "empty")},
        "guessing": own.curve.guessing,
        "heads": [
            [unit.layer, unit.index, own.membership[unit], unit in members]
            for unit in own.units
            if unit.kind == "head"
        ],
        "layers": [
            [layer, *(f"{inside[layer, kind]:,} of {every[layer, kind]:,}" for kind in kinds)]
            for layer in layers
        ],
        "kinds": kinds,
        "question": {
            key: about[key]
            for key in ("question", "estimator", "rank", "rescore", "learn", "keep")
            if key in about
        },
    }
