"""What a notebook shows of a record: small pieces of HTML that fit dark and light pages, every text in them escaped."""

import math
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from causalprune.core import Effects, EvalResult
from causalprune.pruning import Pruned
from causalprune.reports.compared import compare
from causalprune.reports.drawings import grid
from causalprune.reports.evidence import Measured, by_matrix, measured
from causalprune.reports.heatmaps import strongest_shade
from causalprune.reports.page import ROLES, bounds, number

MOST_CELLS = 20_000
STRONGEST = 5


def drawn(record: Any) -> str | None:
    """Return the picture of a record as HTML, None where it has none."""
    if isinstance(record, Effects):
        return Markup("").join(_effects(measured(record)[0]))
    if isinstance(record, EvalResult):
        return compare({str(record.description.get("model", "")): [record]})._repr_html_()
    return _zeros(record) if isinstance(record, Pruned) else None


def paragraph(text: str) -> Markup:
    """Return a text as a paragraph."""
    return Markup("<p>{}</p>").format(text)


def _effects(own: Measured) -> Iterator[Markup]:
    """Yield a heatmap for every kind of unit, and the units that matter most."""
    for kind in dict.fromkeys(unit["kind"] for unit in own.units):
        units = [u for u in own.units if u["kind"] == kind and math.isfinite(u["delta"])]
        top = strongest_shade(u["delta"] for u in units)
        if not top:
            yield paragraph(f"{kind}: nothing measured")
            continue
        how = "measured" if own.exact else "estimated"
        what = "rise of the loss" if own.effect == "ce" else "divergence from the intact model"
        what = "share of the targets' logits" if "logits" in own.unit else what
        yield paragraph(
            f"{kind}: {how} {what} when it is removed, in {own.unit}; red is above zero, blue below, and the strongest "
            f"shade is {number(top, digits=3)} or more"
        )
        columns = sorted({u["index"] for u in units})
        if len(units) <= MOST_CELLS:
            yield grid({(u["layer"], columns.index(u["index"])): u["delta"] for u in units}, columns, top)
        first = sorted(units, key=lambda u: -u["delta"])[:STRONGEST]
        said = (
            f"layer {u['layer']} {kind} {u['index']}: {number(u['delta'], sign='+', digits=3)} {bounds(u)}"
            for u in first
        )
        yield paragraph(f"matter most: {'; '.join(said)}")


def _zeros(pruned: Pruned) -> Markup | None:
    """Return the share of zeros by layer and matrix, None where all have the same."""
    rows = by_matrix(pruned.keep.counted())
    roles = [role for role in ROLES if any(row[1] == role for row in rows)]
    cells = {(layer, roles.index(role)): zeros / weights for layer, role, weights, zeros in rows}
    top = max(cells.values())
    if top - min(cells.values()) < 0.01:
        return None
    return paragraph(f"zeros by layer and matrix; the strongest shade is {top:.1%}") + grid(cells, roles, top)
