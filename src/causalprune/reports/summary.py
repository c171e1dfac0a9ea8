"""From evidence to what a report says: values, differences, verdicts, a recommendation, what is missing.

Everything here is plain Python (dicts, lists, numbers that may be NaN, text), the same for page, JSON and CSV.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from causalprune.core import EvalResult, MismatchError, versions
from causalprune.evaluation import (
    Floats,
    Row,
    answered,
    at_chance,
    difference_of,
    headline,
    higher_is_better,
    interval_of,
    resampled,
    rows_of,
)
from causalprune.reports.evidence import CHECKPOINTS, LEDGER, Evidence, by_matrix
from causalprune.reports.examples import flips
from causalprune.reports.judging import Verdict, is_calibrated, judge, kind_of

UNITS = {
    "nats_per_token": "nats per token",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "acc_norm": "accuracy by option length",
    "rep4": "share of 4-grams that are repeated",
    "loops": "share that ends in a loop",
    "uniqueness": "distinct words over words",
    "diversity": "product of shares of distinct n-grams",
    "phrases": "share with a phrase of the list",
}
VERDICTS = ("better", "no difference shown", "worse", "undefined")
ABOUT = ("label", "criterion", "scope", "sparsity", "parameters", "bytes", "speed")
"""What a row says of its model."""
Cell = dict[str, Any]


def summary(runs: Sequence[Evidence]) -> dict[str, Any]:
    """Return everything that a report on these runs says."""
    names = _names(runs)
    told = [_run(name, run) for name, run in zip(names, runs, strict=True)]
    return {
        "version": 1,
        "causalprune": versions()["causalprune"],
        "runs": told,
        "comparison": _comparison(told),
    }


def _names(runs: Sequence[Evidence]) -> list[str]:
    """Return the names of folders, with their parents where two are alike."""
    short = [run.folder.resolve().name for run in runs]
    if len(set(short)) == len(short):
        return short
    return ["/".join(run.folder.resolve().parts[-2:]) for run in runs]


def _run(name: str, run: Evidence) -> dict[str, Any]:
    rows, tasks, models = _measured(run.record, run.rows)
    recipe, recommended = run.record.get("recipe") or {}, judge(models, tasks)
    more = [own.get("description", {}) for own in (*run.overlaps, run.stability or {})]
    others = [str(own.get("model", "")) for own in (*run.circuits, *run.corrections, *more)]
    ran = bool(run.record or run.rows) or (run.folder / LEDGER).exists()
    return {
        "name": name,
        "ran": ran,
        "model": _model_name(recipe, rows, others),
        "tasks": tasks,
        "models": models,
        "recommended": {**asdict(recommended), "checkpoint": _checkpoint(run, recommended.label)},
        "against_wanda": _against_wanda(models),
        "missing": _missing(run, models, tasks, ran=ran),
        "cost": _cost(run, rows),
        "effects": [
            {k: v for k, v in vars(own).items() if k not in ("reliability", "made")} for own in run.effects
        ],
        "zeros": _zeros(run),
        "heads": run.heads,
        "doses": _doses(run),
        "stability": {
            "effects": run.effects[0].reliability if run.effects else {},
            "study": run.stability or {},
        },
        "examples": flips(rows),
        "circuits": list(run.circuits),
        "overlaps": list(run.overlaps),
        "corrections": list(run.corrections),
        "provenance": _provenance(run, rows) if ran else _made(run),
    }


def verdict(record: Mapping[str, Any]) -> Verdict:
    """Return what is to be said of a run from what its `results.json` holds."""
    _, tasks, models = _measured(record, record["rows"])
    return judge(models, tasks)


def _measured(
    record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Row], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the results of a run by label, its tasks, and its models with a cell for every task."""
    found = [(str(label), results) for label, results in rows_of({"rows": rows})]
    tasks = _tasks(found, frozenset((record.get("calibration") or {}).get("sources") or ()))
    models = _models(rows, found, tasks)
    dense = [result for label, results in found for result in results if label in _dense(rows)]
    chance = {
        task_key(own): at_chance(own) or (own.metric == "accuracy" and not headline(own))
        for own in dense
        if own.values
    }
    return found, [task | {"at_chance": chance.get(task["key"], False)} for task in tasks], models


