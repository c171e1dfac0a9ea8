"""How far effects can be trusted: what a referee would ask of a ranking of heads.

Five independent draws of problems; problems of one task swapped for those of another; reasoning against
plain text; and pairs of strong heads removed together (interaction = joint effect − sum of both).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causalprune.attribution.estimators import attribute
from causalprune.attribution.measured import Measured
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import Plan, opened, planned
from causalprune.attribution.questions import Estimator, Question
from causalprune.attribution.uncertainty import agreement, reliability, spearman, top_overlap
from causalprune.core import Calibration, Decoder, Effects, OptionError, Progress, Stage, say, silent
from causalprune.interventions import grouped_by_effect

DRAWS = 5
SWAPPED = (0.0, 0.25, 0.5, 0.75, 1.0)
RESAMPLES = 20


@dataclass(frozen=True)
class Pairs:
    """How many of the strongest units are removed in pairs, and on how many sequences."""

    top: int = 20
    sequences: int = 4


@dataclass(frozen=True)
class Trial:
    """What is asked of every calibration.

    Attributes:
        question: what is measured.
        pairs: what is removed together, of the first calibration.
        max_batch_tokens: how much a forward pass holds.
    """

    question: Question = Question()
    pairs: Pairs = Pairs()
    max_batch_tokens: int = 2048


def stability(
    decoder: Decoder,
    calibrations: Mapping[str, Calibration],
    folder: Path,
    trial: Trial = Trial(),
    *,
    stage: Stage,
) -> dict[str, Any]:
    """Measure effects on every calibration, and return how they agree within and between them.

    Each calibration has `DRAWS` subsets, which are the independent draws; the first is what the others are
    compared with, and where pairs are removed. Costs an exact measurement of each, and about
    `top · (top − 1) / 2` passes per sequence for the pairs. Resumable: every job is in a ledger in `folder`.
    """
    if grouped_by_effect(trial.question.units):
        raise OptionError(
            "groups of neurons by effect are others on every set of problems: to compare take neurons:1, or neurons:64 in a row"
        )
    if trial.question.ablation != "zero":
        raise OptionError(f"pairs are removed with ablation 'zero', not {trial.question.ablation!r}")
    question, pairs, how = trial.question, trial.pairs, Estimator(max_batch_tokens=trial.max_batch_tokens)
    measured: dict[str, Effects] = {}
    for name, calibration in calibrations.items():
        with stage(f"effects on {name}") as progress:
            path = folder / f"{quote(name, safe=':')}.ledger"
            measured[name] = attribute(decoder, calibration, question, how, ledger=path, on_progress=progress)
    first, *others = measured
    found: dict[str, Any] = {
        "within": {name: draws(effects) for name, effects in measured.items()},
        "between": {name: compared(measured[first], measured[name]) for name in others},
        "swaps": {name: swapped(measured[first], measured[name]) for name in others},
    }
    with stage(f"pairs of units on {first}") as progress:
        plan = planned(decoder, _first(calibrations[first], pairs.sequences), question, how)
        found["interactions"] = interactions(
            plan, measured[first], pairs.top, ledger=folder / "pairs.ledger", on_progress=progress
        )
    return found


def draws(effects: Effects) -> dict[str, float]:
    """Return how the subsets agree: rank correlation, top fifth, and the spread of a unit's effect."""
    known = _known(effects)
    means = [_mean(effects, effects.subset == k)[known] for k in range(int(effects.subset.max()) + 1)]
    spread = torch.stack(means).std(0)
    return {
        "spearman_between_draws": agreement(means, spearman),
        "top_fifth_between_draws": agreement(means, top_overlap),
        "median_sd_between_draws_nats": float(spread.median()),
        "sd_between_units_nats": float(effects.paired_delta_nats()[known].std()),
        "problems_per_draw": float(len(effects.subset) / len(means)),
        **reliability(effects),
    }


def _known(effects: Effects) -> Bool[Tensor, "unit"]:
    """Tell of which units all was measured: experts that no token reached are none."""
    return ~effects.change_nats().isnan().any(1)


def compared(one: Effects, other: Effects) -> dict[str, float]:
    """Return how two calibrations rank units, and the most that their own noise would allow.

    The ceiling is the geometric mean of both split-half reliabilities, stepped up to their full length
    (Spearman–Brown): the correlation of two noisy measurements of the same ranking.
    """
    halves = [reliability(effects).get("split_half", np.nan) for effects in (one, other)]
    ceiling = float(np.sqrt(np.prod([2 * r / (1 + r) for r in halves]))) if min(halves) > 0 else np.nan
    known = _known(one) & _known(other)
    a, b = one.paired_delta_nats()[known], other.paired_delta_nats()[known]
    return {"spearman": spearman(a, b), "ceiling": ceiling, "top_fifth": top_overlap(a, b)}


