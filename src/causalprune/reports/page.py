"""One HTML file from a summary: everything in it, nothing fetched, every text escaped."""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from causalprune.core import Size
from causalprune.reports.drawings import beyond, drawn_curve, member_map
from causalprune.reports.judging import RELIABLE_FROM, reliability_word, taken

HERE = Path(__file__).parent
MOST_UNITS = 1500
ROLES = ("q_a", "q_b", "kv_a", "kv_b", "q", "k", "v", "g", "o", "gate", "up", "down")
MARKS = {"better": "▲ better", "worse": "▼ worse", "no difference shown": "= no difference shown"}
"""Verdicts against the dense model; those against Wanda have other words."""
BESIDE_WANDA = {
    "better": "ahead of Wanda",
    "worse": "behind Wanda",
    "no difference shown": "not told apart from Wanda",
}
STABILITY = (
    ("certain_signs", "certain of their sign", "share of parts whose 95 % interval excludes zero", False),
    ("split_half", "split-half", "rank correlation of the effects on two halves of the problems", True),
    ("between_subsets", "between subsets", "mean rank correlation between the K subsets", True),
    (
        "split_half_top_fifth",
        "top fifth shared",
        "share of the strongest fifth that two halves agree on",
        False,
    ),
)
"""Key, title and meaning of each number, and whether it is a correlation, which comes with a word."""


def page(told: Mapping[str, Any]) -> str:
    """Return the HTML of a report."""
    runs = told["runs"]
    plotly = get_plotlyjs().replace("\r\n", "\n")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    tasks = {task["key"]: task for run in runs for task in run["tasks"]}
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=runs[0]["model"] if len(runs) == 1 else f"{len(runs)} runs compared",
            facts=_facts(runs),
            runs=runs,
            comparison=told["comparison"],
            all_tasks=list(tasks.values()),
            reasons=_reasons,
            stability_words=STABILITY,
            reliable_from=RELIABLE_FROM,
            version=told["causalprune"],
            policy=_policy(plotly, script),
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 (our own file)
            plotly=Markup(plotly),  # noqa: S704 (the installed library)
            script=Markup(script),  # noqa: S704 (our own file)
            data=Markup(embedded(told)),  # noqa: S704 (has no bracket in it)
        )
    )


