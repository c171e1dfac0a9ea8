"""What is to be said of a circuit, in sentences."""

import math
from typing import Any

from causalprune.circuits.checking import alike
from causalprune.circuits.records import Circuit

NONE = "there is no other set of these kinds and layers"


def sentences(found: Circuit) -> list[str]:
    """Return in sentences what the checks and the tests of a circuit say."""
    said = [f"{unit}: {share}" for unit, share in _sure(found)]
    if own := found.checks.get("necessity"):
        pooled = None in {layer for layer, _ in alike(found.units)}
        same = f"the same kinds {'(and layers, where one has several)' if pooled else 'and layers'}"
        first = "unit" if own["units"] == 1 else f"{own['units']:,} units"
        other = f"without random ones of {same} {_record(own['random_nats'])}" if own["random_nats"] else NONE
        said.append(
            f"necessity: without the first {first}, {own['share']:.1%} of the {found.description['sizes_of']}, {_record(own['nats'])} nats; {other}"
        )
    own = found.checks.get("controls", {})
    if own.get("count"):
        worse = "worse" if found.description["rank"] == "signed" else "further from the model"
        said.append(
            f"controls: the circuit costs {own['nats']:+.3g} nats, the middle of {own['count']} random ones of its size "
            f"{own['random_nats'][1]:+.3g}; {own['worse']:.0%} of them are {worse}"
        )
    elif own.get("asked"):
        said.append(f"controls: {NONE}")
    own = found.checks.get("completeness")
    if own and not math.isfinite(own["random_mean"]):
        said.append("completeness: there is no f, as closing all units changes nothing")
    elif own:
        said.append(
            f"completeness: |f(C∖K) − f(M∖K)| is {own['random_mean']:.2g} for random K (at most {own['random_max']:.2g}), "
            f"{own['greedy']:.2g} for the worst that was looked for"
        )
    return said + [
        f"{name.replace('_', ' ')}: {_verdict(name, own)}" for name, own in found.tests.items() if name != "q"
    ]


def _sure(found: Circuit) -> list[tuple[str, str]]:
    certain = int((found.probability >= 0.95).sum())
    stable = ", ".join(
        f"{float(share):.0%}: {own['over_chance']:.2f}" for share, own in found.stability.items()
    )
    return [
        ("members", f"{found.size:,}; units that are members in 95 % of the draws: {certain:,}"),
        ("Jaccard over chance between draws, by size", stable),
    ]


def _verdict(name: str, own: dict[str, Any]) -> str:
    """Return a test in words."""
    holds = {
        "sufficiency": (
            "nearer to the model than 90 % of random circuits",
            "not shown to be nearer than 90 % of random circuits",
        ),
        "partial_necessity": (
            "its removal does more than that of 90 % of random circuits",
            "not shown that its removal does more",
        ),
        "equivalence": ("no difference shown to the model", "not the model: one of both is ahead too often"),
        "independence": (
            "what is left knows nothing of the task, as far as can be told",
            "what is left still knows of the task",
        ),
        "minimality": (
            "every member does more than a random unit",
            "not shown of every member that it does more than a random unit",
        ),
    }[name]
    if "outside" in own:
        return f"too few units outside of the circuit to tell: {own['outside']}"
    if "beaten" in own and not own["of"]:
        return NONE
    extra = f", {len(own['spare'])} of {own['tested']}" if name == "minimality" and own["spare"] else ""
    return f"{holds[0] if own['holds'] else holds[1]}{extra} (p = {own['p']:.2g})"


def _record(own: dict[str, float]) -> str:
    return f"{own['value']:+.3g} [{own['low']:+.3g}, {own['high']:+.3g}]"
