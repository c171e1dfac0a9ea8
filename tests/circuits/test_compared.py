"""Pairs of right and wrong answers: what is compared, and that one pass does for both where it can."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import calibration, shared

import causalprune as cp
from causalprune.circuits.behaviour import Trials, behaviour, scored
from causalprune.core.resuming import State
from causalprune.core.types import Calibration

PROBLEMS = calibration(tuple((12 + i % 3, 5) for i in range(20)))


def test_a_wrong_answer_is_compared_with() -> None:
    decoder = shared("llama2")
    pairs = [
        replace(one, instead=replace(one, tokens=(*one.tokens[:-1], 7))) for one in PROBLEMS.examples[:9]
    ]
    plain, paired = (
        Trials(behaviour(decoder, own, cp.Question(), cp.Estimator("gradient"))).nats(
            [torch.ones(12, dtype=torch.bool)]
        )
        for own in (PROBLEMS.examples[:9], pairs)
    )
    wrong = Trials(
        behaviour(decoder, [one.instead for one in pairs], cp.Question(), cp.Estimator("gradient"))
    ).nats([torch.ones(12, dtype=torch.bool)])
    torch.testing.assert_close(paired, plain - wrong, rtol=1e-5, atol=1e-5)
    both = Calibration(tuple(pairs), (0,) * 9)
    found = cp.circuit(decoder, both, decide=both, keep=0.3, stage=cp.quiet)
    assert found.problems[0].instead == pairs[0].instead
    assert found.curve.guessing == 0.0  # a guess is as good at both answers


@pytest.mark.parametrize("name", ["gradient", "integrated", "relevance"])
@pytest.mark.parametrize("ablation", ["zero", "counterfactual"])
def test_one_pass_does_for_both_answers_where_the_last_token_alone_differs(
    name: Any, ablation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, how = shared("llama3"), cp.Estimator(name, draws=0)
    pairs = [replace(one, counterfactual=(3, *one.tokens[1:])) for one in PROBLEMS.examples[:6]]
    pairs = [replace(one, instead=replace(one, tokens=(*one.tokens[:-1], 7))) for one in pairs]
    question = cp.Question(("heads", "mlp"), ablation=ablation)
    one = behaviour(decoder, pairs, question, how)
    monkeypatch.setattr("causalprune.circuits.behaviour._in_one_pass", lambda *_: False)
    two = behaviour(decoder, pairs, question, how)
    assert one.tokens * 2 == two.tokens
    keep = torch.tensor([number % 3 > 0 for number in range(len(one.units))])
    for own, other in zip(Trials(one).both([keep, ~keep]), Trials(two).both([keep, ~keep]), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    found = [scored(of, keep, how, State()) for of in (one, two)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_with_counterfactuals_orders_are_learned_by_the_loss_unless_something_else_is_named() -> None:
    pairs = tuple(
        replace(one, counterfactual=(3, *one.tokens[1:]), instead=replace(one, tokens=(*one.tokens[:-1], 7)))
        for one in PROBLEMS.examples
    )
    question = cp.Question(("heads", "mlp"), ablation="counterfactual")
    found = cp.circuit(
        shared("llama3"), Calibration(pairs, (0,) * 20), question=question, keep=0.01, stage=cp.quiet
    )
    assert (found.description["learn"], found.description["rescore"]) == (10, 1)


def test_divergences_are_those_of_right_answers_alone() -> None:
    decoder = shared("llama2")
    pairs = [
        replace(one, instead=replace(one, tokens=(*one.tokens[:-1], 7, 8))) for one in PROBLEMS.examples[:9]
    ]
    question = cp.Question(effect="kl")
    alone, paired = (
        behaviour(decoder, own, question, cp.Estimator("gradient")) for own in (PROBLEMS.examples[:9], pairs)
    )
    values = torch.rand(3, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(paired.effects(values), alone.effects(values[:, :9]))
    assert not torch.equal(paired.by_problem(values), paired.effects(values))
