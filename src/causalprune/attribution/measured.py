"""The cells of a plan that are measured so far, and the ledger from which a killed run has them back."""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalprune.attribution.measuring import Passes
from causalprune.core import Effects, Ledger, ModelError, Progress, Remarked, Unit
from causalprune.interventions import Site

LARGE = 50_000
"""Numbers of a job from which on the ledger keeps them as bits."""


class Measured:
    """Losses of the intact model and of cells (unit, sequence), in nats; NaN where nothing is measured yet.

    With a ledger that is open, every finished job is on disk before the next begins, and is not done again.
    """

    def __init__(self, passes: Passes, book: Ledger | None = None) -> None:
        self.passes, self.plan, self._book = passes, passes.plan, book
        shape = len(self.plan.units), len(self.plan.calibration.examples)
        self.masked = torch.full(shape, math.nan, dtype=torch.float64)
        self.kl = torch.full(shape, math.nan, dtype=torch.float64)
        self.intact = torch.zeros(shape[1], dtype=torch.float64)
        self._reached: dict[int, dict[Site, Tensor]] = {}
        self._intact_done: set[int] = set()
        self._walked: set[int] = set()
        self._cell_tokens = 0.0
        self.fresh = True
        """Whether the last job was done now, and not found in the ledger."""

    def recalled(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a job: from the ledger, or computed and written there."""
        self.fresh = self._book is None or key not in self._book.rows
        if self._book is not None and not self.fresh:
            return {name: _unpacked(own) for name, own in self._book.rows[key].items()}
        found = compute()
        for values in found.values():
            if isinstance(values, list) and not bool(torch.tensor(values).isfinite().all()):
                raise ModelError(
                    f"a loss is not finite (job {key}): look for broken weights or use a wider dtype"
                )
        if self._book is not None:
            self._book.append(key, {name: _packed(own) for name, own in found.items()})
        return found

    def measure_intact(self, number: int) -> None:
        """Measure the intact model on a batch, once."""
        if number in self._intact_done:
            return
        self._intact_done.add(number)
        found = self.recalled(f"{number}:intact", partial(self.passes.intact_row, number))
        columns = list(self.plan.groups[number].indices)
        self.intact[columns] = torch.tensor(found["ce"], dtype=torch.float64)
        for layer, counts in found.get("reached", {}).items():
            site = Site(int(layer), "experts")
            self._reached.setdefault(number, {})[site] = torch.tensor(counts)
        self._cell_tokens += self.plan.groups[number].tokens.numel()

    def measure(self, key: str, number: int, layer: int, cells: Sequence[tuple[Unit, int]]) -> None:
        """Measure cells (unit, row of the batch) whose units lie in `layer` or later."""
        if not cells:
            return
        plan = self.plan
        closed = [(plan.units[unit], row) for unit, row in cells]
        found = self.recalled(key, lambda: self.passes.joint(number, layer, closed))
        at = [plan.number[unit] for unit, _ in cells], [plan.groups[number].indices[row] for _, row in cells]
        self.masked[at] = torch.tensor(found["ce"], dtype=torch.float64)
        if "kl" in found:
            self.kl[at] = torch.tensor(found["kl"], dtype=torch.float64)
        self._cell_tokens += plan.cost(number, layer, len(cells))
        self._walked.add(number)

    @property
    def tokens_forwarded(self) -> float:
        """Tokens of masked and intact passes so far, in equivalents of whole passes, padding included."""
        walks = sum(self.plan.groups[number].tokens.numel() for number in self._walked)
        return self._cell_tokens + walks

    def report(self, on_progress: Progress, done: int, total: int) -> None:
        """Tell how much is done, and to those who show it which unit is the strongest so far; what was known is no news."""
        if not self.fresh and done < total:
            return
        on_progress(done, total)
        if isinstance(on_progress, Remarked):
            change = self.masked - self.intact if self.plan.question.effect == "ce" else self.kl
            tokens = torch.tensor([example.target_tokens for example in self.plan.calibration.examples])
            mean = change.nansum(1) / (~change.isnan() * tokens).sum(1).clamp_min(1)
            unit = list(self.plan.units)[int(mean.argmax())]
            on_progress.remark(
                f"strongest: layer {unit.layer} {unit.kind} {unit.index} ({float(mean.max()):+.3g})"
            )

    def effects(self, tokens_backward: float = 0.0, **predicted: Tensor) -> Effects:
        """Return what was measured; experts that no token reached are unmeasured (NaN), not unimportant."""
        plan, unmeasured = self.plan, []
        for unit, i in plan.number.items():
            if unit.kind == "expert" and not self._tokens_reaching(unit):
                for values in (self.masked, self.kl, predicted.get("predicted_nats", self.kl)):
                    values[i] = math.nan
                unmeasured.append([unit.layer, unit.index])
        return Effects(
            units=tuple(plan.units),
            masked_nats=self.masked,
            intact_nats=self.intact,
            tokens=torch.tensor([example.target_tokens for example in plan.calibration.examples]),
            subset=torch.tensor(plan.calibration.subset),
            model_fingerprint=plan.model_fingerprint,
            calibration_fingerprint=plan.calibration.fingerprint,
            description={
                **plan.calibration.description,
                "question": asdict(plan.question),
                "estimator": asdict(plan.estimator),
                "tokens_forwarded": self.tokens_forwarded + tokens_backward,
                "naive_tokens": plan.naive_tokens,
                **({"unreached_experts": unmeasured} if unmeasured else {}),
                **plan.neurons,
            },
            effect=plan.question.effect,
            kl_nats=self.kl if plan.question.effect == "kl" else None,
            **predicted,
        )

    def _tokens_reaching(self, expert: Unit) -> int:
        site = Site(expert.layer, "experts")
        return sum(int(reached[site][expert.index]) for reached in self._reached.values())


def _packed(values: Any) -> Any:
    """Return a large table as a ledger keeps it: its bits in letters, which take half the room of its digits."""
    if (
        not isinstance(values, list)
        or not values
        or not isinstance(values[0], list)
        or len(values) * len(values[0]) < LARGE
    ):
        return values
    table = np.array(values, dtype="<f8")
    return {"float64": base64.b64encode(table.tobytes()).decode(), "shape": list(table.shape)}


def _unpacked(values: Any) -> Any:
    if not isinstance(values, dict) or "float64" not in values:
        return values
    return np.frombuffer(base64.b64decode(values["float64"]), dtype="<f8").reshape(values["shape"])
