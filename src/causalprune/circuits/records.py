"""A circuit as a record and as a file."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalprune.circuits.curves import Curve, Point, Value
from causalprune.circuits.ranking import STABLE
from causalprune.core import CheckpointError, Example, Shown, Unit
from causalprune.evaluation import read_json, write_json

CIRCUIT = "circuit.json"
SPARSE = 0.8
"""Share of the units from which on nothing is sparse about a circuit."""
UNITS = ("score", "low", "high", "probability")
ELSEWHERE = ("versions", "git_commit", "model")
"""What is said of a circuit that may differ where it is found again; the model has a fingerprint."""


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Shown):
    """Units that carry a behaviour, the order that they come from, and how sure all of it is.

    `score` is what removing a unit costs in nats per target token (in logits for `relevance`) in the last round that scored
    it, with its interval over problems (`low`, `high`); `probability` is the share of resamples in which it is a member.
    `order` are the numbers of the `units` from the first member on, by score, or by score a weight where kinds are mixed, and
    by what was learned after that; `size` is how many of them are members. `problems` are those
    that sizes were measured on. `stability` is by share of the units (of the weights where kinds are mixed), `checks` and `tests` are
    empty until `circuits.examined` fills them.
    """

    units: tuple[Unit, ...]
    order: Int[Tensor, "unit"]
    size: int
    score: Float[Tensor, "unit"]
    low: Float[Tensor, "unit"]
    high: Float[Tensor, "unit"]
    probability: Float[Tensor, "unit"]
    weights: Float[Tensor, "unit"]
    curve: Curve
    chosen: Point
    stability: Mapping[str, Mapping[str, float]]
    problems: tuple[Example, ...]
    model_fingerprint: str
    description: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def members(self) -> tuple[Unit, ...]:
        """The units of the circuit, the first first."""
        return tuple(self.units[number] for number in self.order[: self.size].tolist())

    @cached_property
    def membership(self) -> dict[Unit, float]:
        """The probability of every unit to be a member, over resamples of the problems."""
        return dict(zip(self.units, self.probability.tolist(), strict=True))

    @property
    def share(self) -> float:
        """The share of the units that are members."""
        return self.size / len(self.units)

    @property
    def remarks(self) -> list[str]:
        """What has to be said of it before anything else."""
        found, curve = [], self.curve
        if self.chosen.share >= SPARSE:
            of = self.description.get("sizes_of", "units")
            found.append(f"nothing is sparse here: the circuit is {self.chosen.share:.0%} of the {of}")
        if min(own["over_chance"] for own in self.stability.values()) < STABLE:
            shown = ", ".join(
                f"{float(share):.0%}: {own['over_chance']:.2f}" for share, own in self.stability.items()
            )
            found.append(
                f"not stable: other draws of problems give other units (Jaccard over chance by size: {shown}; {STABLE} is wanted)"
            )
        # with counterfactuals the empty model answers the other prompt, as it is meant to
        meant = self.description["question"]["ablation"] == "counterfactual"
        if curve.empty.low <= 0 <= curve.empty.high:
            found.append(
                f"closing all units costs nothing that shows ({curve.empty.value:+.3g} nats per token): f says nothing"
            )
        elif curve.empty.high < 0:
            found.append(
                f"closing all units lowers the loss by {-curve.empty.value:.3g} nats per token: f, CPR and CMD are upside down; read the KL"
            )
        elif curve.intact.value + curve.empty.low > curve.guessing and not meant:
            found.append(
                f"f flatters: with no unit left the model is worse than a guess ({curve.intact.value + curve.empty.value:.3g} nats per token, "
                f"guessing {curve.guessing:.3g})"
            )
        return found

    def __repr__(self) -> str:
        kept = self.chosen.nats
        return (
            f"Circuit({self.size:,} of {len(self.units):,} units, {self.chosen.share:.1%}; {kept.value:+.3g} nats per token "
            f"[{kept.low:+.3g}, {kept.high:+.3g}]; CMD {self.curve.cmd.value:.3g}, CPR {self.curve.cpr.value:.3g})"
        )


def save_circuit(circuit: Circuit, path: Path) -> None:
    """Write a circuit as JSON; it appears whole or not at all."""
    numbers = {name: getattr(circuit, name).tolist() for name in (*UNITS, "weights", "order")}
    units = {name: [getattr(unit, name) for unit in circuit.units] for name in ("layer", "index", "kind")}
    record = {
        "circuit": {"units": len(circuit.units), "size": circuit.size, "remarks": circuit.remarks},
        "model_fingerprint": circuit.model_fingerprint,
        "description": circuit.description,
        "chosen": dataclasses.asdict(circuit.chosen),
        "curve": dataclasses.asdict(circuit.curve),
        "stability": circuit.stability,
        "checks": circuit.checks,
        "tests": circuit.tests,
        "problems": [dataclasses.asdict(example) for example in circuit.problems],
        "units": units | numbers,
    }
    write_json(path, record)


def carried(circuit: Circuit, path: Path) -> Circuit | None:
    """Return a circuit with what a file says of it beside, checks and tests too; None where the file has none, or another."""
    try:
        old = load_circuit(path)
    except CheckpointError:
        return None
    said, now = old.description, json.loads(json.dumps(circuit.description))
    both = said.keys() & now.keys() - {*ELSEWHERE}
    first, second = (
        (own.model_fingerprint, own.units, own.size, own.order.tolist()) for own in (old, circuit)
    )
    if first != second or any(said[key] != now[key] for key in both):
        return None
    checks, tests = circuit.checks or old.checks, circuit.tests or old.tests
    return dataclasses.replace(circuit, description=said | circuit.description, checks=checks, tests=tests)


def load_circuit(path: Path | str) -> Circuit:
    """Return the circuit in a `circuit.json`, or in the folder that has one.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    path = Path(path)
    try:
        record = read_json(path / CIRCUIT if path.is_dir() else path)
        units, curve = record["units"], record["curve"]
        known: dict[str, Any] = {
            name: torch.tensor(units[name], dtype=torch.float64) for name in (*UNITS, "weights")
        }
        known |= {
            name: record[name]
            for name in ("stability", "model_fingerprint", "description", "checks", "tests")
        }
        ends = {name: Value(**curve[name]) for name in ("cpr", "cmd", "intact", "empty")}
        return Circuit(
            units=tuple(
                Unit(*own) for own in zip(units["layer"], units["index"], units["kind"], strict=True)
            ),
            order=torch.tensor(units["order"]),
            size=record["circuit"]["size"],
            curve=Curve(tuple(map(_point, curve["points"])), **ends, guessing=curve["guessing"]),
            chosen=_point(record["chosen"]),
            problems=tuple(map(_example, record["problems"])),
            **known,
        )
    except (CheckpointError, KeyError, TypeError, ValueError) as cause:
        raise CheckpointError(
            f"{path} is no circuit of `causalprune circuit`, or damaged: name the folder of one, or find it again ({cause})"
        ) from cause


def _point(own: Mapping[str, Any]) -> Point:
    return Point(
        own["share"],
        own["units"],
        own["weights"],
        *(Value(**own[name]) for name in ("nats", "kl", "faithfulness")),
    )


def _example(own: Mapping[str, Any]) -> Example:
    listed = {name: own[name] and tuple(own[name]) for name in ("tokens", "mask", "counterfactual")}
    return Example(**{**own, **listed, "instead": own["instead"] and _example(own["instead"])})
