"""What came of a pruning run, and what a checkpoint's manifest says of it."""

from dataclasses import asdict, dataclass
from typing import Any

from causalprune.core import METHOD_VERSION, Calibration, Effects, Masks, Shown
from causalprune.pruning.grading import DoseResponse
from causalprune.pruning.methods import Method


@dataclass(frozen=True, eq=False, repr=False)
class Pruned(Shown):
    """What a pruning run kept, and what it has to say.

    `keep[name]` is True where a weight stays. `unrouted` names experts' matrices that no calibration
    token reached: their inputs are unknown, so they were scored by magnitude alone and not updated.
    `response` is what graded budgets were made from, `calibration` and `effects` what the method looked at.
    """

    method: Method
    keep: Masks
    unrouted: tuple[str, ...]
    response: DoseResponse | None = None
    calibration: Calibration | None = None
    effects: Effects | None = None

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint's manifest says of the way it was pruned."""
        return manifest(self, self.calibration, self.effects)

    def __repr__(self) -> str:
        own, counts = self.method, self.keep.counted()
        weights, zeros = (sum(row[kind] for row in counts) for kind in ("weights", "zeros"))
        words = "".join(f"+{word}" for word in (own.budgets, own.update) if word)
        share = f"{zeros:,} of {weights:,} prunable weights are zero ({zeros / weights:.2%})"
        return f"Pruned({own.criterion}:{own.resolved_scope}{words}; {share})"


def manifest(pruned: Pruned, calibration: Calibration | None, effects: Effects | None) -> dict[str, Any]:
    """Return what a checkpoint's manifest says of the way it was pruned."""
    own = pruned.method
    method = {**asdict(own), "scope": own.resolved_scope, "update": own.resolved_update}
    method["budgets"] = own.resolved_budgets
    record: dict[str, Any] = {
        "method_version": METHOD_VERSION,
        "method": method,
        "unrouted": list(pruned.unrouted),
    }
    if pruned.response is not None:
        record["dose_response"] = {**asdict(pruned.response), "nats": pruned.response.nats.tolist()}
    if calibration is not None:
        record["calibration"] = {**calibration.description, "fingerprint": calibration.fingerprint}
    if effects is not None:
        record["effects"] = {**effects.description, "fingerprint": effects.calibration_fingerprint}
    return record
