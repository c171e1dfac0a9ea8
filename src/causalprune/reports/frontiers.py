"""The page of a search for the file to ship: size and speed against what they cost, predicted and measured, and which was chosen."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from causalprune.evaluation import write_text
from causalprune.reports.page import bounds, number
from causalprune.reports.summary import UNITS

FRONTIER_PAGE = "frontier.html"
WIDE, HIGH, LEFT, LOW = 860, 420, 70, 40
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
PAGE = Markup(
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    "<title>{title}</title><style>{style}</style></head><body><main><h1>{title}</h1>"
    '<div class="card verdict holds">{said}</div><div class="card"><h2>Size against the task</h2>{drawing}{note}</div>{speeds}'
    '<div class="card"><h2>Every file</h2><div class="scroll">{table}</div></div></main></body></html>'
)


def frontier_page(record: Mapping[str, Any], file: Path) -> Path:
    """Write the page of what `fit` found to a file, and return that."""
    said = Markup("").join(Markup("<p>{}</p>").format(line) for line in found(record))
    note = Markup('<p class="note">{}</p>').format(
        f"Circles were measured and crosses only predicted, each by how much it is worse than dense on the problems that decide "
        f"({_rise(record)}); the larger the mark, the more parameters are gone. Upright lines are 95 % intervals on the other problems, which nothing "
        "was chosen by, as are the numbers in the table."
    )
    sizes = {p["name"]: p["bytes"] / 1e6 for p in record["points"]}
    drawing = _drawing(record, sizes, lambda size: f"{size:.0f} MB", "rise to dense by size of the file")
    parts = {
        "drawing": drawing,
        "note": note,
        "table": _table(record),
        "said": said,
        "speeds": _speeds(record),
    }
    text = PAGE.format(title=f"{record['model']}: the file to ship", style=Markup(STYLE), **parts)  # noqa: S704 (our own file)
    write_text(file, text)
    return file


def found(record: Mapping[str, Any]) -> list[str]:
    """Return in sentences what a search found."""
    chosen, limit, unit = (
        record["chosen"],
        record["limit"]["said"],
        UNITS.get(record["metric"], record["metric"]),
    )
    whole = f"quantise to {chosen['mix']} and do not prune"
    smaller = f"remove {chosen['share']:.0%} of the parameters and quantise to {chosen['mix']}"
    own, dense = chosen["minus_dense"], record["dense"]
    lines = [
        f"{smaller if chosen['share'] else whole}: {record['file']['bytes'] / 1e6:.1f} MB, {limit}",
        f"{record['on']}, on {dense['problems']} problems that decided nothing: {_signed(own)} to dense at {number(dense['value'])} ({unit})",
    ]
    if chosen["kept"] is not None:
        lines.append(f"kept: {chosen['kept']:.1%} of dense, on these problems")
    if (over := record["minus_best_whole"]) is not None:
        lines.append(
            f"against the best file of its size or smaller without pruning, {record['best_whole']}: "
            f"{_signed(over)} ({unit})"
        )
    below = record["pays_below_bytes"]
    nowhere = "removing parameters was measured better than quantising further at no size"
    if record["best_whole"] is None:
        nowhere = "no whole file is so small, so that removing parameters was compared with nothing"
    lines.append(
        f"removing parameters was measured better than quantising further at {below / 1e6:.1f} MB, and at no larger size, on the "
        "problems that decide, without an interval"
        if below
        else nowhere
    )
    if speed := record.get("speeds", {}).get(chosen["name"]):
        lines.append(
            f"speed: {speed['over_dense']:.2f} × dense at Q8_0 in llama.cpp, {speed['tokens_per_second']:.1f} tokens/s"
        )
    return lines


def _rise(record: Mapping[str, Any]) -> str:
    """Return the unit of what a file is worse by."""
    return (
        "its logarithm" if record["metric"] == "perplexity" else UNITS.get(record["metric"], record["metric"])
    )


def _signed(own: Mapping[str, Any]) -> str:
    return f"{number(own['difference'], sign='+', digits=3)} {bounds(own)}"


def _speeds(record: Mapping[str, Any]) -> Markup:
    """Return the card of speeds: nothing where no file was timed."""
    speeds = {name: own["over_dense"] for name, own in record.get("speeds", {}).items()}
    if not speeds:
        return Markup("")
    drawing = _drawing(record, speeds, lambda speed: f"{speed:.2f} ×", "rise to dense by speed of the file")
    note = (
        "Tokens a second that a file writes in llama.cpp here, over the whole model at Q8_0, timed in turns on two threads. Only files "
        "than which none that was measured is both smaller and better were timed, and those that a limit on speed asked for."
    )
    return Markup('<div class="card"><h2>Speed against the task</h2>{}<p class="note">{}</p></div>').format(
        drawing, note
    )


def _drawing(
    record: Mapping[str, Any], across: Mapping[str, float], said: Callable[[float], str], label: str
) -> Markup:
    """Return what files cost against a number that each has: what is not in `across` is not drawn."""
    points = [p for p in record["points"] if p["name"] in across and _height(p) is not None]
    if not points:
        return Markup("")
    most, ends = max(across[p["name"]] for p in points) * 1.05, [_ends(record, p) for p in points]
    heights = [*(_height(p) or 0.0 for p in points), *(end for own in ends for end in own)]
    low, top = min(0.0, *heights), max(0.01, *heights) * 1.1

    def at(point: Mapping[str, Any]) -> tuple[float, float]:
        share = ((_height(point) or 0.0) - low) / (top - low)
        return LEFT + (WIDE - LEFT - 20) * across[point["name"]] / most, 15 + (HIGH - 15 - LOW) * (1 - share)

    def bars() -> Iterator[Markup]:
        for p, own in zip(points, ends, strict=True):
            if own:
                x, (low_y, high_y) = at(p)[0], (at({**p, "measured_rise": end})[1] for end in own)
                yield Markup('<path d="M{:.1f} {:.1f}V{:.1f}" stroke-opacity=".4"/>').format(x, low_y, high_y)

    marks = Markup("").join(
        (*bars(), *(_mark(p, *at(p), chosen=p["name"] == record["chosen"]["name"]) for p in points))
    )
    axes = Markup("").join(_axes([said(most * step / 4) for step in range(5)], low, top))
    return Markup(
        '<svg viewBox="0 0 {} {}" width="{}" style="max-width:100%" role="img" aria-label="{}">'
        '<g stroke="currentColor" fill="none" font-size="11">{}{}</g></svg>'
    ).format(WIDE, HIGH, WIDE, label, axes, marks)


def _ends(record: Mapping[str, Any], point: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the interval of how much worse a point is on the problems that are reported; nothing where there is none."""
    own = point.get("minus_dense")
    if not own or record["metric"] == "perplexity" or not math.isfinite(own["low"] + own["high"]):
        return ()
    sign = -1 if record.get("higher_is_better") else 1
    return sign * own["low"], sign * own["high"]


