"""What a run folder holds, as plain values: what reports, cards and tables of the terminal are made from.

No model is loaded. A run that is not finished, or that an older release wrote, is read as far as it goes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from causalprune.attribution import estimate, reliability, scores
from causalprune.checkpoints import (
    EFFECTS,
    KEEP,
    MANIFEST,
    count_zeros,
    iterate_keep,
    load_effects,
    read_manifest,
)
from causalprune.circuits import CIRCUIT, GATES, OVERLAP
from causalprune.core import CheckpointError, Decoder, Effects, read_rows
from causalprune.correction import CORRECTION
from causalprune.evaluation import RESULTS, decoded, read_json
from causalprune.pruning import head_importance
from causalprune.reports.circuits import found_in, overlaps_in
from causalprune.reports.corrections import corrections_in

CHECKPOINTS, LEDGER, STABILITY = "checkpoints", "results.ledger", "stability.json"
BEGUN = (LEDGER, "attribution.ledger", "circuit.ledger", "overlap.ledger", "scores", GATES)
"""What work leaves before it has finished, beside which there is something to report then."""
SIZES = ("parameters", "bytes", "speed")
"""What a row says of a smaller model's size, and of its speed beside the dense one's."""


@dataclass(frozen=True)
class Measured:
    """Effects of units as one file of a run gives them, per target token in nats, or logits for relevance; NaN where nothing is known.

    `exact` is False for estimates. Every unit has `layer`, `index`, `kind`, `delta`, `low`, `high` and `importance`, the factor I
    of heads (method §2), NaN for other units. `made` is what is known of how they were made.
    """

    name: str
    exact: bool
    effect: str
    units: list[dict[str, Any]]
    reliability: Mapping[str, float]
    unit: str = "nats per token"
    subsets: int = 1
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run.

    `record` is `results.json` without its rows. `rows` are as there, and those of which some tasks are not measured yet.
    `circuits` are as `circuits.found_in` tells them. `manifests` are those of the checkpoints by label, `heads` their shares of zeros by layer and head.
    """

    folder: Path
    record: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    effects: tuple[Measured, ...]
    manifests: Mapping[str, Mapping[str, Any]]
    heads: Mapping[str, list[list[float]]]
    stability: Mapping[str, Any] | None
    circuits: tuple[Mapping[str, Any], ...] = ()
    overlaps: tuple[Mapping[str, Any], ...] = ()
    corrections: tuple[Mapping[str, Any], ...] = ()