def _dense(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the label of the intact model, if it is there."""
    return [str(row["label"]) for row in rows if row["criterion"] == "dense"][:1]


def _tasks(rows: Sequence[Row], sources: Set[str]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for result in (result for _, results in rows for result in results):
        if (higher := higher_is_better(result)) is not None:
            key, unit = task_key(result), UNITS.get(result.metric, result.metric)
            own: dict[str, Any] = {"key": key, "task": result.task, "metric": result.metric, "unit": unit}
            own |= {"higher_is_better": higher, "n": len(result.values)}
            own |= {"kind": kind_of(result), "calibrated": is_calibrated(result.task, sources)}
            more = (len(f"{prompt}.".split()) > 1 for prompt in result.prompts)  # than a text's first token
            own["asks"] = not result.prompts or any(more)
            found.setdefault(key, own)
    return list(found.values())


def task_key(result: EvalResult) -> str:
    """Return the name of a column: a task may be measured in two ways."""
    return f"{result.task} · {result.metric}"


def _models(
    told: Sequence[Mapping[str, Any]], rows: Sequence[Row], tasks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return one entry for each model, with a cell for every task that is measured."""
    about = {str(row["label"]): row for row in told}
    draws: dict[tuple[str, str], tuple[EvalResult, Floats | None]] = {}
    for label, results in rows:
        for result in results:
            usable = len(result.values) == len(result.weights) == len(result.examples) > 0
            draws[label, task_key(result)] = result, resampled(result) if usable else None
    dense = next(iter(_dense(told)), None)
    models = []
    for label, row in about.items():
        wanda = _wanda_for(row, about)
        cells: dict[str, Cell] = {}
        for task in tasks:
            if (label, task["key"]) in draws:
                cells[task["key"]] = _cell(draws, label, task["key"], dense, wanda)
        own = {key: row.get(key) for key in ABOUT} | {"removed": row.get("removed") or 0.0}
        zeros = (row.get("pruned") or {}).get("sparsity")
        own |= {"share": own["removed"] or own["sparsity"], "method": _method(row), "achieved": zeros}
        models.append({**own, "wanda": wanda, "cells": cells})
    return models


def _cell(
    draws: Mapping[tuple[str, str], tuple[EvalResult, Floats | None]],
    label: str,
    key: str,
    dense: str | None,
    wanda: str | None,
) -> Cell:
    """Return value and interval, and the paired differences to the dense model and to Wanda."""
    result, own = draws[label, key]
    if own is None:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0, "dense": None, "wanda": None}
    cell: Cell = asdict(interval_of(result, own)) | {"ended": answered(result)}
    for name, other in (("dense", dense), ("wanda", wanda)):
        found = draws.get((other or "", key))
        cell[name] = None
        if other != label and found is not None and found[1] is not None:
            try:
                cell[name] = {**asdict(difference_of(result, found[0], own, found[1])), "note": None}
            except MismatchError:
                unknown = dict.fromkeys(("difference", "low", "high"), math.nan)
                cell[name] = {**unknown, "verdict": "undefined", "note": "measured on other examples"}
    return cell


def _wanda_for(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the label of plain Wanda at the same sparsity, by rows if it was run in several ways."""
    same = [
        label
        for label, other in rows.items()
        if other["criterion"] == "wanda" and "+" not in label and other["sparsity"] == row["sparsity"]
    ]
    same.sort(key=lambda label: rows[label]["scope"] != "row")
    return same[0] if same and row["criterion"] != "dense" else None


def _method(row: Mapping[str, Any]) -> str:
    """Return the name of a method without its sparsity, or the share that it removes: `cap-global`."""
    return str(row["label"]).removesuffix(f"-{row.get('removed') or row['sparsity'] or 0:g}")


def _checkpoint(run: Evidence, label: str | None) -> str | None:
    """Return where the recommended checkpoint is, if the run kept it."""
    return f"{run.folder}/{CHECKPOINTS}/{label}" if label in run.manifests else None


def _against_wanda(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Count the verdicts of every method against Wanda at the same sparsity."""
    counts: dict[str, dict[str, Any]] = {}
    for model in models:
        for cell in model["cells"].values():
            if cell["wanda"]:
                row = counts.setdefault(
                    model["method"], {"method": model["method"], **dict.fromkeys(VERDICTS, 0)}
                )
                row[cell["wanda"]["verdict"]] += 1
    return list(counts.values())


def _missing(
    run: Evidence, models: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]], *, ran: bool
) -> list[str]:
    """Return a sentence for everything that a reader might look for in vain."""
    said = []
    recipe = run.record.get("recipe") or {}
    wanted = run.record.get("cells") or [m["label"] for m in models]
    done = [m["label"] for m in models if len(m["cells"]) >= len(tasks) > 0]
    if left := [label for label in wanted if label not in done]:
        counts = f"{len(wanted) - len(left)} of {len(wanted)} models are measured on all tasks"
        said.append(f"The run is not finished: {counts}, {', '.join(left)} not yet.")
    if ran and not recipe:
        said.append(
            "There is no results.json: values come from ledgers, and recipe and versions are not known."
        )
    if ran and not models:
        said.append(
            "No model was evaluated here: `causalprune run` compares pruned models with the dense one."
        )
    elif models and not any(m["criterion"] == "wanda" for m in models):
        said.append("Wanda was not run, so methods are compared with the dense model only.")
    empty = sorted({key for m in models for key, cell in m["cells"].items() if not cell["n"]})
    if empty:
        said.append(f"No examples were measured for {', '.join(empty)}.")
    odd = {
        key
        for m in models
        for key, cell in m["cells"].items()
        if cell["n"] and not math.isfinite(cell["value"])
    }
    if odd:
        said.append(
            f"Some values of {', '.join(sorted(odd))} are not finite: those models are broken there, and have no interval."
        )
    if any(cell["n"] == 1 for m in models for cell in m["cells"].values()):
        said.append("Where a single example was measured there is no interval, and no verdict.")
    if run.effects and run.effects[0].subsets == 1:
        said.append("The calibration set is one subset: agreement between subsets is not known.")
    return said


