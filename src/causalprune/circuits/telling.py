"""What is to be said of a circuit, in sentences."""

from typing import Any

from causalprune.circuits.records import Circuit


def sentences(found: Circuit) -> list[str]:
    """Return in sentences what the checks and the tests of a circuit say."""
    said = [f"{unit}: {share}" for unit, share in _sure(found)]
    if own := found.checks.get("necessity"):
        said.append(
            f"necessity: without the first {own['share']:.0%} of the {found.description['sizes_of']} ({own['units']:,} units) "
            f"{_record(own['nats'])} nats; without random ones of the same kinds and layers {_record(own['random_nats'])}"
        )
    if (own := found.checks.get("controls")) and own["count"]:
        said.append(
            f"controls: the circuit costs {own['nats']:+.3g} nats, the middle of {own['count']} random ones of its size "
            f"{own['random_nats'][1]:+.3g}; {own['worse']:.0%} of them are worse"
        )
    if own := found.checks.get("completeness"):
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
        ("members", f"{found.size:,}, {certain:,} units are members in 95 % of the draws"),
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
        return f"{own['outside']} units outside of the circuit are too few to tell"
    extra = f", {len(own['spare'])} of {own['tested']}" if name == "minimality" and own["spare"] else ""
    return f"{holds[0] if own['holds'] else holds[1]}{extra} (p = {own['p']:.2g})"


def _record(own: dict[str, float]) -> str:
    return f"{own['value']:+.3g} [{own['low']:+.3g}, {own['high']:+.3g}]"
