"""Effects as a heatmap of characters: a row for each layer, a column for each head, colours or signs for Δ."""

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text

from causalprune.reports.evidence import Measured

POSITIVE = ("#fde0d2", "#f6b08c", "#e8764f", "#c8401f", "#8f1d0c")
NEGATIVE = ("#d6e6f5", "#9cc4e6", "#5b9bd0", "#2a6fae", "#114a82")
UNKNOWN = "·"
MARGIN = 5
"""Columns for the number of the layer."""


def heatmap(own: Measured, *, width: int, colour: bool) -> Iterator[Text]:
    """Yield the lines of the heatmaps of all kinds of units, none wider than `width` columns.

    With `colour`, a cell is a patch, darker for a larger effect, red where removing the unit raises the loss and blue
    where it lowers it; a sign in it says the same. Without, it is a digit from 0 to 9 for the size, after a minus
    where removing helps. Heads that do not fit side by side are continued in another block.
    """
    for kind in dict.fromkeys(unit["kind"] for unit in own.units):
        cells = {(u["layer"], u["index"]): u["delta"] for u in own.units if u["kind"] == kind}
        top = strongest_shade(cells.values())
        if not top:
            yield Text(f"{kind}: nothing measured")
            continue
        yield Text(f"{kind}, Δ in {own.unit}; the strongest shade is {top:.3g} or more", style="bold")
        indices = sorted({index for _, index in cells})
        room = max((width - MARGIN) // 2, 1)
        for start in range(0, len(indices), room):
            yield from _block(cells, indices[start : start + room], top, colour=colour)


def strongest_shade(values: Iterable[float]) -> float:
    """Return the size from which on an effect has the strongest shade: nearly the largest; 0 where nothing is known."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return (sizes[math.ceil(0.98 * (len(sizes) - 1))] or sizes[-1] or 1.0) if sizes else 0.0


def _block(
    cells: dict[tuple[int, int], float], indices: Sequence[int], top: float, *, colour: bool
) -> Iterator[Text]:
    yield Text(" " * MARGIN + "".join(f"{i % 100:>2}" for i in indices), style="dim")
    for layer in sorted({layer for layer, _ in cells}):
        line = Text().append(f"{layer:>{MARGIN - 1}} ", "dim")
        for index in indices:
            value = cells.get((layer, index), math.nan)
            line.append(*(_patch(value, top) if colour else (_digit(value, top), "")))
        yield line


def _digit(value: float, top: float) -> str:
    if not math.isfinite(value):
        return f" {UNKNOWN}"
    size = min(round(9 * abs(value) / top), 9)
    return f"{'-' if value < 0 else ' '}{size}"


def _patch(value: float, top: float) -> tuple[str, str]:
    """Return two characters and their style."""
    if not math.isfinite(value):
        return f" {UNKNOWN}", "dim"
    shades = NEGATIVE if value < 0 else POSITIVE
    at = min(int(len(shades) * abs(value) / top), len(shades) - 1)
    ink = "black" if at < 3 else "white"
    return ("- " if value < 0 else "  "), f"{ink} on {shades[at]}"
