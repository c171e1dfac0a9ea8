"""Which pruned model a run speaks for, and how far: green only where what matters was measured, and nothing fell."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from causalprune.calibration import OWN, TEXT_SOURCES, is_file
from causalprune.core import EvalResult, Size, Speed
from causalprune.evaluation import AT_CHANCE, TRAITS

Kind: TypeAlias = Literal["answers", "text", "loss", "choices", "habits"]
"""What a task measures: generated answers, general text, the loss of given solutions, a choice among given options, habits of writing."""

Told: TypeAlias = Mapping[str, Any]
"""A task or a model as `summary` tells of it."""

SPEED_OF_ZEROS = "runs at the dense model's speed, as runtimes multiply zeros like any other number"
QUANTISED_ZEROS = "Q8_0, Q6_K, Q4_0, MXFP4 and NVFP4 keep them; Q4_K, Q5_K and Q2_K lose nearly all"
"""What formats of llama.cpp make of zeros, by `bench/fit.py zeros`."""
RELIABLE = ((0.8, "good"), (0.6, "fair"), (-math.inf, "weak"))
RELIABLE_FROM = "good from 0.8, fair from 0.6, weak below"


@dataclass(frozen=True)
class Verdict:
    """The model that a run speaks for (None: none is measured yet), and what it says of it.

    `holds`: what matters was measured, and nothing is shown to be worse than the dense model. `size` is said of its size and
    speed; `measure` names a task that would say more.
    """

    label: str | None
    holds: bool
    headline: str
    reasons: tuple[str, ...] = ()
    size: str | None = None
    measure: str | None = None


@dataclass(frozen=True)
class _Judged:
    """One model: the tasks on which it is shown to be worse, those that cannot be compared, and those whose form alone it may have taken on."""

    model: Told
    tasks: Sequence[Told]
    worse: tuple[Told, ...]
    unknown: tuple[Told, ...]
    form: tuple[Told, ...]
    kinds: Set[Kind]
    loss: float

    @property
    def holds(self) -> bool:
        return not (self.worse or self.unknown) and (
            "answers" in self.kinds or ("text" in self.kinds and not self.form)
        )

    @property
    def order(self) -> tuple[Any, ...]:
        """What holds comes first, then what is shown to be worse nowhere; the smallest of those, then the sparsest."""
        size = (0.0, 0.0) if self.worse or self.unknown else (-self.model["removed"], -self.model["sparsity"])
        return not self.holds, len(self.worse) + len(self.unknown), *size, self.loss


def reliability_word(value: float) -> str:
    """Return a word for how alike two halves of the data rank the same parts: by `RELIABLE_FROM`."""
    return next((word for least, word in RELIABLE if value >= least), "not known")


def kind_of(result: EvalResult) -> Kind:
    """Return what a result measures, from the name of its task, its metric and whether text was generated."""
    if result.task.endswith(("_ppl", "_kl")):
        return "text"
    if result.metric in TRAITS:
        return "habits"
    if result.metric == "nats_per_token":
        return "loss"
    generated = result.task.endswith(("_answers", "_cot")) or result.description.get("generation") is not None
    return "answers" if generated or result.metric not in ("accuracy", "acc_norm") else "choices"


def is_calibrated(task: str, sources: Set[str]) -> bool:
    """Tell whether a task looks like what the methods were calibrated on; the user's own files do."""
    source = task.rpartition("_")[0]
    return source in {name.removeprefix(OWN) for name in sources} or is_file(source)


def judge(models: Sequence[Told], tasks: Sequence[Told]) -> Verdict:
    """Choose a pruned model, of those that are measured on all tasks beside the dense one, and say what is known of it."""
    blind = [task["task"] for task in tasks if task.get("at_chance")]
    tasks = [
        task for task in tasks if not task["task"].endswith("_kl") and not task.get("at_chance")
    ]  # a divergence is above the dense model's zero for every other
    keys = [task["key"] for task in tasks]
    full = [
        _judged(m, tasks)
        for m in models
        if m["criterion"] != "dense" and keys and all((m["cells"].get(k) or {}).get("dense") for k in keys)
    ]
    at_chance = f"{', '.join(dict.fromkeys(blind))}: the dense model is at chance there, or solves nothing, so it decides nothing; {AT_CHANCE}."
    if not full:
        text = (
            "Nothing can be recommended yet: no pruned model is measured on all tasks beside the dense one."
        )
        if blind and not keys:
            text = "Nothing can be recommended: nothing that was measured can decide."
        return Verdict(None, holds=False, headline=text, reasons=(at_chance,) if blind else ())
    best = min(full, key=lambda own: own.order)
    answers = None if "answers" in best.kinds else _answers_task(tasks)
    reasons = [_choice(best, full)]
    if best.form and "answers" not in best.kinds:
        reasons.append(
            "A lower loss on solutions like those of the calibration may be their form alone, and not that more problems are "
            f"solved: {f'add {answers} to the tasks' if answers else 'measure answers'}."
        )
    if "text" not in best.kinds:
        reasons.append("General text was not measured: nothing is known of what the task does not need.")
    if blind:
        reasons.append(at_chance)
    if best.unknown:
        reasons.append(
            f"Not to be compared with the dense model on {', '.join(task['task'] for task in best.unknown)}: too few problems, or others."
        )
    others = sorted((own for own in full if own is not best and best.holds), key=lambda own: own.order)
    for own in (own for own in others if bool(own.model["removed"]) != bool(best.model["removed"])):
        if own.holds:
            reasons.append(f"Beside it {own.model['label']} holds too: {_size(own.model, models)}.")
            break
    if more := [own.model["label"] for own in others if own.order[2:] < best.order[2:] and not own.worse]:
        reasons.append(
            f"{more[0]} loses more and is shown to be worse nowhere, but was fitted to the form of the task."
        )
    size = _size(best.model, models)
    return Verdict(best.model["label"], best.holds, _headline(best), tuple(reasons), size, answers)


