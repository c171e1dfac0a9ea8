"""A behaviour on problems: what the model makes of them with some of its units closed, and which units that hangs on."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalprune.attribution import Estimator, Plan, Question, balanced, planned
from causalprune.core import (
    Batch,
    Calibration,
    Decoder,
    Example,
    Ledger,
    ModelError,
    OptionError,
    Progress,
    State,
    Unit,
    silent,
)
from causalprune.interventions import (
    Parts,
    Site,
    by_row,
    divergence,
    donated,
    expansion,
    gated,
    lost,
    means,
    other_targets,
    relevance,
    selected,
    target_logits,
    targets,
    uniforms,
)

Keep = Bool[Tensor, "unit"]
MEASURED = ("exact", "adaptive")
"""Estimators that remove units from the intact model one by one."""


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Problems, and the units of a model that may be closed while it works on them.

    A problem is an example, or two of one prompt: the right answer, and the wrong one that it is compared with (`instead`).
    Where all wrong answers differ in the last token alone, `endings` has those, one pass does for both, and losses of sequences
    are differences; elsewhere the sequences of wrong answers follow those of right ones.
    `mean` is what closed units send where the ablation is that, taken from the problems that rank.
    """

    decoder: Decoder
    problems: Sequence[Example]
    plan: Plan
    mean: Mapping[Site, Tensor] | None = None
    endings: Sequence[int] | None = None

    @property
    def units(self) -> Sequence[Unit]:
        """All units, in the model's order."""
        return list(self.plan.units)

    @cached_property
    def mixed(self) -> bool:
        """Whether there are several kinds of units: sizes are weights then."""
        return len({unit.kind for unit in self.plan.units}) > 1

    @property
    def tokens(self) -> int:
        """Tokens of one pass over all problems."""
        return sum(len(example.tokens) for example in self.plan.calibration.examples)

    @cached_property
    def places(self) -> Mapping[Site, tuple[Int[Tensor, "_"], Int[Tensor, "_"]]]:
        """The parts at every site, and the units that they belong to."""
        found: dict[Site, tuple[list[Tensor], list[int]]] = {}
        for number, parts in enumerate(self.plan.units.values()):
            for site, index in parts.items():
                own = found.setdefault(site, ([], []))
                own[0].append(index)
                own[1].append(number)
        return {
            site: (
                torch.cat(index),
                torch.tensor(owner).repeat_interleave(torch.tensor([len(one) for one in index])),
            )
            for site, (index, owner) in found.items()
        }

    @cached_property
    def weights(self) -> Float[Tensor, "unit"]:
        """Weights that each unit has: a head's shares of q, k, v and o, a neuron's rows and column, an expert's matrices."""
        sizes = dict.fromkeys(self.places, 0)
        for p in self.decoder.projections:
            site = Site(p.layer, p.place)
            if site in sizes:
                sizes[site] += p.size
        found = torch.zeros(len(self.plan.units), dtype=torch.float64)
        for site, (_, owner) in self.places.items():
            found.index_add_(
                0, owner, torch.full((len(owner),), sizes[site] / self.plan.sites[site], dtype=torch.float64)
            )
        return found

    def gates(self, keep: Keep, value: float = 1.0) -> dict[Site, Float[Tensor, "part"]]:
        """Return gates that are closed where a unit is not kept, and have this value elsewhere."""
        found = {}
        for site, (index, owner) in self.places.items():
            found[site] = torch.full((self.plan.sites[site],), value)
            found[site][index[~keep[owner]]] = 0.0
        return found

    def fingerprint(self) -> str:
        """Return the SHA-256 of the problems."""
        return self.plan.calibration.fingerprint

    def first(self, count: int) -> "Behaviour":
        """Return the same behaviour on the first problems, of every source in turn."""
        by: dict[str, list[Example]] = {}
        for problem in self.problems:
            by.setdefault(problem.source, []).append(problem)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*by.values()))
        chosen = list(itertools.islice((problem for problem in turns if problem is not None), count))
        return behaviour(self.decoder, chosen, self.plan.question, self.plan.estimator, self.mean)

    def instead(self, batch: Batch, rows: list[int] | None = None) -> Mapping[Site, Tensor]:
        """Return what takes the place of closed units on a batch, or in these rows of it."""
        ablation, places = self.plan.question.ablation, list(self.places)
        if rows is not None and ablation == "resample":  # from other rows of the batch
            whole = donated(self.decoder, batch, places, ablation)
            return {site: own[rows] for site, own in whole.items()}
        own = batch if rows is None else selected(batch, rows)
        return donated(self.decoder, own, places, ablation, self.mean)

    def compared(self, batch: Batch) -> Batch:
        """Return a batch with wrong answers beside the right ones, where one pass does for both."""
        if self.endings is None:
            return batch
        tokens = batch.tokens.clone()
        tokens[torch.arange(len(tokens)), batch.lengths - 1] = torch.tensor(
            [self.endings[i] for i in batch.indices]
        )
        return replace(batch, others=tokens)

    def by_problem(self, values: Float[Tensor, "*any sequence"]) -> Float[Tensor, "*any problem"]:
        """Return values of sequences per target token of each problem, those of wrong answers taken away."""
        tokens = torch.tensor([example.target_tokens for example in self.plan.calibration.examples])
        each, n = values / tokens, len(self.problems)
        return each[..., :n] - each[..., n:] if each.shape[-1] > n else each

    def effects(self, values: Float[Tensor, "*any sequence"]) -> Float[Tensor, "*any problem"]:
        """Return effects as `by_problem` does; divergences are those of right answers alone, which a wrong one's say nothing about."""
        if self.plan.question.effect != "kl":
            return self.by_problem(values)
        n = len(self.problems)
        return values[..., :n] / torch.tensor([example.target_tokens for example in self.problems])


