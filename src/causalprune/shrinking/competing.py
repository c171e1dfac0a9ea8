"""One budget for every kind of units: each gives what lowers the measured divergence, and the finest kind gives the rest."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.calibration import batches, few
from causalprune.core import Batch, Calibration, Decoder, ModelError, OptionError, Progress, size_of
from causalprune.interventions import LayerInputs, divergence, entered_at, last_hidden, target_logits, targets
from causalprune.shrinking.structure import Kept, parameters_of, smaller
from causalprune.shrinking.timing import token_seconds
from causalprune.shrinking.together import parts_of, staying, step_of, worthiest
from causalprune.shrinking.worth import KINDS, Kind, Scores, balance, sizes_of

Left: TypeAlias = Mapping[Kind, int]
"""Units that stay in every layer, or layers that stay; a kind that is not named stays whole."""

FINEST: tuple[Kind, ...] = ("neurons", "experts", "layers")
"""The first of these that can give all alone gives the rest."""
TRIED = (0.0, 0.125, 0.25, 0.375, 0.5)
"""Shares of the experts, or of the layers, that are tried, at least one; of KV groups every number up to half."""
OVER = 0.02
"""Share of the whole by which a candidate may be smaller than asked for, where a finer one is at hand."""
COUNTED = {"parameters": "parameters", "memory": "bytes", "latency": "time for a token"}
"""What a budget counts, in words."""


@dataclass(frozen=True)
class Budget:
    """What a smaller model may be, by one of three.

    `parameters` is the share of all parameters that goes, `memory` the bytes that the weights take at most, `latency` the time
    for a written token over the whole model's, at most, on this machine in transformers, as predicted from timed parts.
    Units of these `kinds` may go for it.
    """

    parameters: float | None = None
    memory: float | None = None
    latency: float | None = None
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        if len(self.named) != 1:
            raise OptionError("a budget is one of parameters, memory and latency")
        ((name, value),) = self.named.items()
        if not 0 < value < (math.inf if name == "memory" else 1):
            between = "a number of bytes" if name == "memory" else "a share between 0 and 1"
            raise OptionError(f"{name} must be {between}, not {value:g}")

    @property
    def named(self) -> dict[str, float]:
        """What is asked for, by its name."""
        return {name: own for name in COUNTED if (own := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Offers:
    """The units that a model can lose within a budget: how many of each of some `kinds` there are in a layer, as `sizes`.

    Where their `worths` are known, the least of them go, else any. `over` are kinds that cannot go, and why; `known` are the
    parameters of what was asked for already.

    Raises:
        ModelError: no kind of units can go.
    """

    decoder: Decoder
    budget: Budget
    kinds: Collection[Kind] = KINDS
    worths: Mapping[Kind, Scores] | None = None
    sizes: dict[Kind, int] = field(default_factory=dict)
    over: dict[Kind, str] = field(default_factory=dict)
    known: dict[tuple[tuple[Kind, int], ...], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for kind in (own for own in self.kinds if own in self.budget.kinds):
            try:
                self.sizes[kind] = _even(self.decoder, kind)
                next(self.options(kind))
            except StopIteration:
                self.over[kind] = "no smaller number of them fits this architecture"
            except (ModelError, OptionError) as error:
                self.over[kind] = str(error)
            if kind in self.over:
                self.sizes.pop(kind, None)
        if not set(self.sizes) & set(FINEST):
            why = "; ".join(f"{kind.replace('_', ' ')}: {said}" for kind, said in self.over.items())
            raise ModelError(f"{self.decoder.name} has no units that can go: {why}")

    def kept(self, left: Left) -> Kept:
        """Return what stays, the worthiest of every kind."""
        found: dict[Kind, Any] = {}
        for kind, n in left.items():
            known = None if self.worths is None else self.worths[kind]
            if kind == "layers":
                own = None if known is None else torch.cat([known[i] for i in sorted(known)])
                found[kind] = tuple(worthiest(own, n).tolist())
            else:
                scores = known or dict.fromkeys(sizes_of(self.decoder, kind))
                found[kind] = staying(self.decoder, kind, {layer: (own, n) for layer, own in scores.items()})
        return Kept(**found)

    def step(self, kind: Kind) -> int:
        """Return how many units of a kind go at once."""
        return step_of(kind, self.sizes[kind], parts_of(self.decoder, kind))

    def parameters(self, left: Left) -> int:
        """Return the parameters of the model that is left; raises what `smaller` does."""
        sizes = tuple(sorted(left.items()))
        if sizes not in self.known:
            self.known[sizes] = parameters_of(self.decoder, self.kept(left))
        return self.known[sizes]

    def possible(self, left: Left) -> bool:
        """Tell whether the architecture has such sizes."""
        try:
            return self.parameters(left) > 0
        except (ModelError, OptionError):
            return False

    def options(self, kind: Kind) -> Iterator[int]:
        """Yield how many units of a kind may be left where others give too, the most first."""
        n, step = self.sizes[kind], self.step(kind)
        some = sorted({max(round(n * own / step), 1) * step for own in TRIED})
        counts = range(1, n // 2 + 1) if kind == "kv_groups" else some
        yield from (n - count for count in counts if count < n and self.possible({kind: n - count}))

    @cached_property
    def halves(self) -> dict[Kind, tuple[float, Kept]]:
        """The model with about half of every kind, and the share that is: what is timed."""
        found = dict[Kind, tuple[float, Kept]]()
        for kind, n in self.sizes.items():
            *_, left = self.options(kind)
            found[kind] = left / n, self.kept({kind: left})
        return found

    @cached_property
    def seconds(self) -> dict[str, float]:
        """The time for a written token of the whole model and of those `halves`."""
        return token_seconds(self.decoder, self.halves)

    def cost(self, left: Left) -> float:
        """Return what the budget counts of the model that is left: parameters, also for bytes, or seconds for a token."""
        if self.budget.latency is None:
            return float(self.parameters(left))
        halves, seconds = self.halves, self.seconds
        saved = {
            kind: (seconds["whole"] - seconds[kind]) / (1 - share) * (1 - left.get(kind, n) / n)
            for kind, (share, _) in halves.items()
            for n in [self.sizes[kind]]
        }
        layers, inside = saved.pop("layers", 0.0), sum(saved.values())
        deep = left["layers"] / self.sizes["layers"] if "layers" in left else 1.0
        return seconds["whole"] - layers - inside * deep  # what layers have lost goes with them

    @cached_property
    def most(self) -> float:
        """What the budget allows, in what `cost` counts."""
        whole = size_of(self.decoder)
        if self.budget.parameters is not None:
            return (1 - self.budget.parameters) * whole.parameters
        if self.budget.memory is not None:
            return self.budget.memory / (whole.bytes / whole.parameters)
        assert self.budget.latency is not None
        return self.budget.latency * self.cost({})

    @cached_property
    def finest(self) -> Kind:
        """The kind that gives the rest: the first that could give all."""
        own = [kind for kind in FINEST if kind in self.sizes]
        return next((kind for kind in own if self._given(kind, {}) is not None), own[0])

    def filled(self, given: Left) -> dict[Kind, int] | None:
        """Return what is left where the finest kind gives the rest; None where it has not enough.

        A share of the parameters is met as nearly as the steps allow; bytes, and the time that is predicted, are kept.
        """
        return self._given(self.finest, given)

    def _given(self, kind: Kind, given: Left) -> dict[Kind, int] | None:
        n = self.sizes[kind]
        start, step = given.get(kind, n), self.step(kind)
        if not self.possible(given):
            return None
        near = self.budget.parameters is not None
        last, left = self.cost(given) - self.most, start
        while last > 0:
            nearer = next(
                (own for own in range(left - step, 0, -step) if self.possible({**given, kind: own})), 0
            )
            if not nearer:
                return None
            each = self.cost({**given, kind: left}) - self.cost({**given, kind: nearer})
            if each <= 0:
                return None
            jump = max(math.floor(last / each) - 1, 0) * (
                left - nearer
            )  # all but the last at once: costs are linear
            some = min(jump, (left - 1) // step * step)
            if some and self.possible({**given, kind: left - some}):
                nearer = left - some
            over = self.cost({**given, kind: nearer}) - self.most
            if near and -over > last:
                break
            last, left = over, nearer
        return {**given, kind: left} if left < n else dict(given)


def _even(decoder: Decoder, kind: Kind) -> int:
    """Return how many units of a kind a layer has, or how many layers there are, where they can be even."""
    sizes = set(sizes_of(decoder, kind).values())
    config = decoder.model.config.get_text_config(decoder=True)
    if kind == "kv_groups" and "head_dim" not in config.to_dict():
        raise ModelError(
            "its configuration does not state the width of a head, which runtimes work out from their number"
        )
    n = len(decoder.layers) if kind == "layers" else min(sizes)
    if len(sizes) > 1 or n < 2 * step_of(kind, n, parts_of(decoder, kind)):
        raise OptionError(f"too few, or not equally many, in its layers: {sorted({n} | sizes)}")
    return n


def check_budget(offers: Offers) -> None:
    """Raise `OptionError` where nothing has to go, or nothing that will be tried is small enough."""
    filled = offers.filled({})
    if filled == {}:
        raise OptionError(
            f"nothing of {offers.decoder.name} would go: the budget is less than one step of "
            f"{offers.step(offers.finest)} {offers.finest.replace('_', ' ')}"
        )
    others = [kind for kind in offers.sizes if kind != offers.finest]
    if filled is None and all(offers.filled({own: n}) is None for own in others for n in offers.options(own)):
        kind, n = offers.finest, offers.sizes[offers.finest]
        fewest = next(
            own for own in range(offers.step(kind), n + 1, offers.step(kind)) if offers.possible({kind: own})
        )
        least, whole = offers.cost({kind: fewest}), offers.cost({})
        where = "" if kind == "layers" else " of a layer"
        counted = COUNTED[next(iter(offers.budget.named))]
        raise OptionError(
            f"{offers.decoder.name} cannot be so small: with {fewest} of the {n} {kind}{where} {least / whole:.0%} of its "
            f"{counted} are left, and {offers.most / whole:.0%} are asked for; ask for more, or name shares of its units"
        )


def competed(
    offers: Offers, calibration: Calibration, on_progress: Progress
) -> tuple[dict[Kind, int], list[dict[str, Any]]]:
    """Return how many units of each kind stay within the budget, and what was tried with the divergence that it had.

    Kind after kind gives more as long as the divergence from the intact model's predictions falls; the finest kind gives the
    rest. Divergences are those of whole candidates without an update, in nats a target token, on a few examples.
    """
    trials = _Trials(offers, calibration)
    others = [kind for kind in offers.sizes if kind != offers.finest]
    counts = {kind: [*offers.options(kind)] for kind in others}
    total = 1 + sum(map(len, counts.values()))
    given, best = dict[Kind, int](), offers.filled({})
    lowest, done = trials.measured(best), 1
    on_progress(done, total)
    for kind in others:
        for left in counts[kind]:
            candidate = offers.filled({**given, kind: left})
            if candidate is None or (best is not None and trials.wasteful(candidate)):
                continue
            if (own := trials.measured(candidate)) < lowest:
                lowest, best = own, candidate
            elif math.isfinite(own):
                break
        done += len(counts[kind])
        given = {own: n for own, n in (best or {}).items() if own != offers.finest}
        on_progress(done, total)
    if best is None or not math.isfinite(lowest):
        why = "; ".join(offers.over.values())
        raise OptionError(
            f"nothing that was tried makes {offers.decoder.name} as small as that; name shares of its units ({why})"
        )
    return best, trials.tried


class _Trials:
    """Candidates that were made and measured."""

    def __init__(self, offers: Offers, calibration: Calibration) -> None:
        self.offers, self.tried = offers, list[dict[str, Any]]()
        some = few(calibration.examples)
        self.groups = batches(some, max_batch_tokens=1024)
        self.parts = torch.tensor(balance(some, calibration.description))
        self.intact = [last_hidden(offers.decoder, batch) for batch in self.groups]

    def measured(self, left: dict[Kind, int] | None) -> float:
        """Return the divergence of a candidate; infinite where it cannot be made."""
        if left is None:
            return math.inf
        try:
            own = harm(
                smaller(self.offers.decoder, self.offers.kept(left)), self.groups, self.intact, self.parts
            )
        except (ModelError, OptionError) as error:
            self.offers.over.update(dict.fromkeys(left, str(error)))
            return math.inf
        self.tried.append({"left": dict(left), "divergence": own})
        return own

    def wasteful(self, candidate: Left) -> bool:
        """Tell whether a candidate is much smaller than asked for."""
        return self.offers.most - self.offers.cost(candidate) > OVER * self.offers.cost({})


def harm(
    decoder: Decoder, groups: Sequence[Batch], intact: Sequence[LayerInputs], parts: Float[Tensor, "example"]
) -> float:
    """Return the mean divergence from the intact model's predictions of target tokens, in nats.

    `parts` are what a token of each example counts; `intact` is what its last layer sent on for every batch, whose norm and head both models share.
    """
    total, tokens, after = 0.0, 0.0, len(decoder.layers)
    for batch, sent in zip(groups, intact, strict=True):
        wanted = targets(batch)
        (hidden,) = sent.hidden.values()
        with torch.inference_mode():
            with entered_at(decoder, after, LayerInputs({after: hidden}, sent.as_tuple)):
                whole = target_logits(decoder, batch, wanted)
            own = divergence(whole, torch.arange(len(whole)), target_logits(decoder, batch, wanted))
        each = parts[torch.tensor(batch.indices)][wanted.rows.cpu()]
        total, tokens = total + float((own.cpu().double() * each).sum()), tokens + float(each.sum())
    return total / tokens
