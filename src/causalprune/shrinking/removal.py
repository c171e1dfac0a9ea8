"""Which units go for good, and what the others do to make up for them: a smaller and faster standard model."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from causalprune.checkpoints import portable
from causalprune.core import Calibration, Decoder, ModelError, OptionError, Shown, Stage, State, bars, say
from causalprune.models import fingerprint
from causalprune.pruning import (
    RULES,
    TRAINS,
    UPDATES,
    Lesson,
    Method,
    Repair,
    Training,
    Update,
    check_dtypes,
    distill,
    epochs,
    lessons,
    remove,
)
from causalprune.shrinking.competing import Budget, Offers, check_budget, competed
from causalprune.shrinking.structure import Kept, column_keep, silence, smaller
from causalprune.shrinking.together import parts_of, staying, step_of, worthiest
from causalprune.shrinking.worth import KINDS, Kind, Scores, Shrinking, sizes_of, worth_of, worths_of

LOOKING = {"effect": 5.0, "activation": 1.0}
"""Passes of all examples that it takes, about, to know what units are worth."""
WORTH, GIVES = "what units are worth", "what each kind gives"
"""Stages where kinds compete."""


@dataclass(frozen=True)
class Shares:
    """The share of units of every kind that goes, 0 … 1."""

    neurons: float = 0.0
    kv_groups: float = 0.0
    experts: float = 0.0
    layers: float = 0.0

    def __post_init__(self) -> None:
        for kind, share in asdict(self).items():
            if not 0 <= share < 1:
                raise OptionError(
                    f"the share of {kind} that goes must be at least 0 and below 1, not {share}"
                )
        if not any(asdict(self).values()):
            raise OptionError(
                "nothing to remove: name a share of parameters, neurons, KV groups, experts or layers"
            )


@dataclass(frozen=True, eq=False, repr=False)
class Shrunk(Shown):
    """A smaller model, what it kept and how that was updated, and its number of parameters before and after.

    `unrouted` names experts that no token reached where their worth was measured: it is unknown, so they stay before others.
    `options` say how units were chosen on the `calibration`. It has no masks, nor effects that are kept.
    """

    decoder: Decoder
    kept: Kept
    update: Update
    parameters_before: int
    parameters_after: int
    unrouted: tuple[str, ...]
    calibration: Calibration
    options: dict[str, Any]
    keep: None = None
    effects: None = None

    def record(self) -> dict[str, Any]:
        """Return what the manifest of a smaller model says: what stayed, and how that was chosen."""
        kept = _listed({kind: getattr(self.kept, kind) for kind in KINDS})
        sizes = {"parameters_before": self.parameters_before, "parameters_after": self.parameters_after}
        data = {**self.calibration.description, "fingerprint": self.calibration.fingerprint}
        own = self.decoder.model.config.get_text_config(decoder=True).model_type
        how = {
            "update": self.update,
            "model_type": own,
            **sizes,
            "unrouted": list(self.unrouted),
            "kept": kept,
        }
        return {"shrink": {**self.options, **how}, "calibration": data}

    def __repr__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        sizes = f"{before:,} parameters before, {after:,} after ({1 - after / before:.1%} fewer)"
        return f"Shrunk({sizes}; what stays updated by {self.update}; the model is .decoder)"


def looks(shares: Shares | Budget, how: Shrinking) -> bool:
    """Tell whether examples make a difference: weights alone say what is worth least, and nothing else is changed."""
    return isinstance(shares, Budget) or how.by in LOOKING or how.update != "none"


def shrink(
    decoder: Decoder,
    shares: Shares | Budget | float,
    calibration: Calibration,
    how: Shrinking = Shrinking(),
    *,
    ledger: Path | str | None = None,
    stage: Stage | None = None,
    **changes: Any,
) -> Shrunk:
    """Return a smaller model without the units that matter least, the others updated to make up for them.

    `shares` may be a `Budget`, or the share of all parameters that goes, 0 … 1: kinds of units compete for it, each giving as
    much as lowers the measured divergence from the intact model. All layers lose equally many units of a kind. `changes` are
    fields of `Shrinking`. The calibration may be empty where nothing `looks` at it. Where only experts go, nothing but training makes up for them. The
    decoder that is given is changed on the way. Effects that were measured, layers that were updated and training are kept in
    the `leftovers` of a path, so that a stopped run goes on. Where no `stage` is given, every stage of the work has a bar
    (`quiet`: none has).

    Raises:
        OptionError: a kind the model does not have, a share too small to remove one unit, a budget that cannot be met, or
            weights that cannot be trained.
        ModelError: the architecture cannot lose units of a kind, or some of the model is not in memory.
    """
    how, stage = replace(how, **changes), stage or bars
    wanted = shares if isinstance(shares, Shares | Budget) else Budget(parameters=shares)
    if decoder.offloaded:
        raise ModelError(
            f"{decoder.name} is not all in memory, which shrinking needs: leave out --device-map"
        )
    if how.update in TRAINS:
        check_dtypes(decoder)
    given, before = decoder, sum(p.numel() for p in decoder.model.parameters())
    update, path = next(own for own in UPDATES if own == how.update), None if ledger is None else Path(ledger)
    if isinstance(wanted, Budget):
        chosen, unrouted, told = _competed(decoder, wanted, calibration, how, ledger=path, stage=stage)
    else:
        chosen, unrouted, told = _chosen(decoder, wanted, calibration, how, ledger=path, stage=stage)
    identity = [fingerprint(decoder.model), _listed(chosen), calibration.fingerprint, asdict(how)]
    state = State(leftovers(path)["update"] if path else None, identity)
    followed = _followed(decoder, calibration, how, state, stage)
    if "experts" in chosen:
        decoder = smaller(decoder, Kept(experts=chosen["experts"]))
    if update not in TRAINS and not {"neurons", "kv_groups"} & chosen.keys():  # no matrix lost anything
        update = "none"
    kept = Kept(**{**chosen, "experts": {}})
    with stage("updating what stays") as progress:
        silence(decoder, kept)
        repair = Repair(calibration, "refit" if update in TRAINS else update, how.seed, how.max_batch_tokens)
        remove(decoder, column_keep(decoder, kept), repair, progress, state)
    found = replace(smaller(decoder, kept), fingerprint=given.fingerprint)  # that of its base, as pruned ones
    if update in TRAINS:
        with stage("training what stays") as progress:
            say(progress, unit="steps")
            training = Training(RULES[update], how.seed)
            distill(found, followed, how=training, on_step=progress, state=state)
    after = sum(p.numel() for p in found.model.parameters())
    kept = replace(kept, experts=chosen.get("experts", {}))
    options = {"by": how.by, "seed": how.seed, **told}
    return Shrunk(found, kept, update, before, after, unrouted, calibration, options)


def _followed(
    decoder: Decoder, calibration: Calibration, how: Shrinking, state: State, stage: Stage
) -> Sequence[Lesson]:
    """Return what training will follow, where there is any, from the whole model."""
    if how.update not in TRAINS:
        return []
    with stage("what training follows") as progress:
        say(progress, unit="batches")
        return lessons(decoder, calibration.examples, how.max_batch_tokens, state, progress)


def _listed(kept: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the indices that stay, by kind and layer, as JSON takes them."""
    return {
        kind: [*own] if isinstance(own, tuple) else {str(i): index.tolist() for i, index in own.items()}
        for kind, own in kept.items()
        if own
    }


