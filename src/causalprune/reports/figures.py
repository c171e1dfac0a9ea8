"""The figures of a report as PNG and SVG, for papers: drawn with matplotlib, which needs no browser."""

import math
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from causalprune.core import OptionError
from causalprune.reports.page import ROLES

FORMATS = ("png", "svg")
COLOURS = ("#1f4fb4", "#c2500a", "#2f7d32", "#b0286a", "#7a6a12", "#4a5568", "#0f6f83", "#7a4fb5")
MARKERS = "osD^vP*X"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2dfd6",
    "svg.hashsalt": "causalprune",
    "text.parse_math": False,
}


def draw(told: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the figures of every run to `folder`, and return the files.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 (an extra)
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as cause:
        raise OptionError("--figures needs matplotlib: pip install 'causalprune[figures]'") from cause
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, run in enumerate(told["runs"]):
        prefix = f"run{number + 1}-" if len(told["runs"]) > 1 else ""
        with mpl.rc_context(STYLE):
            for name, size, paint in _figures(run):
                figure = Figure(figsize=size, layout="constrained")
                paint(figure)
                for suffix in FORMATS:
                    files.append(folder / f"{prefix}{name}.{suffix}")
                    own = {"Date": None} if suffix == "svg" else {"Software": None}
                    figure.savefig(files[-1], dpi=200, metadata=own)
    if not files:
        warnings.warn(f"no figures in {folder}: what was measured has none", stacklevel=2)
    return files


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float], Any]]:
    """Yield name, size in inches and painter of each figure that the run has values for."""
    pruned = [model for model in run["models"] if model["criterion"] != "dense"]
    if pruned and run["tasks"]:
        rows = math.ceil(len(run["tasks"]) / 2)
        yield "scores", (7.0, 2.6 * rows), lambda figure: _scores(figure, run, pruned)
    if run["effects"]:
        shown = run["effects"][0]
        heads = [unit for unit in shown["units"] if unit["kind"] == "head"]
        if heads:
            yield "heads", (4.6, 4.8), lambda figure: _heads(figure, heads, shown["unit"])
    if run["zeros"]:
        width = 1.3 + 1.7 * len(run["zeros"])
        yield "zeros", (min(width, 60.0), 3.8), lambda figure: _zeros(figure, run["zeros"])
    if run["doses"]:
        own = next(iter(run["doses"].values()))
        yield "doses", (7.0, 2.8), lambda figure: _doses(figure, own)
    for number, circuit in enumerate(run["circuits"]):
        name = f"circuit{number + 1}" if len(run["circuits"]) > 1 else "circuit"
        yield name, (7.0, 2.8), partial(_circuit, circuit)


def _circuit(own: Mapping[str, Any], figure: Any) -> None:
    """The curve, and in how many resamples a head is a member by layer × head, where there are heads."""
    left, *right = figure.subplots(1, 1 + bool(own["heads"]), squeeze=False).ravel()
    points = [point for point in own["points"] if math.isfinite(point["faithfulness"]["value"])]
    at, f = [100 * point["share"] for point in points], [point["faithfulness"] for point in points]
    left.plot(at, [value["value"] for value in f], color=COLOURS[0], marker="o", ms=3, lw=1.2)
    left.vlines(at, *([value[end] for value in f] for end in ("low", "high")), color=COLOURS[0], lw=1)
    left.set_title(f"{own['name'][:24]}: {own['title']}", loc="left", fontweight="bold", fontsize=9)
    left.set(xlabel=f"share of the {own['sizes_of']}, %", ylabel="f")
    for ax in right:
        cells = {(layer, index): probability for layer, index, probability, _ in own["heads"]}
        bar = {"label": "member in this share of the draws"}
        _squares(figure, ax, cells, bar, cmap="GnBu", vmin=0, vmax=1)


def _squares(figure: Any, ax: Any, cells: Mapping[tuple[int, int], float], bar: Any, **shades: Any) -> None:
    """Layer × head."""
    rows, columns = (range(max(cell[side] for cell in cells) + 1) for side in (0, 1))
    grid = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
    image = ax.imshow(grid, aspect="auto", interpolation="nearest", **shades)
    ax.set(xlabel="head", ylabel="layer")
    ax.locator_params(integer=True)
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, **bar)


