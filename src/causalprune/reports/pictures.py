"""What a notebook shows of a record: small pieces of HTML that fit dark and light pages, every text in them escaped."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from causalprune.core import Effects, EvalResult
from causalprune.pruning import Pruned
from causalprune.reports.compared import compare
from causalprune.reports.evidence import Measured, by_matrix, measured
from causalprune.reports.heatmaps import strongest_shade
from causalprune.reports.page import ROLES, bounds, number

COLOURS = ("#2a7fc9", "#d9542b")
"""Of values below zero, and above."""
OPACITIES = (0.12, 0.3, 0.5, 0.75, 1.0)
MOST_CELLS = 20_000
STRONGEST = 5
LABELS = 16
"""At most so many rows and columns have their number beside them."""


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
        yield paragraph(
            f"{kind}: {how} {what} when it is removed, in nats per token; red is above zero, blue below, and the strongest "
            f"shade is {number(top, digits=3)} or more"
        )
        columns = sorted({u["index"] for u in units})
        if len(units) <= MOST_CELLS:
            yield _grid({(u["layer"], columns.index(u["index"])): u["delta"] for u in units}, columns, top)
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
    return paragraph(f"zeros by layer and matrix; the strongest shade is {top:.1%}") + _grid(
        cells, roles, top
    )


def _grid(cells: Mapping[tuple[int, int], float], columns: Sequence[Any], top: float) -> Markup:
    """Return a drawing with a square for every `(layer, column)`: a path for each shade, so that it stays small."""
    paths: dict[tuple[str, float], list[str]] = {}
    for (layer, column), value in cells.items():
        shade = min(int(len(OPACITIES) * abs(value) / (top or 1.0)), len(OPACITIES) - 1)
        paths.setdefault((COLOURS[value >= 0], OPACITIES[shade]), []).append(f"M{column} {layer}h1v1h-1z")
    squares = Markup("").join(
        Markup('<path fill="{}" fill-opacity="{}" d="{}"/>').format(*shade, "".join(path))
        for shade, path in paths.items()
    )
    height, width = max(layer for layer, _ in cells) + 1, len(columns)
    labels = [(-0.4, i + 0.8, i, "end") for i in _some(range(height))]
    labels += [(i + 0.5, -0.4, columns[i], "middle") for i in _some(range(width))]
    text = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
    texts = Markup("").join(text.format(x, y, anchor, name) for x, y, name, anchor in labels)
    return Markup(
        '<svg viewBox="-3 -2 {} {}" width="{}" style="max-width:100%" shape-rendering="crispEdges" role="img" aria-label="heatmap: a row for each layer">'
        '{}<g font-size=".8" fill="currentColor">{}</g></svg>'
    ).format(width + 4, height + 2, 14 * (width + 4), squares, texts)


def _some(places: Sequence[int]) -> Iterable[int]:
    """Return places at equal distances, few enough for their labels."""
    return places[:: math.ceil(len(places) / LABELS)]
