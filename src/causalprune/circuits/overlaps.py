"""What circuits share, and what the removal of each does to the behaviours of the others."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from causalprune.circuits.behaviour import Trials, behaviour
from causalprune.circuits.checking import asked, others_like
from causalprune.circuits.curves import Value, summed_up
from causalprune.circuits.ranking import by_chance, over_chance, prefix
from causalprune.circuits.records import Circuit
from causalprune.core import Decoder, Ledger, MismatchError, OptionError, Stage, bars, say

OVERLAP = "overlap.json"
RANDOM = 5
"""Random sets that are removed beside each circuit's."""
SHARE = 0.1


@dataclass(frozen=True)
class Overlap:
    """Circuits side by side.

    `shared[i][j]` counts units that are members of both, `jaccard` and `over_chance` (corrected for chance) follow from it.
    `removal[i][j]` is what the removal of the first `removed` units of circuit i does to the behaviour of j, in nats per target
    token with its interval, `random[i][j]` the same for random units that are `alike`, None where there are no others; empty
    without a model.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    jaccard: tuple[tuple[float, ...], ...]
    over_chance: tuple[tuple[float, ...], ...]
    removed: tuple[int, ...] = ()
    removal: tuple[tuple[Value, ...], ...] = ()
    random: tuple[tuple[Value | None, ...], ...] = ()
    description: dict[str, Any] = field(default_factory=dict)


def overlap(
    circuits: Sequence[Circuit] | Mapping[str, Circuit],
    decoder: Decoder | None = None,
    *,
    remove: int | None = None,
    folder: Path | str | None = None,
    stage: Stage | None = None,
) -> Overlap:
    """Compare circuits of one model: the units that they share and, with the model, what each one's removal does to all behaviours.

    `remove` is how many of the first units of each go, the same number for all (without, a tenth of the units). What is
    measured is kept in `folder`. Means that take the place of what is removed are over the problems of the behaviour.

    Raises:
        MismatchError: the circuits are of different models, of different units, or not of this model.
        OptionError: there are fewer than two, or fewer units than are to be removed.
    """
    if isinstance(circuits, Circuit):  # which is refused as one
        circuits = [circuits]
    named = (
        dict(circuits)
        if isinstance(circuits, Mapping)
        else {str(i + 1): own for i, own in enumerate(circuits)}
    )
    every = list(named.values())
    check_overlap(named, remove)
    if decoder is not None and decoder.fingerprint != every[0].model_fingerprint:
        raise MismatchError(
            f"{next(iter(named))} is a circuit of another model than {decoder.name}: load the one that it was found in"
        )
    members = [set(own.members) for own in every]
    shared = [[len(a & b) for b in members] for a in members]
    jaccard = [
        [both / len(a | b) for both, b in zip(row, members, strict=True)]
        for row, a in zip(shared, members, strict=True)
    ]
    corrected = [
        [over_chance(value, by_chance(a.share, b.share)) for value, b in zip(row, every, strict=True)]
        for row, a in zip(jaccard, every, strict=True)
    ]
    found = Overlap(
        tuple(named), tuple(own.size for own in every), _frozen(shared), _frozen(jaccard), _frozen(corrected)
    )
    if decoder is None:
        return found
    return _removed(found, named, decoder, remove, folder, stage or bars)


def _frozen(rows: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in rows)


def check_overlap(named: Mapping[str, Circuit], remove: int | None = None) -> None:
    """Raise a `CausalPruneError` for circuits that cannot be compared, or more units to remove than there are."""
    if len(named) < 2:
        raise OptionError("an overlap is one of at least two circuits: name another")
    (first, one), *others = named.items()
    for name, own in others:
        if own.model_fingerprint != one.model_fingerprint:
            models = [str(circuit.description.get("model")) for circuit in (one, own)]
            raise MismatchError(
                f"{first} and {name} are circuits of different models ({' and '.join(models)}): compare those of one"
            )
        if own.units != one.units:
            raise MismatchError(
                f"{first} and {name} are circuits of different units: find them among the same"
            )
    if remove is not None and not 0 < remove < len(one.units):
        raise OptionError(
            f"{remove:,} of {len(one.units):,} units cannot be removed as a circuit: ask for at least 1, and fewer than all (--remove)"
        )


def _removed(
    found: Overlap,
    named: Mapping[str, Circuit],
    decoder: Decoder,
    remove: int | None,
    folder: Path | str | None,
    stage: Stage,
) -> Overlap:
    """Measure every removal on every behaviour."""
    every = list(named.values())
    mixed = len({unit.kind for unit in every[0].units}) > 1
    sets, counts = [], []
    for own in every:
        sizes = own.weights if mixed else torch.ones_like(own.weights)
        counts.append(remove or prefix(own.order, sizes, SHARE))
        first = torch.zeros(len(own.units), dtype=torch.bool)
        first[own.order[: counts[-1]]] = True
        generator = torch.Generator().manual_seed(0)  # whichever circuits are beside it
        sets.append([first, *others_like(own.units, first, generator, RANDOM)])
    behaviours = {name: behaviour(decoder, own.problems, *asked(own)) for name, own in named.items()}
    removal, random = [], []
    outs = [out for own in sets for out in own]
    with _book(folder, decoder) as book:
        for name, of in behaviours.items():
            with stage(f"removal from {name}") as tell:
                say(tell, unit="tokens")
                nats = Trials(of, book, tell).nats([torch.ones_like(outs[0]), *(~out for out in outs)])
            rises = (nats[1:] - nats[0]).split([len(own) for own in sets])
            removal.append([summed_up(own[0]) for own in rises])
            random.append([summed_up(own[1:].mean(0)) if len(own) > 1 else None for own in rises])
    columns = [tuple(zip(*rows, strict=True)) for rows in (removal, random)]
    how = {
        "removed_of": "weights" if mixed else "units",
        "model": decoder.name,
        "questions": [asdict(asked(own)[0]) for own in every],
    }
    return replace(found, removed=tuple(counts), removal=columns[0], random=columns[1], description=how)


def _book(folder: Path | str | None, decoder: Decoder) -> AbstractContextManager[Ledger | None]:
    """Return a context with the ledger of a model's removals, each of which has the name of its behaviour."""
    own = {"model": decoder.fingerprint}
    return nullcontext() if folder is None else Ledger(Path(folder) / "overlap.ledger", own)
