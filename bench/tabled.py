"""Tables of circuits, corrections and files that ship, for `tables.py`."""

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from common import ROWS, record

from causalprune.circuits.curves import SHARES, areas, faithfulness, resampled

DECIDED = 60
"""Problems that sizes are measured on, the first half of which chooses between orders."""
SHOWN = {"5 %": 5, "10 %": 6, "20 %": 7, "50 %": 8}
"""Sizes whose losses are shown: MIB's, by their place."""
MISSING = "Not measured yet.\n"


def _step(name: str, step: str) -> Any:
    """Return what a step of a result file has, None where it was not made."""
    found = record(name)["raw"].get(step)
    return found and found["raw"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(own)} |" for own in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]]) + "\n"


def constructed() -> str:
    """Which circuits that were built each estimator finds exactly, by what takes the place of closed heads."""
    found = _step("circuits", "constructed")
    rows = dict.fromkeys(key.split(", ")[1] for key in found)
    names = dict.fromkeys(key.split(", ")[0] for key in found)
    ablations = dict.fromkeys(key.split(", ")[2] for key in found)
    lines = [f"| estimator | {' | '.join(ablations)} |", "|---|" + "---|" * len(ablations)]
    for row in rows:
        cells = []
        for ablation in ablations:
            own = [name for name in names if found[f"{name}, {row}, {ablation}"]["exact"]]
            cells.append("all four" if len(own) == len(names) else ", ".join(own) or "none")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def planted(model: str) -> str:
    """At which ranks five planted neurons are, by what their removal costs and by how they are looked for."""
    found = _step("circuits", "planted") or {}
    rows = [own for key, own in found.items() if key.startswith(f"{model}-")]
    if not rows:
        return MISSING
    labels = list(rows[0]["ways"])
    costs = sorted({own["nats"] for own in rows}, reverse=True)
    own = {
        (label, cost): np.median([row["ways"][label]["ranks"] for row in rows if row["nats"] == cost], 0)
        for label in labels
        for cost in costs
    }
    cells = [
        [label, *(f"{own[label, cost][0]:.0f} … {own[label, cost][-1]:.0f}" for cost in costs)]
        for label in labels
    ]
    return _table(["looked for by", *(f"{cost:g} nat{'s' if cost != 1 else ''}" for cost in costs)], cells)


METHODS = (
    *(
        "kl learned",
        "learned",
        "kl integrated x3",
        "kl gradient",
        "integrated x3",
        "integrated",
        "gradient",
        "relevance",
    ),
    *("adaptive", "activation", "magnitude", "wanda", "random"),
)
"""Ways of ordering units, as `circuits.py` names their rows."""