def _judged(model: Told, tasks: Sequence[Told]) -> _Judged:
    def verdict(task: Told) -> str:
        return str(model["cells"][task["key"]]["dense"]["verdict"])

    first = next((task for task in tasks if task["kind"] != "text"), tasks[0])
    change = model["cells"][first["key"]]["dense"]["difference"]
    broken = {task["key"] for task in tasks if not math.isfinite(model["cells"][task["key"]]["value"])}
    return _Judged(
        model,
        tasks,
        worse=tuple(task for task in tasks if verdict(task) == "worse" or task["key"] in broken),
        unknown=tuple(t for t in tasks if verdict(t) == "undefined" and t["key"] not in broken),
        form=tuple(t for t in tasks if t["kind"] == "loss" and t["calibrated"] and verdict(t) == "better"),
        kinds={task["kind"] for task in tasks},
        loss=math.inf if math.isnan(change) else -change if first["higher_is_better"] else change,
    )


def _headline(best: _Judged) -> str:
    label = best.model["label"]
    if best.holds:
        return f"{label}: with {taken(best.model)} no measure is shown to be worse than the dense model's; {_at_most(best)}."
    rest = "; ".join(filter(None, (_found(best, "text", "general text"), _found(best, "answers", "answers"))))
    others = [task["task"] for task in best.worse if task["kind"] not in ("text", "answers")]
    if others:
        rest = f"worse on {', '.join(others)}; {rest}"
    ask = "" if "answers" in best.kinds else ": measure answers"
    if best.form:
        return f"{label} is better on the form of your task; {rest}{ask}."
    if best.worse:
        return (
            f"Every pruned model is worse than the dense one somewhere; {label} loses least. Of it: {rest}."
        )
    return f"{label} is not shown to be worse, but little was measured: {rest}{ask}."


def _at_most(best: _Judged) -> str:
    """Say what the intervals of a model leave open: the far end of the one that is widest beside the dense model's value."""
    ends: dict[str, tuple[float, str]] = {}
    for task in best.tasks:
        cell = best.model["cells"][task["key"]]
        dense, beside = cell["value"] - cell["dense"]["difference"], cell["dense"]
        end = max(-beside["low"] if task["higher_is_better"] else beside["high"], 0.0)
        if dense and math.isfinite(end):
            said = f"{task['task']} may still be worse by {end:.3g} ({task['unit']}, n = {task['n']})"
            ends[task["key"]] = end / abs(dense), said
    worst = max(ends.values(), default=(math.nan, "by how much it may still be is not known"))
    return worst[1] if worst[0] else "no interval leaves room for that"


def _found(best: _Judged, kind: Kind, name: str) -> str:
    if kind not in best.kinds:
        return f"{name} not measured"
    verb = "are" if name.endswith("s") else "is"
    return (
        f"{name} {verb} {'worse' if any(t['kind'] == kind for t in best.worse) else 'not shown to be worse'}"
    )


def _choice(best: _Judged, full: Sequence[_Judged]) -> str:
    """Say why this model was chosen."""
    if best.worse:
        return f"It is shown to be worse on {len(best.worse)} of {len(best.tasks)} measures that decide; of those with as few, its result on the first is best."
    same = [own for own in full if not own.worse]
    hold = sum(own.holds for own in same)
    of_them = f", of which {hold} hold{'s' * (hold == 1)}" if 0 < hold < len(same) else ""
    rest = "the smallest of them, of one size the sparsest, then the best on the first measure"
    return f"Pruned models that are shown to be worse on no measure: {len(same)} of {len(full)}{of_them}. This is {rest}."


def taken(model: Told) -> str:
    """Return in words what was taken from a model."""
    if model["removed"]:
        return f"{model['removed'] * 100:g} % fewer parameters"
    return f"{model['sparsity'] * 100:g} % zeros" if model["sparsity"] else "nothing taken"


def _size(model: Told, models: Sequence[Told]) -> str:
    """Say how large and how fast a model is, as far as that is known."""
    dense = next((m for m in models if m["criterion"] == "dense"), {})
    known = model["parameters"] and dense.get("parameters")
    size = (
        Size(model["parameters"], model["bytes"]).beside(Size(dense["parameters"], dense["bytes"]))
        if known
        else ""
    )
    speed = model["speed"]
    seen = f"{Speed(**speed)}, by {speed['how']}" if speed else "speed not measured"
    said = [size, seen if model["removed"] else SPEED_OF_ZEROS]
    return "; ".join(filter(None, said))


def _answers_task(tasks: Sequence[Told]) -> str | None:
    """Return the task that measures answers to the problems whose solutions' loss was measured; running text asks nothing."""
    texts = [f"{source}_nll" for source in TEXT_SOURCES]
    found = [
        task for task in tasks if task["task"].endswith("_nll") and task["asks"] and task["task"] not in texts
    ]
    return f"{found[0]['task'].removesuffix('_nll')}_answers:{found[0]['n']}" if found else None