def check_apart(units: Mapping[Unit, Parts], asked: Sequence[str]) -> None:
    """Raise `OptionError` where units are parts of one another: closing one would close some of another."""
    found: dict[Site, list[tuple[Tensor, str]]] = {}
    for unit, parts in units.items():
        for site, index in parts.items():
            found.setdefault(site, []).append((index, unit.kind))
    for site, own in found.items():
        index = torch.cat([index for index, _ in own])
        if len(index.unique()) < len(index):
            kinds = ", ".join(sorted({kind for _, kind in own}))
            raise OptionError(
                f"units of {' and '.join(asked)} share parts at layer {site.layer} ({kinds}): "
                "name kinds that have nothing in common, such as heads and neurons:1"
            )


def behaviour(
    decoder: Decoder,
    problems: Sequence[Example],
    question: Question,
    estimator: Estimator,
    mean: Mapping[Site, Tensor] | None = None,
) -> Behaviour:
    """Return a behaviour; where closed units send a mean, that over these problems unless it is given. Costs a pass for that."""
    sequences = sequences_of(problems, estimator)
    paired = [example.instead for example in problems if example.instead is not None]
    if paired and question.ablation == "resample":
        raise OptionError(
            "problems with a wrong answer are no donors: 'resample' could put a prompt in its own place; "
            "take counterfactual, mean or zero"
        )
    every, how = Calibration(sequences, (0,) * len(sequences)), estimator
    if how.name == "adaptive":
        how = replace(how, name="gradient", budget=None, until_certain=False)
    plan = planned(decoder, every, question, how)
    if question.ablation == "mean" and mean is None:
        mean = means(decoder, plan.groups, list(plan.own_sites))
    alone = bool(paired) and len(sequences) == len(problems)
    return Behaviour(decoder, problems, plan, mean, [own.tokens[-1] for own in paired] if alone else None)


def sequences_of(problems: Sequence[Example], estimator: Estimator) -> tuple[Example, ...]:
    """Return what a pass over problems reads: right answers, and wrong ones after them where one pass does not do for both."""
    paired = [example.instead for example in problems if example.instead is not None]
    if paired and len(paired) < len(problems):
        raise OptionError(
            "some problems have a wrong answer to compare with, and some have none: give it to all or to none"
        )
    alone = estimator.name not in MEASURED and _in_one_pass(problems, paired)
    return (*problems, *(() if alone else paired))


def _in_one_pass(problems: Sequence[Example], paired: Sequence[Example]) -> bool:
    """Tell whether all problems have wrong answers that differ in the last token alone, which no prediction sees."""
    return bool(paired) and all(
        (own.tokens[:-1], own.is_target) == (other.tokens[:-1], other.is_target)
        for own, other in zip(problems, paired, strict=True)
    )


class Trials:
    """Losses of a behaviour with units closed. What a ledger has is not measured again."""

    def __init__(self, of: Behaviour, book: Ledger | None = None, on_progress: Progress = silent) -> None:
        self.of, self._book, self._tell = of, book, on_progress
        self._known: dict[str, Any] = {} if book is None else book.rows
        self._name = hashlib.sha256(repr(identity(of)).encode()).hexdigest()[
            :8
        ]  # ledgers may hold several behaviours

    def nats(self, keeps: Sequence[Keep]) -> Float[Tensor, "keep problem"]:
        """Return the loss per target token of every problem, with all units closed but those kept; less the wrong answer's."""
        return self.of.by_problem(self._measured(keeps, ["nats"])["nats"])

    def both(
        self, keeps: Sequence[Keep]
    ) -> tuple[Float[Tensor, "keep problem"], Float[Tensor, "keep problem"]]:
        """Return the losses, and the divergence from the intact model per target token of every problem's right answer."""
        found = self._measured(keeps, ["nats", "kl"])
        tokens = torch.tensor([example.target_tokens for example in self.of.problems])
        return self.of.by_problem(found["nats"]), found["kl"][:, : len(tokens)] / tokens

    def _measured(
        self, keeps: Sequence[Keep], what: Sequence[str]
    ) -> dict[str, Float[Tensor, "keep sequence"]]:
        shape = len(keeps), len(self.of.plan.calibration.examples)
        found = {name: torch.zeros(shape, dtype=torch.float64) for name in what}
        names, done, total = [_named(keep) for keep in keeps], 0, len(keeps) * self.of.tokens
        for number, batch in enumerate(self.of.plan.groups):
            run = _Run(self.of, batch)
            for row, (keep, name) in enumerate(zip(keeps, names, strict=True)):
                key = f"{what[-1]}:{self._name}:{name}:{number}"
                if key not in self._known:
                    values = run.losses(keep, divergent="kl" in what)
                    if self._book is None:
                        self._known[key] = values
                    else:
                        self._book.append(key, values)
                    self._tell(done + int(batch.lengths.sum()), total)
                done += int(batch.lengths.sum())
                for kind, own in self._known[key].items():
                    found[kind][row, list(batch.indices)] = torch.tensor(own, dtype=torch.float64)
        return found


