"""Problems whose answer changed when the model was pruned, with both answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from causalprune.core import EvalResult
from causalprune.evaluation import HIGHER_IS_BETTER, on_general_text

SHOWN = 10
"""Problems in each direction."""
ROOM, MOST, LEAST = 1_000_000, 1500, 160
"""Characters for all texts of a report together, and for one of them at most and at least."""

Rows = Sequence[tuple[str, list[EvalResult]]]


def flips(rows: Rows) -> list[dict[str, Any]]:
    """Return, for each pruned model and task, what went from right to wrong and from wrong to right.

    Losses have no right and wrong: there, what rose and what fell most. Nothing where there is no dense row.
    """
    dense = {(r.task, r.metric): r for label, results in rows if label == "dense" for r in results}
    texts = {
        (r.task, r.examples): list(zip(r.prompts, r.golds, strict=True))
        for _, results in rows
        for r in results
        if r.prompts
    }
    found = []
    for label, results in rows:
        for result in results:
            before = dense.get((result.task, result.metric))
            if label == "dense" or before is None or before.examples != result.examples:
                continue
            if on_general_text(result.task):  # no problems, but pieces of text
                continue
            if result.metric == "nats_per_token":
                found.append(_losses(label, before, result, texts))
            elif HIGHER_IS_BETTER.get(result.metric):
                found.append(_answers(label, before, result, texts))
    return _cut(found)


Texts = Mapping[tuple[str, tuple[str, ...]], Sequence[tuple[str, str]]]


def _answers(label: str, before: EvalResult, after: EvalResult, texts: Texts) -> dict[str, Any]:
    pairs = list(zip(before.values, after.values, strict=True))
    lost = [i for i, (a, b) in enumerate(pairs) if a > b]
    won = [i for i, (a, b) in enumerate(pairs) if a < b]

    def one(i: int) -> dict[str, Any]:
        answers = [result.texts[i] if i < len(result.texts) else None for result in (before, after)]
        return _problem(after, i, texts) | {"before": answers[0], "after": answers[1]}

    return {
        **_about(label, after, "answers"),
        "counts": [len(lost), len(won)],
        "lost": [one(i) for i in lost[:SHOWN]],
        "won": [one(i) for i in won[:SHOWN]],
    }


def _losses(label: str, before: EvalResult, after: EvalResult, texts: Texts) -> dict[str, Any]:
    change = {
        i: (b - a) / weight
        for i, (a, b, weight) in enumerate(zip(before.values, after.values, after.weights, strict=True))
        if weight > 0 and abs(b - a) < float("inf")
    }
    order = sorted(change, key=lambda i: -change[i])
    lost, won = ([i for i in order if change[i] * sign > 0] for sign in (1, -1))

    def one(i: int) -> dict[str, Any]:
        both = [f"{result.values[i] / after.weights[i]:.4g} nats per token" for result in (before, after)]
        return _problem(after, i, texts) | {"before": both[0], "after": both[1]}

    return {
        **_about(label, after, "losses"),
        "counts": [len(lost), len(won)],
        "lost": [one(i) for i in lost[:SHOWN]],
        "won": [one(i) for i in won[::-1][:SHOWN]],
    }


def _about(label: str, result: EvalResult, kind: str) -> dict[str, Any]:
    return {"label": label, "task": result.task, "metric": result.metric, "kind": kind}


def _problem(result: EvalResult, i: int, texts: Texts) -> dict[str, Any]:
    found = texts.get((result.task, result.examples), [])
    prompt, gold = found[i] if i < len(found) else (None, None)
    return {"content": result.examples[i], "prompt": prompt, "gold": gold}


def _cut(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shorten texts so that all of them fit into a page."""
    problems = [problem for block in found for side in ("lost", "won") for problem in block[side]]
    room = min(MOST, max(LEAST, ROOM // max(4 * len(problems), 1)))
    for problem in problems:
        for name in ("prompt", "gold", "before", "after"):
            text = problem[name]
            if text is not None and len(text) > room:
                problem[name] = f"{text[:room]} … ({len(text):,} characters)"
    return found
