"""One budget for every kind of units: each gives what lowers the measured divergence, and the finest kind gives the rest."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch

from causalprune.calibration import batches, few
from causalprune.core import Batch, Calibration, Decoder, ModelError, OptionError, Progress, size_of
from causalprune.interventions import (
    LayerInputs,
    divergence,
    entered_at,
    last_hidden,
    target_logits,
    targets,
)
from causalprune.shrinking.structure import Kept, parameters_of, smaller
from causalprune.shrinking.timing import token_seconds
from causalprune.shrinking.worth import KINDS, Kind, Scores, sizes_of

Left: TypeAlias = Mapping[Kind, int]
"""Units that stay in every layer, or layers that stay; a kind that is not named stays whole."""

FINEST: tuple[Kind, ...] = ("neurons", "experts", "layers")
"""The first of these that a model can lose gives the rest."""
TRIED = (0.0, 0.125, 0.25, 0.375, 0.5)
"""Shares of the experts, or of the layers, that are tried, at least one; of KV groups every number up to half."""
MULTIPLE = 32
"""Widths of MLPs stay multiples of this where they are, as kernels like them."""


@dataclass(frozen=True)
class Budget:
    """What a smaller model may be, by one of three.

    `parameters` is the share of all parameters that goes, `memory` the bytes that the weights take at most, `latency` the time
    for a written token over the whole model's, at most, on this machine in transformers.
    """

    parameters: float | None = None
    memory: float | None = None
    latency: float | None = None

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
        return {name: value for name, value in asdict(self).items() if value is not None}


def step_of(kind: Kind, units: int) -> int:
    """Return how many units of a kind go at once."""
    return MULTIPLE if kind == "neurons" and units % MULTIPLE == 0 and units > MULTIPLE else 1


@dataclass(frozen=True)
class Offers:
    """The kinds of units that a model can lose, how many of each there are in a layer, and what is left of a budget.

    `over` are kinds that cannot go, and why; `known` are the parameters of what was asked for already.
    """

    decoder: Decoder
    budget: Budget
    sizes: dict[Kind, int] = field(default_factory=dict)
    over: dict[Kind, str] = field(default_factory=dict)
    known: dict[tuple[tuple[Kind, int], ...], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for kind in KINDS:
            try:
                self.sizes[kind] = self._size(kind)
            except (ModelError, OptionError) as error:
                self.over[kind] = str(error)

    def _size(self, kind: Kind) -> int:
        """Return how many units of a kind a layer has, or how many layers there are, if some can go."""
        sizes = set(sizes_of(self.decoder, kind).values())
        if (
            kind == "kv_groups"
            and "head_dim" not in self.decoder.model.config.get_text_config(decoder=True).to_dict()
        ):
            raise ModelError(
                "its configuration does not state the width of a head, which runtimes work out from their number"
            )
        n = len(self.decoder.layers) if kind == "layers" else min(sizes)
        if len(sizes) > 1 or n < 2 * step_of(kind, n):
            raise OptionError(f"layers have {sorted(sizes)} of them")
        self.parameters({kind: n - step_of(kind, n)})
        return n

    @property
    def finest(self) -> Kind:
        """The kind that gives the rest."""
        for kind in FINEST:
            if kind in self.sizes:
                return kind
        why = "; ".join(f"{kind.replace('_', ' ')}: {said}" for kind, said in self.over.items())
        raise ModelError(f"{self.decoder.name} has no units that can go: {why}")

    def kept(self, left: Left, worths: Mapping[Kind, Scores] | None = None) -> Kept:
        """Return what stays, the worthiest of every kind; without `worths` any, for the sizes alone."""
        found: dict[Kind, Any] = {}
        for kind, n in left.items():
            if kind == "layers":
                own = torch.cat([worths[kind][i] for i in sorted(worths[kind])]) if worths else None
                found[kind] = tuple(worthiest(own, n).tolist())
            else:
                scores = worths[kind] if worths else dict.fromkeys(sizes_of(self.decoder, kind))
                found[kind] = {layer: worthiest(own, n) for layer, own in scores.items()}
        return Kept(**found)

    def parameters(self, left: Left) -> int:
        """Return the parameters of the model that is left; raises what `smaller` does."""
        sizes = tuple(sorted(left.items()))
        if sizes not in self.known:
            self.known[sizes] = parameters_of(self.decoder, self.kept(left))
        return self.known[sizes]

    def cost(self, left: Left) -> float:
        """Return what the budget counts of the model that is left: parameters, bytes, or seconds for a token."""
        if self.budget.latency is None:
            return float(self.parameters(left))
        halves = self.halves
        seconds = token_seconds(self.decoder, halves)
        saved = {
            kind: (seconds["whole"] - seconds[kind]) / (1 - share) * (1 - left.get(kind, n) / n)
            for kind, (share, _) in halves.items()
            for n in [self.sizes[kind]]
        }
        layers, inside = saved.pop("layers", 0.0), sum(saved.values())
        deep = left.get("layers", 1) / self.sizes.get("layers", 1) if "layers" in left else 1.0
        return seconds["whole"] - layers - inside * deep  # what layers have lost goes with them

    @cached_property
    def halves(self) -> dict[Kind, tuple[float, Kept]]:
        """The model with half of every kind, and the share that is: what is timed."""
        found = dict[Kind, tuple[float, Kept]]()
        for kind, n in self.sizes.items():
            left = max(n // 2 // step_of(kind, n), 1) * step_of(kind, n)
            if self.possible({kind: left}):
                found[kind] = left / n, self.kept({kind: left})
        return found

    def possible(self, left: Left) -> bool:
        """Tell whether the architecture has such sizes."""
        try:
            return self.parameters(left) > 0
        except (ModelError, OptionError):
            return False

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

    def filled(self, given: Left) -> dict[Kind, int] | None:
        """Return what is left where the finest kind gives the rest; None where it has not enough.

        A share of the parameters is met as nearly as the steps allow; memory and latency are kept.
        """
        kind, n = self.finest, self.sizes[self.finest]
        start, step = given.get(kind, n), step_of(kind, n)
        if not self.possible(given):
            return None
        whole = self.cost(given)
        each = whole - self.cost({**given, kind: start - step})
        need = max((whole - self.most) / each, 0.0) if each > 0 else math.inf
        if not math.isfinite(need):
            return None
        steps = round(need) if self.budget.parameters is not None else math.ceil(need - 1e-9)
        found = {**given, kind: start - steps * step} if steps else dict(given)
        return found if start - steps * step >= step and self.possible(found) else None

    def options(self, kind: Kind) -> Iterator[int]:
        """Yield how many units of a kind are left, the most first."""
        n = self.sizes[kind]
        counts = (
            range(1, n // 2 + 1) if kind == "kv_groups" else sorted({max(round(n * own), 1) for own in TRIED})
        )
        yield from (n - count for count in counts if n - count >= 1)

    def check(self) -> None:
        """Raise `OptionError` where nothing that will be tried is as small as the budget asks for."""
        kind, n = self.finest, self.sizes[self.finest]
        given = [{}, *({own: left} for own in self.sizes if own != kind for left in self.options(own))]
        if any(self.filled(own) is not None for own in given):
            return
        least, whole = self.cost({kind: step_of(kind, n)}), self.cost({})
        raise OptionError(
            f"{self.decoder.name} cannot be so small: without all but {step_of(kind, n)} of the {n} {kind} of a layer "
            f"{least / whole:.0%} of its {self.counted} are left, and {self.most / whole:.0%} are asked for; "
            "ask for more, or name shares of its units"
        )

    @property
    def counted(self) -> str:
        """What `cost` counts, in words."""
        words = {"parameters": "parameters", "memory": "bytes", "latency": "time for a token"}
        return words[next(iter(self.budget.named))]


def competed(
    offers: Offers, worths: Mapping[Kind, Scores], calibration: Calibration, on_progress: Progress
) -> tuple[dict[Kind, int], list[dict[str, Any]]]:
    """Return how many units of each kind stay within the budget, and what was tried with the divergence that it had.

    Kind after kind gives more as long as the divergence from the intact model's predictions falls; the finest kind gives the
    rest. Divergences are those of whole candidates without an update, in nats a target token, on a few examples.
    """
    groups = batches(few(calibration.examples), max_batch_tokens=1024)
    decoder = offers.decoder
    intact = [last_hidden(decoder, batch) for batch in groups]
    tried: list[dict[str, Any]] = []
    others = [kind for kind in offers.sizes if kind != offers.finest and kind in worths]
    total, done = 1 + sum(len([*offers.options(kind)]) for kind in others), 0

    def measured(left: dict[Kind, int] | None) -> float:
        if left is None:
            return math.inf
        own = harm(smaller(decoder, offers.kept(left, worths)), groups, intact)
        tried.append({"left": left, "divergence": own})
        return own

    given, best = dict[Kind, int](), offers.filled({})
    lowest = measured(best)
    on_progress(1, total)
    for kind in others:
        done += len([*offers.options(kind)])
        for left in offers.options(kind):
            candidate = offers.filled({**given, kind: left})
            if (own := measured(candidate)) < lowest:
                lowest, best = own, candidate
            elif math.isfinite(lowest):
                break
            if candidate is not None and offers.finest not in candidate:  # it gives more than was asked for
                break
        given = {own: n for own, n in (best or {}).items() if own != offers.finest}
        on_progress(1 + done, total)
    if best is None:
        offers.check()
        raise OptionError(
            f"nothing that was tried makes {decoder.name} as small as that: name shares of its units"
        )
    return best, tried


def harm(decoder: Decoder, groups: Sequence[Batch], intact: Sequence[LayerInputs]) -> float:
    """Return the mean divergence from the intact model's predictions of target tokens, in nats.

    `intact` is what its last layer sent on for every batch, whose norm and head both models share.
    """
    total, tokens, after = 0.0, 0, len(decoder.layers)
    for batch, sent in zip(groups, intact, strict=True):
        wanted = targets(batch)
        (hidden,) = sent.hidden.values()
        with torch.inference_mode():
            with entered_at(decoder, after, LayerInputs({after: hidden}, sent.as_tuple)):
                whole = target_logits(decoder, batch, wanted)
            own = divergence(whole, torch.arange(len(whole)), target_logits(decoder, batch, wanted))
        total, tokens = total + float(own.double().sum()), tokens + len(own)
    return total / tokens


def worthiest(worth: torch.Tensor | None, n: int) -> torch.Tensor:
    """Return the indices of the `n` units that are worth most, in order; of those whose worth is not known first."""
    if worth is None:
        return torch.arange(n)
    return worth.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)[:n].sort().values