def _cost(run: Evidence, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return seconds, tokens and peak memory of each step; None where a run did not record it."""
    steps = []
    attribution = run.record.get("attribution")
    if attribution:
        steps.append(_step("attribution", attribution))
    about = {str(row["label"]): row.get("pruned") for row in run.rows}
    for label, results in rows:
        if pruned := about[label]:
            steps.append(_step(f"{label}: pruning", pruned))
        seen: dict[str, EvalResult] = {result.task: result for result in results}  # metrics share a pass
        for task, result in seen.items():
            steps.append(_step(f"{label}: {task}", {"seconds": result.seconds, **result.description}))
    return steps


def _step(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    memory = values.get("peak_bytes") or {}
    return {
        "step": name,
        "seconds": values.get("seconds"),
        "tokens": values.get("tokens_forwarded"),
        "memory_bytes": memory.get("process"),
        "gpu_bytes": memory.get("gpu"),
    }


def _zeros(run: Evidence) -> dict[str, list[list[Any]]]:
    """Return `[layer, matrix, weights, zeros]` of every pruned model."""
    found = {
        str(row["label"]): row["pruned"]["matrices"]
        for row in run.rows
        if "matrices" in (row.get("pruned") or {})
    }
    sparse = {label: own for label, own in run.manifests.items() if "shrink" not in own["run"]}
    return {label: by_matrix(m["sparsity"]["projections"]) for label, m in sparse.items()} | found


def _doses(run: Evidence) -> dict[str, dict[str, Any]]:
    """Return dose–response curves: `groups` with layer, part, matrices and nats per token at every one of `sparsities`."""
    found = {label: m["run"].get("dose_response") for label, m in run.manifests.items()}
    found |= {
        str(row["label"]): (row.get("pruned") or {}).get("dose_response") or found.get(row["label"])
        for row in run.rows
    }
    curves = {}
    for label, own in found.items():
        if own:
            groups = []
            for members, nats in zip(own["members"], own["nats"], strict=True):
                _, layer, *_, role = members[0].split(".")
                part = "mlp" if role in ("gate", "up", "down") else "attention"
                roles = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in members))
                groups.append({"layer": int(layer), "part": part, "matrices": roles, "nats": nats})
            curves[label] = {"sparsities": own["sparsities"], "groups": groups}
    return curves


def _provenance(run: Evidence, rows: Sequence[Row]) -> dict[str, Any]:
    record = run.record
    data = {}
    for result in (result for _, results in rows[:1] for result in results):
        digest = hashlib.sha256("\n".join(result.examples).encode()).hexdigest()
        data[result.task] = f"{len(result.examples)} examples, SHA-256 of their hashes {digest}"
    identity = record.get("identity") or {}
    return {
        "command": record.get("command"),
        "recipe": record.get("recipe"),
        "seed": identity.get("seed"),
        "model SHA-256": identity.get("model"),
        "calibration SHA-256": identity.get("calibration"),
        "calibration": record.get("calibration"),
        "evaluation data": data,
        "versions": record.get("versions"),
        "commit": record.get("git_commit"),
    }


def _made(run: Evidence) -> dict[str, Any]:
    """Return the provenance of what was found without a run; by name where parts of it differ."""
    parts = {own["name"]: own["made"] for own in (*run.circuits, *run.corrections)}
    parts |= {own.name: own.made for own in run.effects}
    if own := run.stability:
        parts["stability"] = {"versions": own["description"]["versions"], "commit": own["git_commit"]}
    found = {}
    for key in dict.fromkeys(key for made in parts.values() for key in made):
        values = {name: made[key] for name, made in parts.items() if made.get(key) is not None}
        first = next(iter(values.values()), None)
        found[key] = first if all(value == first for value in values.values()) else values
    return found


def _model_name(recipe: Mapping[str, Any], rows: Sequence[Row], others: Sequence[str]) -> str:
    """Return the name that the recipe has for the model, or one of `others`; for a folder, and for the embedded model, its last part."""
    found = [str(result.description.get("model") or "") for _, results in rows for result in results]
    found += others
    named = str((recipe.get("model") or {}).get("name") or "")
    loaded = next((name for name in found if name), "")
    if named in ("", "embedded"):
        named = loaded or named
    return (
        named.rstrip("/").rpartition("/")[2]
        if named.startswith(("/", "~", "."))
        else named or "unknown model"
    )


def _comparison(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the dense and the recommended model of every run, task by task; nothing for a single run."""
    if len(runs) < 2:
        return []
    found = []
    for run in runs:
        labels = ["dense", run["recommended"]["label"]]
        named = {"run": run["name"], "model": run["model"]}
        found += [m | named for m in run["models"] if m["label"] in labels]
    return found