class _Run:
    """Passes over one batch; what all of them need is made once, when it is needed first."""

    def __init__(self, of: Behaviour, batch: Batch) -> None:
        self._of, self._batch, self._wanted = of, batch, targets(batch)
        self._others = other_targets(of.compared(batch))

    def losses(self, keep: Keep, *, divergent: bool) -> dict[str, list[float]]:
        """Return the losses of every sequence, and the divergences from the intact model where they are asked for."""
        logits, wanted = self._logits(keep), self._wanted
        with torch.inference_mode():
            found = {"nats": by_row(lost(logits, wanted, self._others), wanted).tolist()}
            if divergent:
                every = torch.arange(len(logits))
                found["kl"] = by_row(divergence(self._intact, every, logits), wanted).tolist()
        return found

    @cached_property
    def _intact(self) -> Float[Tensor, "target vocab"]:
        return self._logits(torch.ones(len(self._of.units), dtype=torch.bool))

    @cached_property
    def _instead(self) -> Mapping[Site, Tensor]:
        return self._of.instead(self._batch)

    def _logits(self, keep: Keep) -> Float[Tensor, "target vocab"]:
        rows, of = len(self._batch.tokens), self._of
        gates = {site: gate.expand(rows, -1) for site, gate in of.gates(keep).items() if not bool(gate.all())}
        with torch.inference_mode(), gated(of.decoder, gates, self._instead if gates else None):
            return target_logits(of.decoder, self._batch, self._wanted)


def _named(keep: Keep) -> str:
    return hashlib.sha256(bytes(keep.tolist())).hexdigest()[:20]


def scored(
    of: Behaviour, keep: Keep, how: Estimator, state: State, on_progress: Progress = silent
) -> Float[Tensor, "unit problem"]:
    """Return what closing each unit that is kept adds to the loss of each problem, by slopes; the others are closed, and NaN.

    In nats per target token, or in logits for `relevance`, a mean over gates (`balanced`). What is finished of it is in the
    `state`. Costs as the estimator.

    Raises:
        ModelError: a score is not finite.
    """
    numbers = keep.nonzero()[:, 0]
    every = list(of.plan.units.values())
    units: list[Parts] = [every[number] for number in numbers.tolist()]
    name, groups = _named(keep), of.plan.groups
    shape = len(how.gates), len(every), len(of.plan.calibration.examples)
    found = torch.full(shape, torch.nan, dtype=torch.float64)
    for number, batch in enumerate(groups):
        key = f"slopes-{name}-{number}"
        if key not in state.values:
            state.keep(**{key: _slopes(of, batch, units, [of.gates(keep, gate) for gate in how.gates], how)})
            on_progress(number + 1, len(groups))
        found[:, numbers[:, None], torch.tensor(batch.indices)] = state.values.pop(key).double()
    if not bool(found[:, numbers].isfinite().all()):
        dtype = str(of.decoder.model.dtype).removeprefix("torch.")
        raise ModelError(
            f"scores of units are not finite in {dtype}: a wider --dtype may do, or other problems"
        )
    return balanced(of.effects(found))


def _slopes(
    of: Behaviour,
    batch: Batch,
    units: Sequence[Parts],
    values: Sequence[Mapping[Site, Tensor]],
    how: Estimator,
) -> Float[Tensor, "gate unit batch"]:
    """Return predictions for a batch at every gate; in float32, as which they are kept."""
    own: dict[str, Any] = {"instead": of.instead(batch)}
    batch = of.compared(batch)
    if how.name == "relevance":
        parts = [relevance(of.decoder, batch, units, **own, gate=values[0])[1]]
    else:
        labels = uniforms(of.plan.calibration.examples, batch, how.draws, how.seed)
        at = 2 if of.plan.question.effect == "kl" else 1
        run = partial(expansion, of.decoder, batch, units, labels, **own)
        parts = [run(gate=gate)[at] for gate in values]
    return torch.stack(parts).float()


def identity(of: Behaviour) -> dict[str, Any]:
    """Return what a behaviour's losses depend on beside the problems."""
    composition = repr([batch.indices for batch in of.plan.groups])
    return {
        "model": of.plan.model_fingerprint,
        "problems": of.fingerprint(),
        "batches": hashlib.sha256(composition.encode()).hexdigest(),
        **asdict(of.plan.question),
        **of.plan.neurons,
    }