def swapped(one: Effects, other: Effects, seed: int = 0) -> dict[str, float]:
    """Return how rankings of equally many problems agree with all of `one` when a share comes from `other`.

    A ranking uses half of `one`'s problems, or as many as `other` has, drawn anew each time, so that at share 0 it
    is the draw alone. As in every mixed calibration all target tokens count the same, so worked solutions outweigh
    problems whose target is a short answer.
    """
    known = _known(one) & _known(other)
    random, whole, found = np.random.default_rng(seed), one.paired_delta_nats()[known], {}
    size = min(len(one.tokens) // 2, len(other.tokens))
    for share in SWAPPED:
        out, values = round(share * size), []
        for _ in range(RESAMPLES):
            kept, taken = (
                random.permutation(len(one.tokens))[: size - out],
                random.permutation(len(other.tokens)),
            )
            change = torch.cat([one.change_nats()[:, kept], other.change_nats()[:, taken[:out]]], 1)[known]
            tokens = torch.cat([one.tokens[kept], other.tokens[taken[:out]]])
            values.append(spearman(change.sum(1) / tokens.sum(), whole))
        found[f"{share:.0%}"] = float(np.mean(values))
    return found


def interactions(
    plan: Plan, effects: Effects, top: int, *, ledger: Path | None = None, on_progress: Progress = silent
) -> dict[str, Any]:
    """Remove the strongest units two by two: joint effect against the sum of both, in nats per token.

    `plan` is for the first sequences of those that `effects` were measured on.
    """
    question, examples = plan.question, plan.calibration.examples
    worth = effects.paired_delta_nats().nan_to_num(-torch.inf)  # what no token reached is no pair of anything
    chosen = sorted(worth.topk(min(top, int(_known(effects).sum()))).indices.tolist())
    both = [(a, b) for i, a in enumerate(chosen) for b in chosen[i + 1 :]]
    joint = torch.zeros(len(both), len(examples), dtype=torch.float64)
    units = list(plan.units)
    say(on_progress, unit="passes")
    with opened(plan, ledger) as book:
        work = Measured(Passes(plan), book)
        for number, batch in enumerate(plan.groups):
            work.measure_intact(number)
            for at, (a, b) in enumerate(both):
                parts = _united(plan, units[a], units[b])
                layer, rows = min(units[a].layer, units[b].layer), range(len(batch.indices))
                cells = [(parts, row) for row in rows]
                row = work.recalled(f"{number}:{a}:{b}", lambda: work.passes.joint(number, layer, cells))  # noqa: B023
                values = torch.tensor(row[question.effect], dtype=torch.float64)
                columns = list(batch.indices)
                joint[at, columns] = values - (work.intact[columns] if question.effect == "ce" else 0.0)
                if work.fresh:
                    on_progress(number * len(both) + at + 1, len(plan.groups) * len(both))
    alone = effects.change_nats()[:, : len(examples)]
    tokens = float(effects.tokens[: len(examples)].sum())
    sums = torch.stack([alone[a] + alone[b] for a, b in both]).sum(1) / tokens
    together = joint.sum(1) / tokens
    return _summary([(units[a], units[b]) for a, b in both], together, sums)


def _first(calibration: Calibration, n: int) -> Calibration:
    return Calibration(calibration.examples[:n], calibration.subset[:n])


def _united(plan: Plan, a: Any, b: Any) -> Any:
    united = dict(plan.units[a])
    for site, index in plan.units[b].items():
        united[site] = torch.cat([united[site], index]) if site in united else index
    return united


def _summary(
    both: Sequence[tuple[Any, Any]], joint: Float[Tensor, "pair"], sums: Float[Tensor, "pair"]
) -> dict[str, Any]:
    extra = joint - sums
    order = extra.abs().argsort(descending=True)[:10].tolist()
    return {
        "pairs": len(both),
        "median_relative_interaction": float((extra.abs() / sums.abs().clamp_min(1e-12)).median()),
        "share_superadditive": float((extra > 0).double().mean()),
        "correlation_of_joint_and_sum": float(torch.corrcoef(torch.stack([joint, sums]))[0, 1]),
        "strongest": [
            {
                "units": [[u.layer, u.index, u.kind] for u in both[i]],
                "joint_nats": float(joint[i]),
                "sum_nats": float(sums[i]),
            }
            for i in order
        ],
    }


def _mean(effects: Effects, chosen: Tensor) -> Float[Tensor, "unit"]:
    return effects.change_nats()[:, chosen].sum(1) / effects.tokens[chosen].sum()