def leftovers(path: Path) -> dict[str, Path]:
    """Return where is kept what units are worth, of a kind or of all `units`, what is `left` of each, and the `update` of what stays."""
    return {what: path.with_name(f"{path.name}.{what}") for what in (*KINDS, "units", "left", "update")}


def _chosen(
    decoder: Decoder,
    shares: Shares,
    calibration: Calibration,
    how: Shrinking,
    *,
    ledger: Path | None,
    stage: Stage,
) -> tuple[dict[Kind, Any], tuple[str, ...], dict[str, Any]]:
    """Return the indices that stay of every kind that loses some, the experts that no token reached, and what the record says.

    What cannot be is refused before anything is measured.
    """
    wanted = {kind: share for kind in KINDS if (share := asdict(shares)[kind])}
    some = {kind: {i: torch.zeros(n) for i, n in sizes_of(decoder, kind).items()} for kind in wanted}
    smaller(
        decoder, Kept(**{kind: _kept(decoder, kind, some[kind], share) for kind, share in wanted.items()})
    )
    _warn_of_files(decoder, wanted)
    worths: dict[Kind, Scores] = {}
    for kind in wanted:
        with stage(_worth_of(kind)) as progress:
            if not worths:
                say(progress, jobs=shrink_jobs(decoder, shares, calibration, how))
            path = None if ledger is None else leftovers(ledger)[kind]
            worths[kind] = worth_of(decoder, kind, calibration, how, progress, path)
    chosen: dict[Kind, Any] = {
        kind: _kept(decoder, kind, worths[kind], share) for kind, share in wanted.items()
    }
    return chosen, _unrouted(worths), {"shares": asdict(shares)}


