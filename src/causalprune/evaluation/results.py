"""Evaluation results as versioned JSON records, and intervals on them.

Differences are paired: both models answered the same examples, which are resampled together, so the
large variation between examples cancels. Nothing here loads a model.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from causalprune.calibration import Skipped
from causalprune.core import CheckpointError, EvalResult, MismatchError, changes_since
from causalprune.evaluation.intervals import Floats, bootstrap, bounds, bracketed, opened, room
from causalprune.evaluation.tasks.repeating import TRAITS

Verdict = Literal["better", "worse", "no difference shown", "undefined"]
Row: TypeAlias = tuple[str, list[EvalResult]]
"""One model in a table: its label and its results."""

VERSION = 1
RESULTS, DRAWS = "results.json", "draws.json"
"""Names of the results in a run folder: of a run, and of runs on several draws."""
HIGHER_IS_BETTER = {
    "accuracy": True,
    "acc_norm": True,
    "nats_per_token": False,
    "perplexity": False,
    **{name: trait.higher_is_better for name, trait in TRAITS.items()},
}
SETTINGS = (
    *("chat_template", "date", "turns", "fold_system", "generation", "window", "task_version", "thinking"),
    *("read_as", "scorer"),
)
"""What two results that are compared must say alike."""
AT_CHANCE = "the loss of the right answers, as in arc_challenge_nll, says more"
BINARY = ("accuracy", "acc_norm", "loops", "phrases")
"""Metrics whose values are 0 or 1."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over `n` examples; the bounds are NaN for fewer than two."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Difference a − b of one metric on the same `n` examples, with its 95 % interval.

    `verdict` is about a: better or worse only where the interval excludes zero, in the metric's own
    direction; undefined where a value is not finite or fewer than two examples were measured.
    """

    difference: float
    low: float
    high: float
    n: int
    verdict: Verdict


@dataclass(frozen=True, repr=False)
class Tried:
    """One sparsity of a sweep: the difference to dense of every task, and whether all keep the share asked for."""

    sparsity: float
    differences: tuple[tuple[str, Comparison], ...]
    holds: bool

    def __repr__(self) -> str:
        found = ", ".join(
            f"{task} {d.difference:+.3g} {bracketed(d.low, d.high, d.n)}" for task, d in self.differences
        )
        return f"Tried({self.sparsity:g}: {'holds' if self.holds else 'does not hold'}; to dense: {found})"


def headline(result: EvalResult) -> float:
    """Return the value of a result: `Σ values / Σ weights`, through exp for a perplexity."""
    values, weights = _arrays(result)
    return float(_ratio(values.sum(), weights.sum(), result.metric))


def interval(result: EvalResult, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the value of a result with its bootstrap interval over examples."""
    return interval_of(result, resampled(result, resamples=resamples, seed=seed))


