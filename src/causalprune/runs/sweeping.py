"""The highest sparsity that keeps a stated share of the task: a few runs, halving what is left each time."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from causalprune.checkpoints import MANIFEST
from causalprune.core import EvalResult, OptionError, Stage
from causalprune.evaluation import (
    BINARY,
    Tried,
    at_chance,
    headline,
    higher_is_better,
    paired_difference,
    room,
    rows_of,
)
from causalprune.pruning import N_OF_M, pattern_sparsity
from causalprune.reports import CHECKPOINTS
from causalprune.runs.cells import ADDED
from causalprune.runs.jobs import Coming
from causalprune.runs.keeping import let_go
from causalprune.runs.recipe import Recipe, as_recipe
from causalprune.runs.rows import is_removal
from causalprune.runs.study import run


def candidates(method: str) -> tuple[float, ...]:
    """Return the sparsities to choose from: steps of 5 %, below that of a pattern, if the method names one.

    Raises:
        OptionError: the method has no sparsity but its pattern's, or none at all.
    """
    if is_removal(method):
        raise OptionError(
            f"{method} makes no zeros, so there is no sparsity to look for: compare several shares with `causalprune run`"
        )
    pattern = pattern_sparsity(found[0]) if (found := N_OF_M.search(method)) else None
    if pattern is not None and "graded" not in method.split("+"):
        raise OptionError(
            f"{method} has one sparsity, {pattern:g}, so there is none to look for: add +graded, which lets matrices "
            "stay dense, or leave the pattern out"
        )
    steps = (round(0.05 * step, 2) for step in range(1, 20))
    return tuple(step for step in steps if pattern is None or step < pattern)


def sweep(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    keep: float,
    folder: Path | str,
    *,
    certain: bool = False,
    data_dir: Path | str | None = None,
    stage: Stage | None = None,
) -> list[Tried]:
    """Return what was tried of the recipe's sparsities, ascending; the last that holds is the answer.

    A recipe is what `run` takes; a dictionary without `sparsities` stands for steps of 5 %. `stage` is as there.
    A task keeps the share `keep` where its accuracy is at least that share of dense, its likelihood per token
    (`exp(−loss)`, one over the perplexity) likewise; with `certain` the far end of the 95 % interval of the paired
    difference must say so too. General text decides only where the recipe names it. Supposes that tasks get worse with sparsity.
    Everything measured is in the run folder, so a stopped sweep goes on; the checkpoint of the highest sparsity that holds is kept there.

    Raises:
        OptionError: `keep` is not a share, or the recipe holds more than one method.
    """
    if not 0 < keep < 1:
        raise OptionError(f"the share to keep must be between 0 and 1 (both excluded), not {keep:g}")
    if isinstance(recipe, Mapping) and "sparsities" not in recipe and recipe.get("methods"):
        recipe = {**recipe, "sparsities": [*candidates(recipe["methods"][0])]}
    recipe = as_recipe(recipe)
    if len(recipe.methods) != 1:
        raise OptionError(f"a sweep is about one method, not {', '.join(recipe.methods)}")
    candidates(recipe.methods[0])  # refuses a pattern that has but one
    choices = sorted(recipe.sparsities)
    best = partial(_best, keep=keep, certain=certain)
    below, above, tried = -1, len(choices), dict[float, Tried]()
    while above - below > 1:
        middle = (below + above) // 2
        asked = tuple(sorted({*tried, choices[middle]}))
        further = math.ceil(math.log2(max(middle - below, above - middle)))
        wanted = dataclasses.replace(recipe, sparsities=asked)
        record = run(wanted, folder, data_dir=data_dir, stage=stage, best=best, coming=Coming(further))
        rows = rows_of(record)
        tried = {
            sparsity: _tried(sparsity, results, rows[0][1], keep, certain)
            for sparsity, (_, results) in zip(asked, rows[1:], strict=True)
        }
        below, above = (middle, above) if tried[choices[middle]].holds else (below, middle)
    places = {name: Path(folder) / CHECKPOINTS / name for name in recipe.cells()}
    found = best(record)
    for name, place in places.items():
        if name != found:  # of a sweep that kept another share
            let_go(place)
    if found is not None and not (places[found] / MANIFEST).exists():
        run(wanted, folder, data_dir=data_dir, stage=stage, best=best, coming=Coming(again=True))
    return [tried[sparsity] for sparsity in sorted(tried)]


TIE = 1e-9
"""Share of a limit by which rounding may move what meets it."""


def _best(record: Mapping[str, Any], keep: float, certain: bool) -> str | None:
    """Return the label of the highest sparsity that holds, of the rows that are measured so far."""
    (_, dense), *pruned = rows_of(record)
    check_decides(dense, keep, certain=certain)  # as soon as the dense model is measured
    sparsities = [row["sparsity"] for row in record["rows"][1:]]
    found = [
        (sparsity, label)
        for sparsity, (label, results) in zip(sparsities, pruned, strict=True)
        if _tried(sparsity, results, dense, keep, certain).holds
    ]
    return max(found)[1] if found else None


def _tried(
    sparsity: float, results: list[EvalResult], dense: list[EvalResult], keep: float, certain: bool
) -> Tried:
    check_decides(dense, keep, certain=certain)
    found, holds = [], True
    for own, whole in zip(results, dense, strict=True):
        difference = paired_difference(own, whole)
        decides = not own.description.get(ADDED) and not at_chance(whole)
        found.append((f"{own.task} ({own.metric}{'' if decides else ', decides nothing'})", difference))
        end = difference.difference
        if certain:
            end = difference.low if higher_is_better(own) else difference.high
        limit = worst_difference(whole, keep) if decides else 0.0
        slack = TIE * max(1.0, abs(limit))  # a share that is kept exactly holds
        holds &= not decides or (end >= limit - slack if higher_is_better(own) else end <= limit + slack)
    return Tried(sparsity, tuple(found), holds)


def check_decides(dense: Sequence[EvalResult], keep: float, *, certain: bool = False) -> None:
    """Raise `OptionError` for a dense model of which no share can be kept: it has nothing, or is at chance in all that decides.

    Or none can be kept for `certain`, by so few problems.
    """
    deciding = [own for own in dense if not (own.description.get(ADDED) or at_chance(own))]
    if not deciding:
        raise OptionError(
            "the dense model is at chance in all that decides, so that no share of it can be kept: measure a loss, as arc_challenge_nll"
        )
    for own in deciding:
        limit, n = abs(worst_difference(own, keep)), len(own.values)
        if certain and own.metric in BINARY and room(n) > limit:
            raise OptionError(
                f"{own.task}: {n} problems cannot show that {keep:g} is kept, even where nothing changes: measure about "
                f"{math.ceil(math.log(40) / -math.log1p(-limit)):,}, or leave out --certain"
            )


def worst_difference(dense: EvalResult, keep: float) -> float:
    """Return the difference to dense at which exactly the share `keep` of a result is left.

    Raises:
        OptionError: the dense model has nothing, or by a scorer a negative value, of which there is no share.
    """
    if dense.metric == "nats_per_token":
        return -math.log(keep)
    if headline(dense) < 0 or (higher_is_better(dense) and not headline(dense)):
        way = "measure what it can do" if dense.metric == "accuracy" else "add a constant in the scorer"
        raise OptionError(
            f"{dense.task}: the dense model has {headline(dense):.4g}, and a share to keep needs a value above zero: {way}"
        )
    return headline(dense) * (keep - 1 if higher_is_better(dense) else 1 / keep - 1)
