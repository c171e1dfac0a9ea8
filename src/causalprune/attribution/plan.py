"""What a measurement consists of, fixed before the first pass: batches, units, what they cost, whose ledger it is."""

import hashlib
import math
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from causalprune.attribution.questions import (
    DEFAULT_BUDGET,
    ELSEWHERE,
    UNPAIRED,
    Estimator,
    Question,
    check_together,
)
from causalprune.calibration import batch_of, batches, check_positions
from causalprune.core import Batch, Calibration, Decoder, Ledger, OptionError, Unit
from causalprune.interventions import (
    Parts,
    Site,
    check_ruled,
    grouped_by_effect,
    list_units,
    neuron_effects,
    sites,
)
from causalprune.models import fingerprint


@dataclass(frozen=True, eq=False)
class Plan:
    """A model, and what is to be measured on it.

    Attributes:
        groups: the calibration in batches, as cells are measured in.
        units: the parts that removing each unit closes.

    Raises:
        OptionError: question and estimator do not go together.
    """

    decoder: Decoder
    calibration: Calibration
    question: Question
    estimator: Estimator
    groups: Sequence[Batch]
    units: Mapping[Unit, Parts]

    def __post_init__(self) -> None:
        ablation, how = self.question.ablation, self.estimator
        if ablation != "zero" and any(site.place == "experts" for site in self.own_sites):
            raise OptionError(f"experts can only be ablated with 'zero', not {ablation!r}")
        check_together(self.question, how)
        if ablation == "counterfactual" and any(e.counterfactual is None for e in self.calibration.examples):
            raise OptionError(UNPAIRED)
        if how.name == "relevance":
            check_ruled(self.decoder)
        if self.budget_tokens < self.expansion_tokens:
            most, budget = (self.naive_tokens / own for own in (self.expansion_tokens, self.budget_tokens))
            raise OptionError(
                f"the prediction alone costs 1/{most:.0f} of naive, and the budget is 1/{budget:g}: take the estimator exact, or "
                f"in `attribute` a --budget below {most:.2g}x"
            )

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.decoder.layers)

    @cached_property
    def sites(self) -> Mapping[Site, int]:
        """Every site of the model, and its number of parts."""
        return sites(self.decoder)

    @cached_property
    def own_sites(self) -> Set[Site]:
        """The sites that the units have parts at."""
        return {site for parts in self.units.values() for site in parts}

    @cached_property
    def number(self) -> Mapping[Unit, int]:
        """The place of every unit in their order."""
        return {unit: i for i, unit in enumerate(self.units)}

    @cached_property
    def model_fingerprint(self) -> str:
        """SHA-256 of the model as it is now: it may have been pruned since it was loaded."""
        return fingerprint(self.decoder.model)

    def units_of(self, layer: int) -> list[Unit]:
        """Return the units of a layer."""
        return [unit for unit in self.units if unit.layer == layer]

    def cost(self, number: int, layer: int, cells: int) -> float:
        """Return the tokens that this many cells forward, in equivalents of whole passes."""
        return cells * self.groups[number].tokens.shape[1] * (self.depth - layer) / self.depth

    @property
    def naive_tokens(self) -> int:
        """Tokens of one whole forward pass per unit and sequence, and one of the intact model, unpadded."""
        return (len(self.units) + 1) * sum(len(example.tokens) for example in self.calibration.examples)

    @property
    def budget_tokens(self) -> float:
        """Tokens that the estimator may spend; without bound where it has no budget, or goes on until all is certain."""
        how = self.estimator
        own = DEFAULT_BUDGET if how.name == "adaptive" and not how.until_certain else None
        budget = how.budget or own
        return math.inf if budget is None else self.naive_tokens / budget

    @property
    def expansion_tokens(self) -> float:
        """Tokens that predictions cost, in equivalents of whole passes: a backward pass counts as two."""
        draws = 0 if self.estimator.name == "relevance" else self.estimator.draws
        passes = len(self.estimator.gates) * (1 + 2 * (1 + draws))
        return float(passes * sum(len(example.tokens) for example in self.calibration.examples))

    @property
    def neurons(self) -> dict[str, dict[str, list[int]]]:
        """Where they are grouped by effect: which neurons each group holds, by `layer.index`; else empty."""
        if not grouped_by_effect(self.question.units):
            return {}
        groups = {
            f"{unit.layer}.{unit.index}": index.tolist()
            for unit, parts in self.units.items()
            if unit.kind == "neurons"
            for index in parts.values()
        }
        return {"neurons": groups}

    def ledger(self, path: Path) -> Ledger:
        """Return the ledger of this plan at `path`, to be entered."""
        composition = repr([batch.indices for batch in self.groups])
        identity = {
            "model": self.model_fingerprint,
            "calibration": self.calibration.fingerprint,
            "batches": hashlib.sha256(composition.encode()).hexdigest(),
            **asdict(self.question),
            "estimator": {k: v for k, v in asdict(self.estimator).items() if k not in ELSEWHERE},
            **self.neurons,
        }
        return Ledger(path, identity)


def opened(plan: Plan, ledger: Path | str | None) -> AbstractContextManager[Ledger | None]:
    """Return a context in which finished jobs are recalled from, and added to, a file, where there is one."""
    return nullcontext() if ledger is None else plan.ledger(Path(ledger))


def planned(
    decoder: Decoder,
    calibration: Calibration,
    question: Question = Question(),
    estimator: Estimator = Estimator(),
) -> Plan:
    """Put the calibration in batches and list the units.

    Costs nothing, but a forward and a backward pass where neurons are grouped by effect.
    """
    check_positions(decoder, calibration.examples)
    if (estimator.name, question.effect) == ("gradient", "ce") and estimator.gates != (1.0,):
        # an integral has no second order
        estimator = replace(estimator, draws=0)
    groups = batches(calibration.examples, max_batch_tokens=estimator.max_batch_tokens)
    if question.ablation == "resample":
        groups = _in_company(groups, calibration)
    if estimator.name == "adaptive":  # its cells are few per sequence: no others are walked through with them
        groups = batches(calibration.examples, max_batch_tokens=1)
    slopes = neuron_effects(decoder, groups) if grouped_by_effect(question.units) else None
    units = list_units(decoder, question.units, slopes)
    return Plan(decoder, calibration, question, estimator, groups, units)


def _in_company(groups: Sequence[Batch], calibration: Calibration) -> list[Batch]:
    """Return batches of two sequences at least: each needs another one to take activations from."""
    if len(calibration.examples) < 2:
        raise OptionError("ablation 'resample' needs at least 2 calibration examples")
    merged: list[list[int]] = []
    for batch in groups:
        if merged and (len(batch.indices) < 2 or len(merged[-1]) < 2):
            merged[-1] += batch.indices
        else:
            merged.append(list(batch.indices))
    return [batch_of(calibration.examples, group) for group in merged]