def _scores(figure: Any, run: Mapping[str, Any], pruned: list[Mapping[str, Any]]) -> None:
    methods = list(dict.fromkeys(model["method"] for model in pruned))
    dense: Any = next((m for m in run["models"] if m["criterion"] == "dense"), {"cells": {}})
    axes = figure.subplots(math.ceil(len(run["tasks"]) / 2), 2, squeeze=False).ravel()
    for ax, task in zip(axes, run["tasks"], strict=False):
        values = []
        for i, method in enumerate(methods):
            own = sorted((m for m in pruned if m["method"] == method), key=lambda m: m["share"])
            points = [(m["share"] * 100, m["cells"].get(task["key"])) for m in own]
            known = [(x, c) for x, c in points if c and math.isfinite(c["value"])]
            apart = 0.6 * (i - (len(methods) - 1) / 2)
            at, middle = [x + apart for x, _ in known], [c["value"] for _, c in known]
            reach = [[max(c["value"] - c["low"], 0) if c["low"] == c["low"] else 0 for _, c in known]]
            reach.append([max(c["high"] - c["value"], 0) if c["high"] == c["high"] else 0 for _, c in known])
            style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "ms": 4, "lw": 1.2, "capsize": 2}
            ax.errorbar(at, middle, yerr=reach, label=method[:40], **style)
            values += middle
        level = (dense["cells"].get(task["key"]) or {}).get("value", math.nan)
        if math.isfinite(level):
            ax.axhline(level, color="#5b616b", lw=1, ls=":")
        positive = [v for v in values if v > 0]
        if not task["higher_is_better"] and positive and max(positive) > 8 * min(positive):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(task["task"][:40], loc="left", fontweight="bold", fontsize=9)
        ax.set_xlabel("zeros, or parameters removed, %" if any(m["removed"] for m in pruned) else "zeros, %")
        ax.set_ylabel(task["unit"])
    for ax in axes[len(run["tasks"]) :]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _heads(figure: Any, heads: list[Mapping[str, Any]], measured_in: str) -> None:
    """Layer × head, as the paper's Figure 2, but with the sign of Δ."""
    cells = {(unit["layer"], unit["index"]): unit["delta"] for unit in heads}
    sizes = sorted(abs(u["delta"]) for u in heads if math.isfinite(u["delta"])) or [1.0]
    top = sizes[math.ceil(0.98 * (len(sizes) - 1))] or sizes[-1] or 1.0
    bar = {"label": f"Δ, {measured_in}", "extend": "both"}
    _squares(figure, figure.subplots(), cells, bar, cmap="RdBu_r", vmin=-top, vmax=top)


def _zeros(figure: Any, zeros: Mapping[str, list[list[Any]]]) -> None:
    roles = [role for role in ROLES if any(row[1] == role for rows in zeros.values() for row in rows)]
    axes = figure.subplots(1, len(zeros), sharey=True, squeeze=False).ravel()
    top = max(row[3] / row[2] for rows in zeros.values() for row in rows)
    for ax, (label, rows) in zip(axes, zeros.items(), strict=True):
        grid = [[math.nan] * len(roles) for _ in range(max(row[0] for row in rows) + 1)]
        for layer, role, weights, count in rows:
            grid[layer][roles.index(role)] = count / weights
        image = ax.imshow(grid, cmap="GnBu", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        ax.set_title(label[:24], fontsize=8)
        ax.set_xticks(range(len(roles)), roles, rotation=90)
        ax.grid(visible=False)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="share of zeros")


def _doses(figure: Any, own: Mapping[str, Any]) -> None:
    depth = max(group["layer"] for group in own["groups"]) or 1
    for ax, part in zip(figure.subplots(1, 2, sharey=True), ("attention", "mlp"), strict=True):
        for group in (group for group in own["groups"] if group["part"] == part):
            shade = 0.25 + 0.75 * group["layer"] / depth
            ax.plot(
                [100 * s for s in own["sparsities"]],
                group["nats"],
                color=COLOURS[6],
                alpha=shade,
                lw=1,
                marker=".",
                ms=3,
            )
        ax.set_title(part, loc="left", fontweight="bold", fontsize=9)
        ax.set_xlabel("zeros in this part, %")
    figure.axes[0].set_ylabel("nats per token")
