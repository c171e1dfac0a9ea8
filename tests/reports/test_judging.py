"""What a run may say of its models: green only where what matters was measured and nothing fell."""

from dataclasses import asdict
from typing import Any

import pytest

from causalprune.core.types import EvalResult
from causalprune.reports.judging import Verdict, reliability_word
from causalprune.reports.summary import verdict

OWN = "examples/test.jsonl"
LOSS, TEXT, ANSWERS, CHOICE = f"{OWN}_nll", "wikitext2_ppl", f"{OWN}_answers", "strategyqa"
METRICS: dict[str, Any] = {TEXT: "perplexity", ANSWERS: "accuracy", CHOICE: "accuracy"}
N = 32


def result(task: str, change: float) -> EvalResult:
    """Return what a model has that is better by `change` than dense: fewer nats a token, or that share more solved."""
    if METRICS.get(task) == "accuracy":
        values = tuple(float(i < N * (0.5 + change)) for i in range(N))
    else:
        values = tuple(1.5 - change + 0.01 * i for i in range(N))
    metric = METRICS.get(task, "nats_per_token")
    return EvalResult(task, metric, values, (1.0,) * N, tuple(str(i) for i in range(N)))


def judged(models: dict[str, dict[str, float]], **about: dict[str, Any]) -> Verdict:
    """Return the verdict on models by their labels, with what each gains on every task; `about` is more of a row."""
    tasks = list(next(iter(models.values())))
    dense: dict[str, Any] = {"label": "dense", "criterion": "dense", "sparsity": 0.0}
    rows = [{**dense, "results": [asdict(result(task, 0.0)) for task in tasks]}]
    for label, gains in models.items():
        criterion, _, share = label.rpartition("-")
        row: dict[str, Any] = {
            "label": label,
            "criterion": criterion,
            "scope": "row",
            "sparsity": float(share),
        }
        row["results"] = [asdict(result(task, gain)) for task, gain in gains.items()]
        rows.append({**row, **about.get(criterion, {})})
    return verdict({"calibration": {"sources": {"gsm8k": 48}}, "rows": rows})


def test_a_lower_loss_on_own_solutions_is_their_form_and_not_recommended() -> None:
    """The loss of 32 own solutions fell by 0.28 in a magnitude-pruned model, which general text speaks against."""
    found = judged({"magnitude-0.2": {LOSS: 0.28, TEXT: -0.3}})
    assert not found.holds
    assert found.headline == (
        "magnitude-0.2 is better on the form of your task; general text is worse; answers not measured: measure answers."
    )
    assert found.measure == f"{ANSWERS}:{N}"


@pytest.mark.parametrize(
    ("gains", "holds", "words"),
    [
        (
            {LOSS: 0.2},
            False,
            "better on the form of your task; general text not measured; answers not measured",
        ),
        (
            {LOSS: 0.2, TEXT: 0.0},
            False,
            "general text is not shown to be worse; answers not measured: measure",
        ),
        ({LOSS: 0.2, ANSWERS: 0.0}, True, "with 50 % zeros no measure is shown to be worse"),
        (
            {LOSS: 0.2, ANSWERS: -0.4},
            False,
            "form of your task; general text not measured; answers are worse.",
        ),
        (
            {LOSS: 0.2, ANSWERS: 0.0, TEXT: -0.2},
            False,
            "general text is worse; answers are not shown to be worse.",
        ),
        ({LOSS: 0.0, TEXT: 0.0}, True, "no measure is shown to be worse"),
        (
            {LOSS: 0.0},
            False,
            "little was measured: general text not measured; answers not measured: measure answers",
        ),
        ({LOSS: 0.0, CHOICE: 0.0}, False, "little was measured"),
        (
            {LOSS: -0.2, TEXT: 0.0},
            False,
            "worse than the dense one somewhere; causal-0.5 loses least. Of it: worse on",
        ),
        (
            {"strategyqa_nll": 0.2, TEXT: 0.0},
            True,
            "no measure is shown to be worse",
        ),  # not what was calibrated on
        ({"gsm8k_nll": 0.2, TEXT: 0.0}, False, "better on the form of your task"),
        ({"gsm8k_nll": 0.2, "gsm8k_kl": 0.0}, False, "better on the form of your task"),
    ],
)
def test_green_takes_answers_or_where_nothing_was_fitted_general_text(
    gains: dict[str, float], holds: bool, words: str
) -> None:
    found = judged({"causal-0.5": gains})
    assert (found.holds, words in found.headline) == (holds, True), found.headline
    text = any(task.endswith("_ppl") for task in gains)
    assert text != any("General text was not measured" in reason for reason in found.reasons)


def test_the_smallest_that_holds_comes_before_the_sparsest() -> None:
    same, bad = {ANSWERS: 0.0}, {ANSWERS: -0.4}
    speed = {"reading": 120.0, "writing": 12.0, "dense_reading": 100.0, "dense_writing": 10.0}
    speed |= {"reading_gain": 1.2, "writing_gain": 1.25, "rounds": 5}
    size = {"parameters": 800, "bytes": 3200, "speed": {**speed, "how": "a clock"}}
    smaller = {"removed": 0.2, "sparsity": 0.0, **size}
    found = judged({"wanda-0.2": same, "wanda-0.5": same, "shrink-0.2": same}, shrink=smaller)
    assert found.label == "shrink-0.2"
    assert "1.20 times" in str(found.size)
    assert "by a clock" in str(found.size)
    assert any(
        r.startswith("Beside it wanda-0.5 holds too:") and "dense model's speed" in r for r in found.reasons
    )
    found = judged({"wanda-0.2": same, "wanda-0.5": same, "shrink-0.2": bad}, shrink=smaller)
    assert (found.label, found.holds) == ("wanda-0.5", True)
    found = judged({"wanda-0.2": {LOSS: 0.0, TEXT: 0.0}, "causal-0.5": {LOSS: 0.3, TEXT: 0.0}})
    assert (found.label, found.holds) == ("wanda-0.2", True)
    assert any("causal-0.5 loses more" in reason for reason in found.reasons)
    assert "no measure: 2 of 2, of which 1 holds. This is" in found.reasons[0]


@pytest.mark.parametrize(("prompts", "asks"), [(("",), False), (("The",), False), (("2+2=\n\n",), True)])
def test_answers_are_asked_for_where_there_is_a_question(prompts: tuple[str, ...], asks: bool) -> None:
    own = {"results": [asdict(result(LOSS, 0.0)) | {"prompts": prompts * N}]}
    about: dict[str, Any] = {"scope": "row", "sparsity": 0.0}
    rows = [{"label": name, "criterion": name, **about, **own} for name in ("dense", "wanda")]
    assert verdict({"rows": rows}).measure == (f"{ANSWERS}:{N}" if asks else None)
    for task in ("c4_nll", "wikitext2_nll"):
        assert judged({"causal-0.5": {task: 0.0}}).measure is None


@pytest.mark.parametrize(
    ("value", "word"), [(0.9, "good"), (0.79, "fair"), (0.5, "weak"), (float("nan"), "not known")]
)
def test_reliability_comes_with_a_word(value: float, word: str) -> None:
    assert reliability_word(value) == word
