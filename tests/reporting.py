"""Made-up run folders of any size and malice, with the numbers that a real run would write."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from causalprune.checkpoints.saving import save_effects
from causalprune.core.types import Effects, EvalResult, Unit, UnitKind
from causalprune.evaluation.results import write_json

TASKS = {"gsm8k_cot": "accuracy", "own_nll": "nats_per_token", "wikitext2_ppl": "perplexity"}
METHODS = ("magnitude-matrix", "wanda-row", "cap-global")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
SPEED = {
    "reading": 120.0,
    "writing": 12.5,
    "dense_reading": 100.0,
    "dense_writing": 10.0,
    "reading_gain": 1.2,
}
SPEED |= {"writing_gain": 1.25, "rounds": 5}
TIMED: dict[str, Any] = {**SPEED, "how": "a clock, on paper"}


def made_effects(
    layers: int, heads: int, *, subsets: int = 3, others: Sequence[UnitKind] = (), estimated: bool = False
) -> Effects:
    """Return effects of heads and whole blocks on six sequences; every third head helps when it is removed."""
    units = [Unit(layer, head) for layer in range(layers) for head in range(heads)]
    units += [Unit(layer, 0, kind) for layer in range(layers) for kind in others]
    generator = torch.Generator().manual_seed(layers * heads)
    tokens = torch.full((6,), 20)
    size = torch.tensor([(-0.01 if i % 3 == 0 else 0.02) * (1 + i % 7) for i in range(len(units))])
    change = (size[:, None] + 0.002 * torch.randn(len(units), 6, generator=generator)) * 20
    intact = torch.full((6,), 30.0, dtype=torch.float64)
    subset = torch.arange(6) % subsets
    description = {"estimator": {"name": "adaptive" if estimated else "exact"}, "tokens_forwarded": 1e6}
    predicted: dict[str, Any] = {}
    masked = intact + change.double()
    if estimated:
        predicted = {
            "predicted_nats": 0.8 * change.double(),
            "curvature_nats": 0.1 + change.double().abs().sum(1) / 120,
        }
        masked[len(units) // 2 :] = math.nan
    return Effects(tuple(units), masked, intact, tokens, subset, "m" * 64, "c" * 64, description, **predicted)


def made_result(
    task: str, metric: Any, loss: float, *, n: int = 40, seed: int = 0, texts: bool = True
) -> EvalResult:
    """Return the result of a model that lost so much: 0/1 outcomes, or nats of examples with 20 tokens each."""
    draw = random.Random(f"{task}{seed}{loss}")
    if metric in ("accuracy", "acc_norm"):
        values = tuple(float(draw.random() > 0.3 + 0.5 * loss) for _ in range(n))
    else:
        values = tuple(20 * (1.2 + loss + 0.1 * draw.random()) for _ in range(n))
    weights = tuple(1.0 if metric in ("accuracy", "acc_norm") else 20.0 for _ in range(n))
    shown: dict[str, Any] = {}
    if texts:
        shown["texts"] = tuple(f"answer {i} at {loss:g}" for i in range(n))
        shown["prompts"] = tuple(f"What is {i} + {i}?" for i in range(n))
        shown["golds"] = tuple(str(2 * i) for i in range(n))
    about = {"model": "maker/model", "tokens_forwarded": 1000 * n, "peak_bytes": {"process": 2**31}}
    examples = tuple(f"{task}-{i}" for i in range(n))
    return EvalResult(task, metric, values, weights, examples, seconds=2.5, description=about, **shown)


def _row(label: str, sparsity: float, layers: int, heads: int) -> dict[str, Any]:
    """Return what a row says of its model, besides the results."""
    name, _, scope = label.removesuffix(f"-{sparsity:g}").rpartition("-")
    row: dict[str, Any] = {"label": label, "criterion": name or "dense", "scope": scope or None}
    row |= {"parameters": 1000, "bytes": 4000, "sparsity": sparsity}
    if scope == "shrink":
        size = {"parameters": round(1000 * (1 - sparsity)), "bytes": round(4000 * (1 - sparsity))}
        row |= {**size, "criterion": "shrink", "scope": None, "sparsity": 0.0, "removed": sparsity}
        row |= {"speed": TIMED, "pruned": {**size, "speed": TIMED, "seconds": 4.0}}
    elif sparsity:
        zeros = [[i, role, 1000, int(1000 * sparsity)] for i in range(layers) for role in ROLES]
        row["pruned"] = {
            "sparsity": sparsity,
            "seconds": 4.0,
            "tokens_forwarded": 5000,
            "peak_bytes": {"process": 2**31},
            "matrices": zeros,
            "heads": [[sparsity + 0.01 * h for h in range(heads)] for _ in range(layers)],
        }
        if name == "cap":
            members = [[f"layers.{i}.{role}"] for i in range(layers) for role in ("q", "up")]
            nats = [[0.01, 0.05, 0.2 + 0.1 * i] for i in range(len(members))]
            row["pruned"]["dose_response"] = {
                "members": members,
                "sparsities": [0.3, 0.5, 0.7],
                "nats": nats,
            }
    return row


def write_run(  # noqa: PLR0913 (whatever a run may be)
    folder: Path,
    *,
    layers: int = 3,
    heads: int = 4,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float] = (0.2, 0.5),
    tasks: dict[str, Any] = TASKS,
    n: int = 40,
    subsets: int = 3,
    model: str = "maker/model",
    others: Sequence[UnitKind] = ("attention", "mlp"),
    change: Callable[[str, EvalResult], EvalResult] = lambda _, result: result,
    left: int = 0,
) -> Path:
    """Write a run folder whose last `left` models are not measured yet; `change` may spoil any result."""
    folder.mkdir(parents=True, exist_ok=True)
    save_effects(made_effects(layers, heads, subsets=subsets, others=others), folder / "effects.json")
    cells = [("dense", 0.0), *((f"{m}-{s:g}", s) for m in methods for s in sparsities)]
    rows = []
    for number, (label, sparsity) in enumerate(cells[: len(cells) - left]):
        loss = sparsity * (1 + 0.2 * number)
        results = [made_result(task, metric, loss, n=n) for task, metric in tasks.items()]
        row = _row(label, sparsity, layers, heads)
        rows.append({**row, "results": [asdict(change(label, r)) for r in results]})
    record = {
        "recipe": {"model": {"name": model}, "methods": list(methods), "sparsities": list(sparsities)},
        "cells": [label for label, _ in cells],
        "command": "causalprune run own.yaml",
        "identity": {"model": "m" * 64, "calibration": "c" * 64, "seed": 0},
        "calibration": {"sources": {"gsm8k": 48}, "tokens": 9000},
        "versions": {"causalprune": "0.1.0"},
        "git_commit": "0" * 40,
        "attribution": {"seconds": 60.0, "tokens_forwarded": 1e6},
        "rows": rows,
    }
    write_json(folder / "results.json", record)
    return folder


ATTACK = (
    '</script><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>\u2028'
)
"""Markup that would change the title of the page if any of it were taken for markup."""


def _texts(label: str, result: EvalResult) -> EvalResult:
    spoiled = tuple(f"{i} {ATTACK}" for i in range(len(result.values)))
    return replace(result, prompts=spoiled, golds=spoiled, texts=spoiled)


def _numbers(label: str, result: EvalResult) -> EvalResult:
    odd = {"dense": math.nan, "cap-global-0.5": math.inf, "wanda-row-0.2": -math.inf}.get(label)
    return result if odd is None else replace(result, values=(odd, *result.values[1:]))


HOSTILE: dict[str, dict[str, Any]] = {
    "task": {"tasks": {f"<script>alert(1)</script>{ATTACK}": "accuracy", "own_nll": "nats_per_token"}},
    "texts": {"change": _texts},
    "method": {"methods": (f"wanda{ATTACK}-row", "wanda-row")},
    "name": {"model": "m" * 10_000},
    "markup": {"model": ATTACK},
    "numbers": {"change": _numbers},
    "nothing": {"n": 0},
    "single": {"n": 1},
    "subset": {"subsets": 1},
    "unfinished": {"left": 6},
}
"""Runs that a careless report would choke on, or execute."""