def paired_difference(a: EvalResult, b: EvalResult, *, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Return a − b with its paired bootstrap interval; MismatchError if the examples are not the same."""
    draws = (resampled(result, resamples=resamples, seed=seed) for result in (a, b))
    return difference_of(a, b, *draws)


def resampled(result: EvalResult, *, resamples: int = 10_000, seed: int = 0) -> Floats:
    """Return the value of a result on resamples of its examples: the same ones for every result on as many examples."""
    values, weights = _arrays(result)
    sums = bootstrap(np.stack([values, weights]), resamples, seed)
    return np.asarray(_ratio(sums[0], sums[1], result.metric))


def interval_of(result: EvalResult, draws: Floats) -> Interval:
    """Return the value of a result with the interval that its resampled values give."""
    n = len(result.values)
    if result.metric == "perplexity":
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            low, high = (float(np.exp(end)) for end in bounds(np.log(draws), n))
    else:
        low, high = bounds(draws, n)
    if result.metric in BINARY and math.isfinite(low):
        value, reach = headline(result), room(n)  # of what was never seen, or always
        low = min(low, value - reach) if value >= 1 else low
        high = max(high, value + reach) if value <= 0 else high
        low, high = max(low, 0.0), min(high, 1.0)
    return Interval(headline(result), low, high, n)


def difference_of(a: EvalResult, b: EvalResult, draws_a: Floats, draws_b: Floats) -> Comparison:
    """Return a − b with the interval that the resampled values of both give; as `paired_difference`."""
    _check_pair(a, b)
    with np.errstate(invalid="ignore"):
        low, high = bounds(draws_a - draws_b, len(a.values))
    difference = headline(a) - headline(b)
    if a.metric in BINARY and math.isfinite(low):
        change = [x - y for x, y in zip(a.values, b.values, strict=True)]
        low, high = opened(change, difference, low, high)
    verdict = _verdict(difference, low, high, higher_is_better(a))
    return Comparison(difference, low, high, len(a.values), verdict)


def higher_is_better(result: EvalResult) -> bool | None:
    """Return the direction of a result's metric, as a scorer's result says itself; None for one that is not known."""
    said: bool | None = result.description.get("higher_is_better")
    return HIGHER_IS_BETTER.get(result.metric, said)


def answered(result: EvalResult) -> str:
    """Return in words how the answers of a result ended; empty where none were written."""
    own = result.description.get("answers")
    return f"{own['not_ended']:.0%} did not end, {own['mean_tokens']:.0f} tokens" if own else ""


def read_as(result: EvalResult) -> str:
    """Return in words how the answers to problems of a file were read; empty for other results."""
    kind, guessed = (result.description.get(key) for key in ("read_as", "reading_guessed"))
    return f"answers read as {kind}{', as all targets end so' if guessed else ''}" if kind else ""


def left_out(result: EvalResult) -> str:
    """Return in words which rows of the data a result leaves out; empty where it leaves out none."""
    skipped = dict(result.description.get("skipped") or {})
    skipped.pop("also_in", None)  # calibration's
    return f"left out: {said}" if (said := str(Skipped(**skipped))) else ""


def at_chance(result: EvalResult) -> bool:
    """Tell whether the interval of a choice among options holds what choosing blindly gives."""
    chance = result.description.get("chance")
    return chance is not None and (own := interval(result)).low <= chance <= own.high


def of_task(result: EvalResult) -> list[str]:
    """Return what is to be known of a column whose intact model has this result: how answers were read, what it leaves out."""
    chance = ""
    if at_chance(result):
        chance = f"at chance ({result.description['chance']:.0%}), so it decides nothing; {AT_CHANCE}"
    return [f"{result.task}: {said}" for said in (read_as(result), left_out(result), chance) if said]


def averaged(results: Sequence[EvalResult]) -> EvalResult:
    """Return the result whose values are means over several draws of calibration data, on the same examples.

    Its description has the number of `draws` and their `spread`, the standard deviation of their results. Texts, which differ,
    are left out. A perplexity is the geometric mean of those of the draws.
    """
    first, n = results[0], len(results)
    for other in results[1:]:
        _check_pair(other, first)
    values = np.mean([_arrays(result)[0] for result in results], axis=0)
    spread = float(np.std([headline(result) for result in results], ddof=1)) if n > 1 else math.nan
    described = {**first.description, "draws": n, "spread": spread}
    if ends := [own for result in results if (own := result.description.get("answers"))]:
        means = {key: float(np.mean([own[key] for own in ends])) for key in ("not_ended", "mean_tokens")}
        described["answers"] = means if len(ends) == n else None
    return replace(
        first,
        values=tuple(values.tolist()),
        texts=(),
        prompts=(),
        golds=(),
        seconds=sum(result.seconds for result in results),
        description=described,
    )


def write_results(
    path: Path, results: Sequence[EvalResult], description: Mapping[str, Any] | None = None
) -> None:
    """Write results and what is to be said about the run; the file appears whole or not at all."""
    rows = [asdict(result) for result in results]
    write_json(path, {"description": dict(description or {}), "results": rows})


def read_results(path: Path) -> list[EvalResult]:
    """Return the results of a file, equal to those that were written."""
    rows = read_json(path).get("results")
    if not isinstance(rows, list):
        raise CheckpointError(f"{path} holds no results")
    try:
        return [_result(row) for row in rows]
    except (TypeError, KeyError) as cause:
        raise CheckpointError(f"{path}: a malformed result ({cause})") from cause


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a run's record: label and results of every model."""
    return [(row["label"], [_result(result) for result in row["results"]]) for row in record["rows"]]


def record_file(path: Path) -> Path:
    """Return the file that holds the results of a folder, a run's or that of its draws; a file stands for itself."""
    if not path.is_dir():
        return path
    drawn = not (path / RESULTS).exists() and (path / DRAWS).exists()
    return path / (DRAWS if drawn else RESULTS)


def load_rows(path: Path) -> list[Row]:
    """Return the rows of a run folder, of its `results.json`, or of a file of `evaluate` as one row."""
    file = record_file(path)
    record = read_json(file)
    if "rows" in record:
        return rows_of(record)
    return [(file.stem, read_results(file))]


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with the format's version: complete on disk before it gets its name.

    Numbers that are not finite are written as `{"float": "nan"}`, so the file is strict JSON.
    """
    text = json.dumps(_encoded({"version": VERSION, **record}), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete on disk before it gets its name."""
    try:
        _replace(path, text)
    except OSError as cause:
        raise CheckpointError(f"cannot write {path}: {cause}") from cause


def read_json(path: Path) -> dict[str, Any]:
    """Return a record written by `write_json`; CheckpointError for another version or a damaged file."""
    try:
        record = decoded(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"cannot read {path}: {getattr(cause, 'strerror', cause)}") from cause
    if not isinstance(record, dict) or "version" not in record:
        raise CheckpointError(f"{path} was not written by causalprune: name a file that was")
    if (version := record["version"]) != VERSION:
        raise CheckpointError(f"{path} has version {version!r}; this release reads version {VERSION}")
    return dict(record)


def kept_rows(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Return results as a ledger keeps them, where numbers that are not finite have no place."""
    return [_encoded(asdict(result)) for result in results]


def results_in(rows: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """Return the results that `kept_rows` made."""
    return [_result(row) for row in decoded(rows)]


def _result(row: Mapping[str, Any]) -> EvalResult:
    columns = {name: tuple(row[name]) for name in ("values", "weights", "examples", "texts")}
    shown = {name: tuple(row.get(name, ())) for name in ("prompts", "golds")}  # absent in older files
    return EvalResult(**{**row, **columns, **shown})


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if isinstance(value, Mapping):
        return {str(key): _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value


def decoded(value: Any) -> Any:
    """Return a record as it was before it was written where numbers that are not finite have no place."""
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
            return float(value["float"])
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def _arrays(result: EvalResult) -> tuple[Floats, Floats]:
    if not len(result.values) == len(result.weights) == len(result.examples) > 0:
        raise MismatchError(
            f"{result.task}: {len(result.values)} values, {len(result.weights)} weights and "
            f"{len(result.examples)} examples; one of each per example is wanted"
        )
    return np.array(result.values, dtype=np.float64), np.array(result.weights, dtype=np.float64)


def _ratio(values: Any, weights: Any, metric: str) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.divide(values, weights)
        return np.exp(ratio) if metric == "perplexity" else ratio


def _check_pair(a: EvalResult, b: EvalResult) -> None:
    if (a.task, a.metric) != (b.task, b.metric):
        raise MismatchError(f"{a.task} ({a.metric}) cannot be compared with {b.task} ({b.metric})")
    if a.examples != b.examples:
        shared = len(set(a.examples) & set(b.examples))
        raise MismatchError(
            f"{a.task}: results on different examples ({len(a.examples)} and {len(b.examples)}, {shared} shared); "
            "evaluate both models with the same limit, seed and data"
        )
    versions = [result.description.get("method_version", 1) for result in (a, b)]
    if a.weights != b.weights and a.metric in ("nats_per_token", "perplexity"):
        if versions[0] == versions[1]:
            raise MismatchError(
                f"{a.task}: the same examples are other numbers of tokens for both models, and losses of a token say nothing of each "
                "other: compare answers, or models of one tokenizer"
            )
        raise MismatchError(
            f"{a.task}: results of versions {versions[0]} and {versions[1]} of the method, between which "
            f"{changes_since(min(versions))}: measure both anew"
        )
    if len({own for result in (a, b) if (own := result.description.get("data"))}) > 1:
        raise MismatchError(f"{a.task}: the file was changed between these results: measure both models anew")
    for key in SETTINGS:
        if (one := a.description.get(key)) != (other := b.description.get(key)):
            raise MismatchError(
                f"{a.task}: results of different settings ({key} is {one!r} and {other!r}): evaluate both models alike"
            )


def _verdict(difference: float, low: float, high: float, higher: bool | None) -> Verdict:
    if higher is None or not all(map(math.isfinite, (difference, low, high))):
        return "undefined"
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == higher else "worse"