def grid(units: str) -> str:
    """What circuits of SmolLM2 lose on GSM8K by every way of ordering units, in nats a token, and how large they have to be."""
    rows = []
    for method in METHODS:
        name = f"smollm2-gsm8k-{units}-{method.replace(' ', '_')}-absolute-zero-*.json"
        own = [json.loads(file.read_text()) for file in sorted((ROWS / "circuits").glob(name))]
        if not own:
            continue
        every = np.array([draw["nats"] for draw in own])[:, :, DECIDED // 2 :]  # the half that chose nothing
        nats = every.mean((0, 2))
        cpr, cmd = areas(SHARES, faithfulness(nats[:-2], nats[-2], nats[-1]))
        lost = [f"{nats[at] - nats[-2]:.2f}" for at in SHOWN.values()]
        size = float(np.mean([draw["size"] for draw in own]))
        keeps = f"{size:.0%}" if np.isfinite(size) else ""  # nobody looks for one of a baseline's
        rows.append([method, str(len(own)), *lost, f"{float(cmd):.2f}", f"{float(cpr):.2f}", keeps])
    return _table(["order", "draws", *SHOWN, "CMD", "CPR", "keeps 90 %"], rows) if rows else MISSING


def ioi() -> str:
    """Areas of circuits of pairs, by model and method."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((ROWS / "circuits").glob("ioi-*-*.json")):
        _, model, method = file.stem.split("-", 2)
        found.setdefault(model, {})[method.replace("_", " ")] = json.loads(file.read_text())
    if not found:
        return MISSING
    methods = [m for m in METHODS if any(m in own for own in found.values())]
    rows = [[m, *(_areas(own[m]["nats"]) if m in own else "" for own in found.values())] for m in methods]
    return _table(["CMD · CPR", *found], rows)


def _areas(nats: list[list[float]]) -> str:
    """Return CMD with its interval, and CPR, on the half of the problems that chose nothing."""
    values = torch.tensor(nats, dtype=torch.float64)[:, len(nats[0]) // 2 :]
    parts = values[:-2], values[-2:-1], values[-1:]
    cpr, cmd = areas(SHARES, faithfulness(*(part.mean(1).numpy() for part in parts)))
    draws = areas(SHARES, faithfulness(*(resampled(part) for part in parts)))[1]
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{float(cmd):.2f} [{low:.2f}, {high:.2f}] · {float(cpr):.2f}"


def removal() -> str:
    """What removing the first units of each circuit does to each task, in nats a token."""
    found = _step("circuits", "tested")
    if not found:
        return MISSING
    both = found["overlap"]
    rows = []
    for name, own, chance in zip(both["names"], both["removal"], both["random"], strict=True):
        rows.append([f"first {both['removed'][0]} of {name}", *(_value(one) for one in own)])
        rows.append(["as many by chance", *(_value(one) for one in chance)])
    return _table(["removed", *both["names"]], rows)


def overlaps() -> str:
    """How alike the default circuits of heads of three tasks are, and the orders that other problems would have given."""
    found = _step("circuits", "tested")
    if not found:
        return MISSING
    both, rows = found["overlap"], []
    for one, other in itertools.combinations(range(len(both["names"])), 2):
        names = [both["names"][at] for at in (one, other)]
        alike, beyond = (both[key][one][other] for key in ("jaccard", "over_chance"))
        chance = (alike - beyond) / (1 - beyond)
        rows.append([" and ".join(names), f"{alike:.2f}", f"{chance:.2f}", f"{beyond:.2f}"])
    for name, own in found["circuits"].items():
        for share in ("0.2", "0.5"):
            alike, beyond = (own["stability"][share][key] for key in ("jaccard", "over_chance"))
            chance = (alike - beyond) / (1 - beyond)
            label = f"{name}, resamples of its problems, {float(share):.0%} of the heads"
            rows.append([label, f"{alike:.2f}", f"{chance:.2f}", f"{beyond:.2f}"])
    return _table(["circuits", "Jaccard", "by chance", "above chance"], rows)


def elsewhere() -> str:
    """Areas of circuits of heads on other tasks and with other ablations, by the default and by slopes of the intact model."""
    found = _step("circuits", "elsewhere")
    if not found:
        return MISSING
    rows = [[key, f"{own['cmd']:.2f}", f"{own['cpr']:.2f}"] for key, own in found.items()]
    return _table(["model, task, ablation, order", "CMD", "CPR"], rows)


def compression() -> str:
    """Perplexity of SmolLM2 at half of the weights of each row, by four criteria."""
    found = _step("circuits", "compression")
    rows = [[name, f"{own['perplexity']:.4g}"] for name, own in (found or {}).items()]
    return _table(["half of the weights by", "perplexity"], rows) if rows else MISSING


def tests() -> str:
    """The tests of the default circuit of heads of GSM8K in SmolLM2."""
    file = ROWS / "circuits" / "default-gsm8k.json"
    if not file.exists():
        return MISSING
    rows = []
    for name, own in json.loads(file.read_text())["tests"].items():
        if isinstance(own, dict):
            what = next(key for key in ("beaten", "ahead", "hsic", "tested") if key in own)
            seen = f"{what} {own[what]:.2g}" if what == "hsic" else f"{what} {own[what]}"
            seen += f" of {own['of']}" if "of" in own else ""
            rows.append([name.replace("_", " "), seen, f"{own['p']:.2g}", "yes" if own["holds"] else "no"])
    return _table(["test", "seen", "p", "holds"], rows)


def _value(own: dict[str, float]) -> str:
    return f"{own['value']:+.2f} [{own['low']:+.2f}, {own['high']:+.2f}]"


CIRCUITS: dict[str, Callable[[], str]] = {
    "constructed": constructed,
    "planted": partial(planted, "smollm2"),
    "planted_qwen": partial(planted, "qwen"),
    "grid_neurons": partial(grid, "neurons1"),
    "grid_heads": partial(grid, "heads"),
    "grid_both": partial(grid, "heads+neurons1"),
    "ioi": ioi,
    "removal": removal,
    "overlaps": overlaps,
    "elsewhere": elsewhere,
    "tests": tests,
    "compression": compression,
}


LOOPS = {
    "loops": "wikitext2_loops:200",
    "rep-4": "wikitext2_rep4:200",
    "perplexity": "wikitext2_ppl:40000",
    "GSM8K": "gsm8k_nll:200",
}
"""What is shown of a corrected model, before and after."""


def corrected() -> str:
    """What is left of loops, and of the rest, for every way of choosing that was measured."""
    rows, before = [], [""] * len(LOOPS)
    for file in sorted((ROWS / "correction" / "smollm2" / "row").glob("*.json")):
        own = json.loads(file.read_text())
        if "values" not in own:
            continue
        cells = [own["values"].get(task) for task in LOOPS.values()]
        before = [old if cell is None else f"{cell[0]:.3g}" for old, cell in zip(before, cells, strict=True)]
        label, _, draw = file.stem.rpartition("-")
        count = own.get("found", {}).get("chosen", {}).get("count", "")
        rows.append(
            [
                f"{label}, draw {draw}",
                str(count),
                *("" if cell is None else f"{cell[1]:.3g}" for cell in cells),
            ]
        )
    return _table(["corrected", "parts", *LOOPS], [["nothing", "0", *before], *rows]) if rows else MISSING


MADE = {
    "dense": "whole",
    "ours": "`shrink`, the default",
    "untrained": "`shrink --update none`",
    "before": "the build before",
}
"""What a model is called that `shrink` has made, or has not; others are peers'."""
NAMES = {"smollm2": "SmolLM2", "qwen": "Qwen2.5-Coder-0.5B"}


def shrunk() -> str:
    """What a fifth of the parameters costs, with this build, the one before and peers, on the same problems."""
    rows = list[list[str]]()
    for step in ("smollm2_20", "smollm2_30", "qwen_20"):
        own = _step("fit", step)
        for label, results in (own["measured"] if own else {}).items():
            apart = own["differences"].get(f"ours - {label}")
            cells = [f"{_signed(pair)}" for pair in apart] if apart else ["", ""]
            values = [f"{result['value']:.{digits}f}" for result, digits in zip(results, (3, 1), strict=True)]
            name, _, share = step.partition("_")
            rows.append([f"{NAMES[name]} −{share} %, {MADE.get(label, label)}", *values, *cells])
    head = ["", "GSM8K, nats", "perplexity", "`shrink` less it, nats", "less it, perplexity"]
    return _table(head, rows) if rows else MISSING


def files() -> str:
    """What `fit` chooses within sizes, and the best file that is whole."""
    rows = list[list[str]]()
    for step in ("smollm2_files", "qwen_files"):
        for size, own in (_step("fit", step) or {}).items():
            points = {point["name"]: point for point in own["points"]}
            chosen, whole = own["chosen"], points.get(own["best_whole"])
            cells = [f"{size} MB", f"{own['dense']['value']:.3f}", *_shown(chosen), *_shown(whole)]
            pair = own["minus_best_whole"]
            rows.append(
                [
                    f"{NAMES[step.removesuffix('_files')]}, {cells[0]}",
                    *cells[1:],
                    _signed(pair) if pair else "",
                ]
            )
    head = ["within", "dense", "chosen", "MB", "nats", "best whole", "MB", "nats", "chosen less whole"]
    return _table(head, rows) if rows else MISSING


def _shown(point: dict[str, Any] | None) -> list[str]:
    return (
        ["–", "", ""]
        if point is None
        else [point["name"], f"{point['bytes'] / 1e6:.1f}", f"{point['value']:.3f}"]
    )


def _signed(pair: dict[str, float]) -> str:
    return f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"


OTHERS: dict[str, Callable[[], str]] = {"corrected": corrected, "shrunk": shrunk, "files": files}
