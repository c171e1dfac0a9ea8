"""Circuits and their overlaps as tables and sentences."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from causalprune.circuits import Circuit, Overlap
from causalprune.core import spoken
from causalprune.correction import CLEAN, Corrected, short
from causalprune.evaluation import bracketed
from causalprune.runs import Job


def costs(stages: Sequence[tuple[str, int, float]]) -> Table:
    """Return what a search costs, stage by stage, in forward passes over problems (a backward pass is two)."""
    table = Table(
        caption="a backward pass counts as two forward ones, and a pair as one problem, although it takes two sequences where answers "
        "differ before their last token; a search often ends earlier"
    )
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
        caption="rise of the loss in nats per target token, 95 % intervals; below, random units of the same kinds and, where one has several, layers"
    )
    second.add_column("removed")
    for name in found.names:
        second.add_column(f"on {name}", justify="right")
    for i, name in enumerate(found.names):
        second.add_row(f"{found.removed[i]:,} of {name}", *map(_value, found.removal[i]))
        others = ("no other set" if own is None else _value(own) for own in found.random[i])
        second.add_row("  random", *others, style="dim")
    return [first, second]


def _value(own: Any) -> str:
    """Return a value with its interval; none where closing all units changes nothing, of which f would be a share."""
    bounds = bracketed(own.low, own.high, form=".3g")
    return f"{own.value:.3g} {bounds}" if math.isfinite(own.value) else "none"


def prices(jobs: Sequence[Job], seconds: float) -> Table:
    """Return what a correction costs, stage by stage, in tokens through the model."""
    table = Table(
        caption=f"about {spoken(seconds)} on this device; a backward pass counts as two forward ones, and a search often "
        "ends earlier"
    )
    for name in ("stage", "count", "tokens"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for job in jobs:
        table.add_row(job.name, f"{job.count:,}", f"{job.tokens:,}")
    table.add_row("in all", "", f"{sum(job.tokens for job in jobs):,}", style="bold")
    return table


def correction(found: Corrected) -> Table:
    """Return what was measured without so many candidates; what was chosen is bold and has a mark."""
    table = Table(
        caption="measured on the half of the samples that decided how many, against the model before; loss and divergence in nats per token; → "
        "is what went"
    )
    sources = list(found.chosen.harm)
    columns = (
        "without",
        "share",
        "log-odds of the undesired",
        *(f"{'divergence on' if name.startswith(CLEAN) else 'loss of'} {short(name)}" for name in sources),
        "divergence",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for point in found.curve:
        fall = point.benefit
        chosen = point is found.chosen
        cells = [f"{'→ ' * chosen}{point.count:,}", f"{point.share:.3%}"]
        cells += [f"{-fall.value:+.3g} [{-fall.high:+.3g}, {-fall.low:+.3g}]"]
        cells += [f"{point.harm[name].value:+.3g}" for name in sources]
        worst = max((own.value for own in point.kl.values()), default=0.0)
        table.add_row(*cells, f"{worst:.3g}", style="bold" if chosen else "")
    return table