def _height(point: Mapping[str, Any]) -> float | None:
    measured: float | None = point["measured_rise"]
    value = point["predicted_rise"] if measured is None else measured
    return value if value is not None and math.isfinite(value) else None


def _mark(point: Mapping[str, Any], x: float, y: float, *, chosen: bool) -> Markup:
    size = 3 + 12 * point["share"]
    title = Markup("<title>{}: {:.1f} MB, {:+.3f}</title>").format(
        point["name"], point["bytes"] / 1e6, _height(point)
    )
    text = Markup('<text x="{:.0f}" y="{:.0f}" stroke="none" fill="currentColor">{}</text>')
    label = text.format(x + size + 3, y - 3, point["name"]) if point["measured_rise"] is not None else ""
    if point["measured_rise"] is None:
        shape = Markup('<path d="M{:.1f} {:.1f}l{s} {s}m0 -{s}l-{s} {s}" stroke-opacity=".5"/>').format(
            x - size / 2, y - size / 2, s=f"{size:.1f}"
        )
    else:
        shape = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" fill="{}"/>').format(
            x, y, size, "currentColor" if chosen else "none"
        )
    return Markup("<g>{}{}{}</g>").format(title, shape, label)


def _axes(said: Sequence[str], low: float, top: float) -> Iterator[Markup]:
    text = Markup('<text x="{:.0f}" y="{:.0f}" text-anchor="{}" stroke="none" fill="currentColor">{}</text>')
    for step, below in enumerate(said):
        x, share = LEFT + (WIDE - LEFT - 20) * step / 4, step / 4
        yield text.format(x, HIGH - 18, "middle", below)
        y = 15 + (HIGH - 15 - LOW) * (1 - share)
        yield text.format(LEFT - 8, y + 4, "end", f"{low + (top - low) * share:+.2f}")
        yield Markup('<path d="M{} {:.1f}H{}" stroke-opacity=".15"/>').format(LEFT, y, WIDE - 20)


def _table(record: Mapping[str, Any]) -> Markup:
    rows = Markup("").join(_rows(record["points"], record["chosen"]["name"], record.get("speeds", {})))
    unit, rise = UNITS.get(record["metric"], record["metric"]), _rise(record)
    head = (
        "file", "MB", "gone", f"worse by, predicted ({rise})", f"worse by, measured ({rise})", f"less dense, other problems ({unit})",
        *(["kept"] if _keeps(record["points"]) else []), "speed over dense at Q8_0",
    )  # fmt: skip
    names = Markup("").join(Markup("<th>{}</th>").format(name) for name in head)
    return Markup('<table class="models"><thead><tr>{}</tr></thead><tbody>{}</tbody></table>').format(
        names, rows
    )


def _keeps(points: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether points have a share that they keep, which not every measure has."""
    return any(p.get("kept") is not None for p in points)


def _rows(points: Sequence[Mapping[str, Any]], chosen: str, speeds: Mapping[str, Any]) -> Iterator[Markup]:
    for p in points:
        own, speed = p.get("minus_dense"), speeds.get(p["name"])
        cells = (
            f"{p['bytes'] / 1e6:.1f}",
            f"{p['share']:.0%}",
            *(
                "–" if p[key] is None else number(p[key], sign="+", digits=3)
                for key in ("predicted_rise", "measured_rise")
            ),
            _signed(own) if own else "–",
            *([f"{p['kept']:.1%}" if own else "–"] if _keeps(points) else []),
            f"{speed['over_dense']:.2f} ×" if speed else "–",
        )
        mark = Markup(' class="chosen"') if p["name"] == chosen else ""
        yield Markup("<tr{}><th scope=row>{}</th>{}</tr>").format(
            mark, p["name"], Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells)
        )
