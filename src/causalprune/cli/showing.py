"""Circuits and their overlaps as tables and sentences."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from causalprune.circuits import Circuit, Overlap


def costs(stages: Sequence[tuple[str, int, float]]) -> Table:
    """Return what a search costs, stage by stage, in forward passes over problems (a backward pass is two)."""
    table = Table(caption="a backward pass counts as two forward ones; a search often ends earlier")
    for name in ("stage", "problems", "passes over each", "problems × passes"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, problems, passes in stages:
        known = math.isfinite(passes)
        cells = (f"{passes:,.0f}", f"{problems * passes:,.0f}") if known else ("one a unit", "–")
        table.add_row(name, f"{problems:,}", *cells)
    total = sum(problems * passes for _, problems, passes in stages if math.isfinite(passes))
    table.add_row("in all", "", "", f"{total:,.0f}", style="bold")
    return table


def circuit(found: Circuit) -> Table:
    """Return what circuits of all sizes keep; the chosen one is bold."""
    own, curve = found.description, found.curve
    table = Table(
        caption=f"share of the {own['sizes_of']}; differences to the intact model per target token, 95 % intervals over problems\n"
        f"CPR {_value(curve.cpr)}, CMD {_value(curve.cmd)}; with no unit left {_value(curve.empty)} nats, intact {curve.intact.value:.3g}, "
        f"a guess {curve.guessing:.3g}"
    )
    for name in ("share", "units", "nats", "KL", "f"):
        table.add_column(name, justify="right")
    shown = {point.units: point for point in (*curve.points, found.chosen)}  # of one size, the largest share
    for point in sorted(shown.values(), key=lambda own: own.units):
        values = (_value(point.nats), _value(point.kl), _value(point.faithfulness))
        style = "bold" if point.units == found.chosen.units else ""
        table.add_row(f"{point.share:.1%}", f"{point.units:,}", *values, style=style)
    return table


def checked(found: Circuit) -> list[str]:
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


def figures(found: Circuit) -> dict[str, Any]:
    """Return the numbers of a circuit without those of every unit."""
    names = ("size", "share", "remarks", "chosen", "curve", "stability", "checks", "tests", "members")
    return {name: getattr(found, name) for name in names}


def overlap(found: Overlap) -> list[Table]:
    """Return what circuits share, and what the removal of each does to all tasks."""
    first = Table(
        caption="units that both have, and Jaccard similarity corrected for chance (0: as chance has it)"
    )
    first.add_column("shared")
    for name in found.names:
        first.add_column(name, justify="right")
    for i, name in enumerate(found.names):
        cells = [f"{found.shared[i][j]:,} ({found.over_chance[i][j]:.2f})" for j in range(len(found.names))]
        first.add_row(f"{name} ({found.sizes[i]:,})", *cells)
    second = Table(
        caption="rise of the loss in nats per target token, 95 % intervals; below, random units of the same kinds and layers"
    )
    second.add_column("removed")
    for name in found.names:
        second.add_column(f"on {name}", justify="right")
    for i, name in enumerate(found.names):
        second.add_row(f"{found.removed[i]:,} of {name}", *map(_value, found.removal[i]))
        second.add_row("  random", *map(_value, found.random[i]), style="dim")
    return [first, second]


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
    extra = f", {len(own['spare'])} of {own['tested']}" if name == "minimality" and own["spare"] else ""
    return f"{holds[0] if own['holds'] else holds[1]}{extra} (p = {own['p']:.2g})"


def _value(own: Any) -> str:
    return f"{own.value:.3g} [{own.low:.3g}, {own.high:.3g}]"


def _record(own: dict[str, float]) -> str:
    return f"{own['value']:+.3g} [{own['low']:+.3g}, {own['high']:+.3g}]"
