"""`correct`: halves, search, zeros, update, and what all of it is measured to do."""

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from causalprune.attribution import Question, planned
from causalprune.calibration import check_positions
from causalprune.checkpoints import round_as_written, was_pruned
from causalprune.circuits import Behaviour, check_apart
from causalprune.core import (
    Calibration,
    DataError,
    Decoder,
    Ledger,
    Masks,
    ModelError,
    OptionError,
    Stage,
    State,
    bars,
    free_bytes,
    say,
)
from causalprune.correction.candidates import Candidates, Chosen, Units, Weights
from causalprune.correction.evidence import Looking
from causalprune.correction.measuring import Trials, named, per_sample
from causalprune.correction.records import Contrast, Corrected, Point
from causalprune.correction.samples import Given, Half, halves
from causalprune.correction.scores import ACTIVE
from causalprune.correction.search import Search
from causalprune.interventions import Site, check_ruled, grouped_by_effect, list_units
from causalprune.models import fingerprint
from causalprune.pruning import Repair, check_dtypes, remove

LEDGER, SCORES, UPDATE = "correction.ledger", "scores", "update"
MEASURED = ("units", "weights", "damp", "max_batch_tokens")
"""What measured values depend on, beside model and samples: with another budget, harm or score the same ones serve."""
TABLES = 9
"""Numbers that are held for every single weight, with two sources to preserve."""
SLOPES = ("estimator", "draws", "seed")
"""What slopes depend on beside that."""


def correct(
    decoder: Decoder,
    undesired: Given,
    preserve: Given,
    contrast: Contrast = Contrast(),
    *,
    kept_in: Path | str | None = None,
    stage: Stage | None = None,
) -> Corrected:
    """Take out of a model, in place, what carries undesired samples and little of what is to be preserved.

    Half of the samples of each source chooses what goes, by slopes; the other half decides how much of it, by what is measured
    without it. Targets of undesired samples are the tokens that should not be; where the sample has `instead`, they are compared
    with that. Samples are examples, or a `Calibration` in two subsets, the first of which chooses. Costs for each round about 3 passes
    over the choosing half's undesired samples (15 for `integrated`) and 5 over its others, and about 3 over the deciding half, 6 in
    the first; where the first candidate alone does too much harm in the last round, up to 8 and those once more.
    What is finished is kept in the folder `kept_in`, where the same call goes on; the caller removes it (`core.forget`).

    Raises:
        DataError: a set is empty, has no targets, or shares a sample with the other.
        OptionError: the budget is no number of units, or all that could go does more harm than is allowed, or no good.
        ModelError: values are not finite, or zeros in the weights do more harm than closing was measured to do.
        MismatchError: `kept_in` is of another model, other data or other options.
    """
    check_contrast(decoder, contrast)
    chooses, decides = halves(undesired, preserve, decoder.tokenizer)
    _check(decoder, (chooses, decides), contrast)
    candidates = candidates_of(decoder, chooses, contrast)
    most = contrast.number(candidates.count)
    model, folder = fingerprint(decoder.model), None if kept_in is None else Path(kept_in)
    told = {"chooses": chooses.described(), "decides": decides.described()}
    identity = {"model": model, "halves": told, **{key: getattr(contrast, key) for key in MEASURED}}
    slopes = [identity, *(getattr(contrast, key) for key in SLOPES)]
    place, stage = hashlib.sha256(repr(slopes).encode()).hexdigest()[:8], stage or bars
    with _ledger(folder, identity) as book:
        state = State(folder and folder / f"{SCORES}-{place}", slopes)
        trials = Trials(decoder, decides, contrast.max_batch_tokens, book)
        looking = Looking(candidates, chooses, contrast.how(), state)
        search = Search(candidates, looking, trials, contrast, most, stage)
        chosen, point = search.run()
        trials.prepare()
        keep, repair = _united(decoder, candidates.keep(chosen)), None
        if contrast.update != "none":
            data = Calibration(chooses.preserve, (0,) * len(chooses.preserve))
            repair = Repair(data, contrast.update, contrast.seed, contrast.max_batch_tokens)
        which = f"{contrast.update}-{contrast.seed if repair else 0}-{named(chosen)}"
        redo = State(folder and folder / f"{UPDATE}-{which}", [identity, which])
        _take_out(candidates, chosen, keep, repair, redo, stage)
        round_as_written(decoder)
        with stage("after") as tell:
            say(tell, unit="tokens")
            now = trials.now(f"after-{which}", tell)
            after = search.of(now, chosen, point.round, point.predicted)
    pairs = per_sample(decoder, decides, search.intact), per_sample(decoder, decides, now)
    _check_written(decoder, contrast, after)
    members = tuple(candidates.units[n] for n in chosen.tolist()) if isinstance(candidates, Units) else ()
    each = {(own.count, own.benefit.value): own for own in search.curve}  # rounds may come to the same set
    curve = tuple(sorted(each.values(), key=lambda own: own.count))
    point = each[point.count, point.benefit.value]
    return Corrected(contrast, keep, point, after, curve, members, candidates.count, told, model, pairs)


