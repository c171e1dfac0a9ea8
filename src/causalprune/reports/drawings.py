"""Drawings as SVG that stands in a page: squares for layers and parts, and curves."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

COLOURS = ("#2a7fc9", "#d9542b")
"""Of values below zero, and above."""
OPACITIES = (0.12, 0.3, 0.5, 0.75, 1.0)
LABELS = 16
"""At most so many rows and columns have their number beside them."""
WIDE, HIGH = 520.0, 240.0
"""Size of a curve's drawing."""
LEAST, MOST = -2.0, 3.0
"""Values of f between which a curve is drawn."""


def grid(cells: Mapping[tuple[int, int], float], columns: Sequence[Any], top: float) -> Markup:
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


def drawn_curve(own: Mapping[str, Any]) -> Markup:
    """Return the curve of f over the share, with its intervals, as a drawing; arrows are points beyond its axis."""
    points = [point for point in own["points"] if all(map(math.isfinite, point["faithfulness"].values()))]
    if not points:
        return Markup("")
    low = min(0.0, *(point["faithfulness"]["low"] for point in points))
    high = max(1.0, *(point["faithfulness"]["high"] for point in points))
    low, high = max(low, LEAST), min(high, MOST)

    def at(share: float, f: float) -> tuple[float, float]:
        return 40 + (WIDE - 60) * share, 15 + (HIGH - 45) * (high - min(max(f, low), high)) / (high - low)

    def text(x: float, y: float, said: str, anchor: str = "end") -> Markup:
        return Markup('<text x="{:.0f}" y="{:.0f}" text-anchor="{}">{}</text>').format(x, y, anchor, said)

    parts: list[Markup] = []
    for level in (0.0, 1.0):
        (x, y), (end, _) = at(0.0, level), at(1.0, level)
        parts.append(Markup('<path d="M{:.0f} {:.1f}H{:.0f}" stroke-opacity=".3"/>').format(x, y, end))
        parts.append(text(x - 6, y + 4, f"{level:g}"))
    ends = [(end, at(0.0, end)) for end in (low, high) if min(abs(end), abs(end - 1)) > 0.07 * (high - low)]
    parts += [text(x - 6, y + 4, f"{end:.2g}") for end, (x, y) in ends]
    parts += [text(at(share, low)[0], HIGH - 8, f"{share:.0%}", "middle") for share in (0.0, 0.2, 0.5, 1.0)]
    parts += _marks(points, at, (low, high))
    return Markup(
        '<svg viewBox="0 0 {} {}" width="{}" style="max-width:100%" role="img" aria-label="f by share, with 95 % intervals">'
    ).format(WIDE, HIGH, WIDE) + Markup(
        '<g stroke="currentColor" fill="none" font-size="11">{}</g></svg>'
    ).format(Markup("").join(parts))


def beyond(own: Mapping[str, Any]) -> bool:
    """Tell whether values or intervals are cut in the drawing of a curve."""
    values = [value for point in own["points"] for value in point["faithfulness"].values()]
    return any(math.isfinite(value) and not LEAST <= value <= MOST for value in values)


def _marks(points: list[Mapping[str, Any]], at: Any, ends: tuple[float, float]) -> Iterator[Markup]:
    """Yield intervals, points, and the line between them as far as it is within the ends; arrows point to what is not."""
    known = [(point["share"], point["faithfulness"]["value"]) for point in points]
    for (x, y), (share, f) in pairwise(known):
        cuts = sorted((end - y) / (f - y) for end in ends) if f != y else (0.0, 1.0)
        parts = max(cuts[0], 0.0), min(cuts[1], 1.0)
        if parts[0] < parts[1]:
            line = "L".join("{:.1f} {:.1f}".format(*at(x + t * (share - x), y + t * (f - y))) for t in parts)
            yield Markup('<path d="M{}" stroke-width="1.5"/>').format(line)
    for point, (share, f) in zip(points, known, strict=True):
        (x, y), size = at(share, f), 5 if point["chosen"] else 2.5
        bottom, top = (at(0.0, point["faithfulness"][end])[1] for end in ("low", "high"))
        yield Markup('<path d="M{:.1f} {:.1f}V{:.1f}"/>').format(x, bottom, top)
        dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="currentColor"/>').format(x, y, size)
        arrow = Markup('<path d="M{:.1f} {:.1f}l{} {}h{}z" class="beyond"/>')
        slope = math.copysign(2 * size + 2, f)
        yield dot if ends[0] <= f <= ends[1] else arrow.format(x, y, -size - 2, slope, 2 * size + 4)


def member_map(own: Mapping[str, Any]) -> Markup:
    """Return layer × head as a drawing: the darker, the more surely a member."""
    cells = {(layer, index): probability for layer, index, probability, _ in own["heads"]}
    return grid(cells, range(max(index for _, index in cells) + 1), 1.0)