def read_run(folder: Path) -> Evidence:
    """Read a run folder, whatever of it is there.

    Raises:
        CheckpointError: nothing of a run is there, or a file is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: pass one that `causalprune run` has written")
    record = read_json(folder / RESULTS) if (folder / RESULTS).exists() else {}
    rows = list(record.pop("rows", []))
    if (folder / LEDGER).exists():
        known = {row["label"] for row in rows}
        rows += [row for row in rows_of_ledger(read_rows(folder / LEDGER)) if row["label"] not in known]
    effects = tuple(
        found for path in _effect_files(folder) for found in measured(load_effects(path), _name(path, folder))
    )
    circuits, overlaps = tuple(found_in(folder)), tuple(overlaps_in(folder))
    corrections = tuple(corrections_in(folder))
    stability = read_json(folder / STABILITY) if (folder / STABILITY).exists() else None
    if not (rows or effects or circuits or overlaps or corrections or stability):
        begun = [name for name in BEGUN if (folder / name).exists()]
        raise CheckpointError(
            f"{folder} holds nothing to report yet, as what left {begun[0]} has not finished: give the same command again"
            if begun
            else f"{folder} holds nothing to report: no {RESULTS}, {LEDGER}, {EFFECTS}, {CIRCUIT}, {OVERLAP} or {CORRECTION} of "
            "`causalprune run`, `attribute`, `circuit`, `overlap` or `correct`"
        )
    saved = sorted((folder / CHECKPOINTS).glob(f"[!.]*/{MANIFEST}"))
    manifests = {path.parent.name: read_manifest(path.parent) for path in saved}
    heads = {row["label"]: row["pruned"]["heads"] for row in rows if "heads" in row.get("pruned", {})}
    counts = _head_counts(effects)
    for label in manifests:
        if label not in heads and counts and (folder / CHECKPOINTS / label / KEEP).exists():
            heads[label] = by_head(iterate_keep(folder / CHECKPOINTS / label / KEEP), counts)
    own = record, tuple(rows), effects, manifests, heads, stability, circuits, overlaps, corrections
    return Evidence(folder, *own)


def rows_of_ledger(ledger: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a run from its ledger, with the tasks that are measured so far."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in ledger.items():
        label, _, task = key.partition("/")
        if not task:
            continue
        row = rows.setdefault(label, {"label": label, **_described(label), "results": []})
        if task == "pruned":
            row |= {"pruned": value, **{key: value[key] for key in SIZES if key in value}}
        else:
            row["results"] += decoded(value)
    return list(rows.values())


def _described(label: str) -> dict[str, Any]:
    """Return what a label says of how its model was made."""
    name, _, share = label.rpartition("-")
    criterion, _, scope = name.rpartition("-")
    if not name:
        return {"criterion": "dense", "scope": None, "sparsity": 0.0}
    if not criterion:  # `shrink-0.2`: no scope, and no zeros
        return {"criterion": name.partition("+")[0], "scope": None, "sparsity": 0.0, "removed": float(share)}
    return {"criterion": criterion.partition("+")[0], "scope": scope, "sparsity": float(share)}


def measured(effects: Effects, name: str | None = None) -> list[Measured]:
    """Return effects with their intervals; those of `adaptive` twice, if some units were measured on every problem."""
    own = effects.description.get("estimator", {})
    called = name or str(own.get("name", "exact") if isinstance(own, Mapping) else own)
    if effects.predicted_nats is None:
        return [_measured(effects, called, exact=True)]
    found = [_measured(effects, called, exact=False)]
    whole = replace(effects, predicted_nats=None, curvature_nats=None)
    if bool((~whole.change_nats().isnan()).all(1).any()):
        found.append(_measured(whole, f"{called}, measured units", exact=True))
    return found


def _measured(effects: Effects, name: str, *, exact: bool) -> Measured:
    found = estimate(effects)
    factor = [math.nan] * len(effects.units)
    heads = effects.of("head", "mixer")  # all of the model together, as `cap` has it
    if heads.units and bool(scores(heads).isfinite().all()):
        at = [i for i, unit in enumerate(effects.units) if unit.kind in ("head", "mixer")]
        for i, value in zip(at, head_importance(scores(heads)).tolist(), strict=True):
            factor[i] = value
    columns = found.value.tolist(), found.low.tolist(), found.high.tolist(), factor
    names = "delta", "low", "high", "importance"
    units = [
        {"layer": unit.layer, "index": unit.index, "kind": unit.kind, **dict(zip(names, row, strict=True))}
        for unit, *row in zip(effects.units, *columns, strict=True)
    ]
    unit = "logits per token" if effects.estimator == "relevance" else "nats per token"
    subsets, about = int(effects.subset.max()) + 1, effects.description
    made = {
        "seed": about.get("seed"),
        "model SHA-256": effects.model_fingerprint,
        "calibration SHA-256": effects.calibration_fingerprint,
        "calibration": about,
    }
    return Measured(name, exact, effects.effect, units, reliability(effects), unit, subsets, made)


def achieved(decoder: Decoder, keep: Mapping[str, Bool[Tensor, "_ _"]]) -> dict[str, Any]:
    """Return the zeros of a pruned model: in all, by layer and matrix, and by head."""
    counted = count_zeros(decoder)
    matrices = by_matrix(counted.pop("projections"))
    heads = [layer.n_heads for layer in decoder.layers]
    return {**counted, "matrices": matrices, "heads": by_head(keep.items(), heads)}


def by_matrix(projections: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Return `[layer, role, weights, zeros]` from the counts of a manifest, experts of a layer taken together."""
    found: dict[tuple[int, str], list[int]] = {}
    for row in projections:
        _, layer, *_, role = row["name"].split(".")
        sums = found.setdefault((int(layer), role), [0, 0])
        sums[0] += row["weights"]
        sums[1] += row["zeros"]
    return [[layer, role, *sums] for (layer, role), sums in found.items()]


def by_head(keep: Iterable[tuple[str, Bool[Tensor, "_ _"]]], heads: list[int]) -> list[list[float]]:
    """Return which share of its own weights each head lost, by layer: the rows of q and the columns of o."""
    lost = [[0.0] * n for n in heads]
    sizes = [0] * len(heads)
    for name, mask in keep:
        _, layer, *_, role = name.split(".")
        if role not in ("q", "o") or ".mixer." in name:
            continue
        at, own = int(layer), ~(mask if role == "q" else mask.T)
        each = own.reshape(heads[at], -1).sum(1, dtype=torch.float64).tolist()
        lost[at] = [a + b for a, b in zip(lost[at], each, strict=True)]
        sizes[at] += own.numel() // heads[at]
    return [[x / max(size, 1) for x in row] for row, size in zip(lost, sizes, strict=True)]


def _effect_files(folder: Path) -> list[Path]:
    """Return the effects of a run: its own, and those of other estimators in folders within it."""
    nested = list(folder.glob(f"*/{EFFECTS}"))
    return [path for path in (folder / EFFECTS, *sorted(nested)) if path.exists()]


def _name(path: Path, folder: Path) -> str | None:
    return None if path.parent == folder else path.parent.name


def _head_counts(effects: tuple[Measured, ...]) -> list[int]:
    for own in effects:
        layers = [unit["layer"] for unit in own.units if unit["kind"] == "head"]
        if layers:
            return [layers.count(layer) for layer in range(max(layers) + 1)]
    return []