def check_contrast(decoder: Decoder, contrast: Contrast) -> None:
    """Raise a `CausalPruneError` for what cannot be done to a model, whatever the samples are.

    Raises:
        ModelError: it is not all in memory, has parts that relevance has no rule for, or too many weights to be looked at one by one.
        OptionError: it does not have the units, or the budget is no number of them.
    """
    if decoder.offloaded:
        raise ModelError(f"{decoder.name} is not all in memory, and has to be while its parts are closed")
    if contrast.update == "distill":
        check_dtypes(decoder)
    check_parts(decoder, contrast)


def check_parts(decoder: Decoder, contrast: Contrast) -> None:
    """Raise as `check_contrast` does for parts that a model does not have, weights or none."""
    if contrast.estimator == "relevance":
        check_ruled(decoder)
    if contrast.weights:
        count = sum(p.size for p in decoder.projections)
        takes, free = TABLES * 4 * count, free_bytes(torch.device("cpu"))
        if takes > free:
            raise ModelError(
                f"what {count:,} single weights are worth takes about {takes / 2**30:.0f} GiB, and {free / 2**30:.0f} are free: ask "
                "for units, such as neurons:1"
            )
        contrast.number(count)
    elif not grouped_by_effect(contrast.units):  # else what the groups are depends on samples
        units = list_units(decoder, contrast.units)
        check_apart(units, contrast.units)
        contrast.number(len(units))
        _check_active(contrast, {site for parts in units.values() for site in parts})


def _check(decoder: Decoder, sides: tuple[Half, Half], contrast: Contrast) -> None:
    for half in sides:
        check_positions(decoder, [*half.sequences, *half.preserve])
    if contrast.certain and (single := [s for s, n in sides[1].described()["preserve"].items() if n < 2]):
        raise DataError(
            f"{single[0]} has one sample in the deciding half, so its harm has no interval: give more of it"
        )


def candidates_of(decoder: Decoder, chooses: Half, contrast: Contrast) -> Candidates:
    """Return what may be taken out: single weights, or units, which need samples where they are grouped by effect."""
    if contrast.weights:
        return Weights(decoder, contrast.damp)
    bare = Calibration(chooses.undesired, (0,) * len(chooses.undesired))
    units = Units(
        Behaviour(
            decoder, chooses.undesired, planned(decoder, bare, Question(contrast.units), contrast.how())
        ),
        contrast.damp,
    )
    check_apart(units.of.plan.units, contrast.units)
    _check_active(contrast, units.of.places)
    return units


def _check_active(contrast: Contrast, places: Iterable[Site]) -> None:
    if contrast.score in ACTIVE and any(site.place == "experts" for site in places):
        raise OptionError(
            f"{contrast.score!r} looks at what units send, and experts are routed: leave them out"
        )


def _ledger(folder: Path | None, identity: dict[str, Any]) -> AbstractContextManager[Ledger | None]:
    return nullcontext() if folder is None else Ledger(folder / LEDGER, identity, whole=str(folder))


def _take_out(
    candidates: Candidates, chosen: Chosen, keep: Masks, repair: Repair | None, state: State, stage: Stage
) -> None:
    """Take candidates out of the model, and let what stays make up for them."""
    if repair is None:
        candidates.write(chosen)
        return
    with stage("update") as tell:
        remove(candidates.decoder, keep, repair, tell, state, partial(candidates.still, chosen))


def _check_written(decoder: Decoder, contrast: Contrast, after: Point) -> None:
    """Raise `ModelError` where zeros do more harm than closed gates may, by more than rounding."""
    harm, rounding = after.worst(certain=contrast.certain), torch.finfo(decoder.model.dtype).eps ** 0.5
    if contrast.update == "none" and not contrast.damp and not harm <= contrast.limit_nats + rounding:
        raise ModelError(
            f"zeros in the weights of {decoder.name} do more harm ({harm:.3g} nats) than closing the same units did, within "
            f"{contrast.limit_nats:.3g}: take other units, or leave a part of them (--damp)"
        )


def _united(decoder: Decoder, keep: Masks) -> Masks:
    """Return what stays of a model that may have been pruned before, whose zeros stay."""
    zeros_stay, found = was_pruned(decoder), Masks()
    for p in decoder.projections:
        found.add(p.name, keep[p.name] & (p.read() != 0) if zeros_stay(p) else keep[p.name])
    return found