def embedded(told: Any) -> str:
    """Return JSON that can stand in a page: ASCII, no tags, and null where a number is not finite."""
    text = json.dumps(finite(told), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def finite(value: Any) -> Any:
    """Return a copy of a record with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _policy(*scripts: str) -> str:
    """Return a policy that lets the browser run these scripts, and fetch nothing at all."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def _environment() -> Environment:
    made = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    made.filters |= {
        "cut": cut,
        "number": number,
        "signed": lambda value: number(value, sign="+", digits=3),
        "bounds": bounds,
        "slug": lambda verdict: "none" if verdict == "no difference shown" else verdict,
        "mark": lambda verdict: MARKS.get(verdict, "undefined"),
        "beside_wanda": lambda verdict: BESIDE_WANDA.get(verdict, "not to be compared with Wanda"),
        "grouped": _grouped,
        "size": _size,
        "reliability": reliability_word,
        "per_model": per_model,
        "extremes": _extremes,
        "by_label": _by_label,
        "seconds": lambda value: (
            "–" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        ),
        "count": lambda value: "–" if not value else f"{value:,.0f}",
        "rate": lambda s: "–" if not (s["tokens"] and s["seconds"]) else f"{s['tokens'] / s['seconds']:,.0f}",
        "gib": lambda value: "–" if not value else f"{value / 2**30:.2f} GiB",
        "strongest": _strongest,
        "sparsities": lambda run: sorted(
            {m["sparsity"] for m in run["models"] if m["label"] in run["zeros"]}, reverse=True
        ),
        "roles": lambda zeros: [
            r for r in ROLES if any(row[1] == r for rows in zeros.values() for row in rows)
        ],
        "achieved": achieved,
        "drawn_curve": drawn_curve,
        "beyond": beyond,
        "member_map": member_map,
        "study": study,
        "has_texts": lambda blocks: any(
            p["prompt"] for b in blocks for side in ("lost", "won") for p in b[side]
        ),
        "told": lambda value: (
            value if isinstance(value, str) else "not recorded" if value is None else _indented(value)
        ),
    }
    return made


def cut(text: Any, room: int) -> str:
    """Return a text, shortened to `room` characters."""
    text = str(text)
    return text if len(text) <= room else f"{text[: room - 1]}…"


def number(value: Any, *, sign: str = "", digits: int = 4) -> str:
    """Return a number in a few significant digits, or what it is if it is not finite."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not a number"
    if isinstance(value, str | bool):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    large = 10**digits <= abs(value) < 1e15
    text = f"{value:{sign},.0f}" if large else f"{value:{sign}.{digits}g}"
    return text.replace("-", "−")


def bounds(own: Mapping[str, Any]) -> str:
    """Return an interval in brackets, or that there is none."""
    low, high = own["low"], own["high"]
    return (
        f"[{number(low, digits=3)}, {number(high, digits=3)}]"
        if math.isfinite(low) and math.isfinite(high)
        else "no interval: one example"
        if own.get("n") == 1
        else "no interval"
    )


def achieved(rows: Iterable[Sequence[Any]], role: str | None = None) -> str:
    """Return the share of zeros of all matrices, or of one kind with the layers that have least and most."""
    own = [row for row in rows if role in (None, row[1])]
    if not own:
        return "–"
    share = sum(row[3] for row in own) / sum(row[2] for row in own)
    if role is None:
        return f"{share:.4%}"
    each = [row[3] / row[2] for row in own]
    return f"{share:.1%} ({min(each):.1%}–{max(each):.1%})"


def study(found: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """Return the tables of `stability.json`: a title, and rows of numbers by name."""
    titles = {
        "within": "Independent draws of problems",
        "between": "Rank correlation with the first source",
        "swaps": "Problems swapped for others",
    }
    tables = [(title, [(k, v) for k, v in found.get(key, {}).items() if v]) for key, title in titles.items()]
    pairs = {k: v for k, v in found.get("interactions", {}).items() if isinstance(v, int | float)}
    tables.append(("Strong parts removed in pairs", [("pairs", pairs)] if pairs else []))
    return [(title, rows) for title, rows in tables if rows]


def _facts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a reader wants to know first, in a few words each."""
    if len(runs) > 1:
        return [cut(run["model"], 60) for run in runs]
    run = runs[0]
    pruned = sum(model["criterion"] != "dense" for model in run["models"])
    calibration = run["provenance"].get("calibration") or {}
    said = [f"{pruned} pruned models" if pruned != 1 else "one pruned model", f"{len(run['tasks'])} measures"]
    if not run["ran"]:
        counts = {kind: len(run[f"{kind}s"]) for kind in ("circuit", "correction")}
        said = [f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items() if n]
    if run["effects"]:
        said.insert(0, f"{len(run['effects'][0]['units'])} parts measured")
    if sources := calibration.get("sources"):
        said.append("calibrated on " + ", ".join(f"{n} × {cut(name, 40)}" for name, n in sources.items()))
    return [*said, f"run {cut(run['name'], 40)}"]


def _reasons(run: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    model = next(m for m in run["models"] if m["label"] == run["recommended"]["label"])
    return [(task, model["cells"][task["key"]]) for task in run["tasks"] if task["key"] in model["cells"]]


def _grouped(models: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return the models by what was taken from them: dense, then by zeros, then the smaller ones."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for model in sorted(models, key=lambda m: (m["removed"], m["sparsity"])):
        groups.setdefault("dense" if model["criterion"] == "dense" else taken(model), []).append(model)
    return list(groups.items())


def _size(model: Mapping[str, Any]) -> str:
    """Return size and speed of a model in a few words."""
    said = [str(Size(model["parameters"], model["bytes"]))] if model["parameters"] else []
    if speed := model["speed"]:
        said.append(
            f"reading {speed['reading_gain']:.2f} times, writing {speed['writing_gain']:.2f} times as fast"
        )
    elif model["criterion"] != "dense":
        said.append("speed not measured" if model["removed"] else "the dense model's speed")
    return ", ".join(said)


def _extremes(units: Sequence[Mapping[str, Any]]) -> list[tuple[list[Mapping[str, Any]], str]]:
    """Return the parts that matter most, and those whose removal helps most."""
    order = sorted((u for u in units if math.isfinite(u["delta"])), key=lambda unit: -unit["delta"])
    helpful = [unit for unit in order[::-1] if unit["delta"] < 0][:5]
    return [(order[:9], ""), (helpful, "removing helps most")] if helpful else [(order[:9], "")]


def _by_label(
    blocks: Iterable[Mapping[str, Any]], first: str | None
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for block in blocks:
        groups.setdefault(block["label"], []).append(block)
    return sorted(groups.items(), key=lambda group: group[0] != first)


def per_model(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps of each model added up; None where nothing was recorded."""
    rows: dict[str, dict[str, Any]] = {}
    for step in steps:
        name, _, task = step["step"].partition(": ")
        row = rows.setdefault(
            name,
            {"name": name, **dict.fromkeys(("pruning", "evaluation", "tokens", "memory_bytes", "gpu_bytes"))},
        )
        kind = "pruning" if task in ("", "pruning") else "evaluation"  # attribution has no task
        for key, value in ((kind, step["seconds"]), ("tokens", step["tokens"])):
            if value is not None:
                row[key] = (row[key] or 0) + value
        for key in ("memory_bytes", "gpu_bytes"):
            row[key] = max(row[key] or 0, step[key] or 0)
    most = max([row["evaluation"] or 0 for row in rows.values()] + [1e-9])
    return [row | {"share": f"{(row['evaluation'] or 0) / most:.3f}"} for row in rows.values()]


def _strongest(units: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    known = [unit for unit in units if math.isfinite(unit["delta"])]
    return sorted(
        known, key=lambda unit: -unit["delta"] if len(known) <= MOST_UNITS else -abs(unit["delta"])
    )[:MOST_UNITS]


def _indented(value: Any, depth: int = 0) -> str:
    """Return a record as indented lines, a list on one line."""
    if isinstance(value, Mapping):
        lines = [(str(key), _indented(item, depth + 1)) for key, item in value.items()]
        nested = "\n".join(f"{'  ' * depth}{key}: {item}" for key, item in lines)
        return f"\n{nested}" if depth else nested
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_indented(item, depth) for item in value) + "]"
    return "–" if value is None else str(value)
