"""What a model with some candidates closed makes of the deciding half: losses, divergences and log-odds, never predicted."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.calibration import batches
from causalprune.core import METHOD_VERSION, Batch, Decoder, EvalResult, Ledger, ModelError, Progress, silent
from causalprune.correction.behaviours import CLEAN
from causalprune.correction.candidates import Candidates, Chosen, Rows
from causalprune.correction.samples import Half
from causalprune.correction.telling import short
from causalprune.interventions import (
    LayerInputs,
    by_row,
    cross_entropy,
    divergence,
    entered_at,
    last_hidden,
    log_odds,
    parts_of,
    target_logits,
    targets,
)


@dataclass(frozen=True, eq=False)
class Measured:
    """Per sample, per target token: log-odds of what is undesired, losses of what is to stay, divergence from before."""

    odds: Float[Tensor, "problem"]
    nats: Float[Tensor, "example"]
    kl: Float[Tensor, "example"]


class Trials:
    """Measures a model without some of its candidates. What a ledger has is not measured again."""

    def __init__(self, decoder: Decoder, half: Half, max_batch_tokens: int, book: Ledger | None) -> None:
        self.decoder, self.half, self._book = decoder, half, book
        self._known: dict[str, Any] = {} if book is None else book.rows
        self._groups = {
            side: batches(examples, max_batch_tokens=max_batch_tokens)
            for side, examples in (("undesired", half.sequences), ("preserve", half.preserve))
        }

    @cached_property
    def _intact(self) -> list[LayerInputs]:
        """What the intact model sends to its final norm on what is to stay; to be asked for before anything is written."""
        return [last_hidden(self.decoder, batch) for batch in self._groups["preserve"]]

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(e.tokens) for e in (*self.half.sequences, *self.half.preserve))

    def without(self, candidates: Candidates, chosen: Chosen, tell: Progress = silent) -> Measured:
        """Return what the model does without some candidates."""
        return self._measured(named(chosen), lambda: candidates.without(chosen), tell)

    def now(self, name: str, tell: Progress = silent) -> Measured:
        """Return what the model does as it is now, under a name of its own."""
        return self._measured(name, _as_it_is, tell)

    def prepare(self) -> None:
        """Look at the intact model, which has to be intact now."""
        assert self._intact is not None

    def _measured(
        self, name: str, change: Callable[[], AbstractContextManager[Rows]], tell: Progress
    ) -> Measured:
        missing = [key for key in self._keys(name) if key not in self._known]
        if missing:
            self.prepare()
            with change() as rows:
                self._fill(name, rows, tell)
        half, found = self.half, dict[str, Tensor]()
        for side, kinds, n in (
            ("undesired", ("odds",), len(half.sequences)),
            ("preserve", ("nats", "kl"), len(half.preserve)),
        ):
            for kind in kinds:
                found[kind] = torch.zeros(n, dtype=torch.float64)
                for number, batch in enumerate(self._groups[side]):
                    values = self._known[f"{name}:{side}:{number}"][kind]
                    found[kind][list(batch.indices)] = torch.tensor(values, dtype=torch.float64)
        own, n = found["odds"], len(half.undesired)
        return Measured(own[:n] - own[n:] if half.paired else own, found["nats"], found["kl"])

    def _keys(self, name: str) -> list[str]:
        return [f"{name}:{side}:{at}" for side, own in self._groups.items() for at in range(len(own))]

    def _fill(self, name: str, rows: Rows, tell: Progress) -> None:
        done = 0
        for side, groups in self._groups.items():
            for number, batch in enumerate(groups):
                key = f"{name}:{side}:{number}"
                if key not in self._known:
                    with rows(len(batch.tokens)):
                        intact = self._intact[number] if side == "preserve" else None
                        values = _values(self.decoder, batch, intact)
                    for own in values.values():
                        check_finite(self.decoder, "losses", torch.tensor(own))
                    if self._book is None:
                        self._known[key] = values
                    else:
                        self._book.append(key, values)
                done += int(batch.lengths.sum())
                tell(done, self.tokens)


def per_sample(decoder: Decoder, half: Half, found: Measured) -> tuple[EvalResult, ...]:
    """Return what was measured of every sample, by source: log-odds, losses, and of clean texts their divergence."""
    told = {"model": decoder.name, "method_version": METHOD_VERSION, "higher_is_better": False}
    each = [("log_odds", e, value) for e, value in zip(half.undesired, found.odds.tolist(), strict=True)]
    for example, nats, kl in zip(half.preserve, found.nats.tolist(), found.kl.tolist(), strict=True):
        clean = example.source.startswith(CLEAN)
        each.append(("kl" if clean else "nll", example, kl if clean else nats))
    results = []
    for kind, source in dict.fromkeys((kind, example.source) for kind, example, _ in each):
        own = [(e.content, value) for what, e, value in each if (what, e.source) == (kind, source)]
        contents, values = zip(*own, strict=True)
        metric = kind if kind == "log_odds" else "nats_per_token"
        name, weights = f"{short(source)}_{kind}", (1.0,) * len(own)  # a mean over samples, as harm is
        results.append(EvalResult(name, metric, values, weights, contents, description=told))
    return tuple(results)


def check_finite(decoder: Decoder, what: str, values: Float[Tensor, "*any"]) -> None:
    """Raise `ModelError` where values of a model are not finite."""
    if not bool(values.isfinite().all()):
        dtype = str(decoder.model.dtype).removeprefix("torch.")
        raise ModelError(f"{what} of {decoder.name} are not finite in {dtype}: a wider --dtype may do")


@contextmanager
def _as_it_is() -> Iterator[Rows]:
    """Change nothing."""
    yield lambda _: nullcontext()


def named(chosen: Chosen) -> str:
    """Return a name for a set of candidates."""
    own = repr(sorted(chosen.tolist())) if len(chosen) < 10_000 else chosen.sort().values.numpy().tobytes()
    return hashlib.sha256(own.encode() if isinstance(own, str) else own).hexdigest()[:20]


def _values(decoder: Decoder, batch: Batch, intact: LayerInputs | None) -> dict[str, list[float]]:
    """Return values of every sequence per target token; against the intact model's last states where those are given."""
    wanted, after = targets(batch), len(decoder.layers)
    values: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        last = last_hidden(decoder, batch)
        for part, _ in parts_of(wanted):
            with entered_at(decoder, after, last):
                logits = target_logits(decoder, batch, part)
            if intact is None:
                values.setdefault("odds", []).append(log_odds(logits, part))
                continue
            with entered_at(decoder, after, intact):
                before = target_logits(decoder, batch, part)
            values.setdefault("nats", []).append(cross_entropy(logits, part))
            values.setdefault("kl", []).append(divergence(before, torch.arange(len(logits)), logits))
        tokens = batch.is_target.sum(1)
        return {
            kind: (by_row(torch.cat(own), wanted).cpu() / tokens).tolist() for kind, own in values.items()
        }