def _warn_of_files(decoder: Decoder, kinds: Iterable[Kind]) -> None:
    """Warn of kinds of units without some of which llama.cpp is not known to run the architecture."""
    own = decoder.model.config.get_text_config(decoder=True).model_type
    why = {
        "kv_groups": f"was not found to run a {own} with fewer KV groups",
        "layers": f"treats layers of a {own} by their numbers",
    }
    for kind in kinds:
        if not portable(own, kind):
            warnings.warn(
                f"llama.cpp {why[kind]}, though transformers runs what is left: for a file, take others away (--neurons)",
                stacklevel=3,
            )


def _competed(
    decoder: Decoder,
    budget: Budget,
    calibration: Calibration,
    how: Shrinking,
    *,
    ledger: Path | None,
    stage: Stage,
) -> tuple[dict[Kind, Any], tuple[str, ...], dict[str, Any]]:
    """Return what `_chosen` does, of the kinds that compete for a budget; the record has what was tried."""
    kinds = [
        kind for kind in KINDS if (kind, how.by) != ("layers", "activation")
    ]  # nobody knows what those are worth
    offers = Offers(decoder, budget, kinds)
    with stage(WORTH) as progress:
        say(progress, jobs=shrink_jobs(decoder, budget, calibration, how))
        check_budget(offers)
        path = None if ledger is None else leftovers(ledger)["units"]
        worths = worths_of(decoder, list(offers.sizes), calibration, how, progress, path)
    over, offers = offers.over, Offers(decoder, budget, tuple(offers.sizes), worths)
    with stage(GIVES) as progress:
        identity = [fingerprint(decoder.model), calibration.fingerprint, asdict(how), asdict(budget)]
        state = State(leftovers(ledger)["left"] if ledger else None, identity)
        if "left" not in state.values:
            left, tried = competed(offers, calibration, progress)
            state.keep(left=left, tried=tried)
        left, tried = state.values["left"], state.values["tried"]
    _warn_of_files(decoder, left)
    kept = vars(offers.kept(left))
    shares = {kind: 1 - left.get(kind, n) / n for kind, n in offers.sizes.items()}
    told = {
        "budget": budget.named,
        "shares": dict.fromkeys(KINDS, 0.0) | shares,
        "tried": tried,
        "not_tried": over | offers.over,
    }
    return {kind: kept[kind] for kind in left}, _unrouted(worths), told


def _unrouted(worths: Mapping[Kind, Scores]) -> tuple[str, ...]:
    """Return the names of the experts whose worth is not known."""
    return tuple(
        f"layers.{layer}.experts.{i}"
        for layer, own in worths.get("experts", {}).items()
        for i in own.isnan().nonzero()[:, 0].tolist()
    )


def _worth_of(kind: str) -> str:
    return f"what {kind.replace('_', ' ')} are worth"


def shrink_jobs(
    decoder: Decoder, wanted: Shares | Budget, calibration: Calibration, how: Shrinking
) -> dict[str, float]:
    """Return the stages of `shrink` in their order, with what they cost in passes of all examples."""
    trains = how.update in TRAINS
    method = Method("magnitude", 0.5, update="refit" if trains else how.update)  # whatever the share
    n, tokens = max(len(calibration.examples), 1), sum(len(e.tokens) for e in calibration.examples)
    if isinstance(wanted, Budget):
        found = {WORTH: LOOKING.get(how.by, 0.001), GIVES: 1.0}
    else:
        kinds = [kind for kind, share in asdict(wanted).items() if share]
        found = {_worth_of(kind): LOOKING.get(how.by, 0.001) for kind in kinds}
    found |= {"what training follows": 1.0} if trains else {}
    found["updating what stays"] = method.passes(len(decoder.layers), n, tokens)
    return found | ({"training what stays": 3.0 * epochs(tokens)} if trains else {})


def _kept(decoder: Decoder, kind: Kind, worth: Scores, share: float) -> Any:
    """Return the indices that stay: in every layer, or of the layers."""
    if kind == "layers":
        every = torch.cat([worth[i] for i in sorted(worth)])
        return tuple(worthiest(every, _left(len(every), kind, share, 1)).tolist())
    parts = parts_of(decoder, kind)
    each = {layer: (own, _left(len(own), kind, share, parts)) for layer, own in worth.items()}
    return staying(decoder, kind, each)


def _left(n: int, kind: Kind, share: float, parts: int) -> int:
    """Return how many of `n` units stay without a share of them."""
    step = step_of(kind, n, parts)
    left = max(round(n * (1 - share) / step) * step, step)
    if n <= step:
        raise OptionError(f"too few {kind.replace('_', ' ')}: of {n} none can go, so leave that share out")
    if left == n:
        raise OptionError(
            f"a share of {share:g} of {n} {kind.replace('_', ' ')} is less than one step of {step}: "
            f"ask for {step / n:.2g} or more, or leave it out"
        )
    return left
