"""What a circuit is compared with, and what is said of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import calibration, shared

import causalprune as cp
from causalprune.circuits import Circuit, checking
from causalprune.circuits.behaviour import behaviour
from causalprune.circuits.finding import halves
from causalprune.core.errors import DataError, OptionError
from causalprune.core.types import Calibration, Example
from causalprune.runs.circuits import CircuitSpec, jobs

PROBLEMS = calibration(tuple((12 + i % 3, 5) for i in range(20)))
SLOPES = cp.Estimator("gradient")


def of(*examples: Example) -> Calibration:
    return Calibration(examples, (0,) * len(examples))


def found(question: cp.Question, folder: Path | None = None) -> Circuit:
    return cp.circuit(
        shared("llama2"),
        PROBLEMS,
        question,
        SLOPES,
        decide=PROBLEMS,
        keep=0.5,
        rescore=1,
        folder=folder,
        stage=cp.quiet,
    )


def test_the_first_problems_are_of_every_source_in_turn() -> None:
    own = [replace(one, source=source) for one, source in zip(PROBLEMS.examples, "aaaabbc", strict=False)]
    few = behaviour(shared("llama2"), own, cp.Question(), SLOPES).first(5)
    assert [one.source for one in few.problems] == ["a", "b", "c", "a", "b"]
    assert few.problems[0] == own[0]


def test_one_prompt_does_not_score_and_decide() -> None:
    twice = [replace(one, content=str(i // 2)) for i, one in enumerate(PROBLEMS.examples)]
    score, decide = halves(of(*twice))
    assert not {one.content for one in score.examples} & {one.content for one in decide.examples}
    assert len(score.examples) == len(decide.examples) == 10
    assert [one.examples for one in halves(PROBLEMS)] == [PROBLEMS.examples[0::2], PROBLEMS.examples[1::2]]


def test_pairs_that_take_two_sequences_cost_twice_the_tokens() -> None:
    few = [replace(one, tokens=(*one.tokens[:-2], 7, 8)) for one in PROBLEMS.examples]  # as long
    last = [replace(one, tokens=(*one.tokens[:-1], 9)) for one in PROBLEMS.examples]
    costs = [
        jobs(
            CircuitSpec(),
            of(*(replace(a, instead=b) for a, b in zip(PROBLEMS.examples, own, strict=True))),
            None,
        )
        for own in (few, last)
    ]
    assert costs[0] == {stage: pytest.approx(2 * tokens) for stage, tokens in costs[1].items()}
    assert costs[1] == jobs(CircuitSpec(), PROBLEMS, None)


def test_problems_of_one_prompt_want_others_to_decide_on() -> None:
    same = of(*(replace(one, content="one") for one in PROBLEMS.examples))
    with pytest.raises(DataError, match="all problems have one prompt"):
        cp.circuit(shared("llama2"), same, cp.Question(), SLOPES, rescore=1, stage=cp.quiet)
    assert cp.circuit(
        shared("llama2"), same, cp.Question(), SLOPES, decide=PROBLEMS, keep=0.5, rescore=1, stage=cp.quiet
    ).size


def test_a_wrong_answer_is_no_donor() -> None:
    pairs = [
        replace(one, instead=replace(one, tokens=(*one.tokens[:-1], 7))) for one in PROBLEMS.examples[:9]
    ]
    with pytest.raises(OptionError, match="'resample' could put a prompt in its own place"):
        behaviour(shared("llama2"), pairs, cp.Question(ablation="resample"), SLOPES)


def test_what_tells_circuit_and_model_apart_is_chosen_by_what_is_measured() -> None:
    """The gap is one of cross-entropies, whatever effect ranked the units."""
    circuit, chosen = found(cp.Question(effect="kl")), []
    for effect in ("ce", "kl"):
        own = behaviour(shared("llama2"), PROBLEMS.examples, cp.Question(effect=effect), SLOPES)  # type: ignore[arg-type]
        bench = checking._Bench(own, replace(circuit, size=8), checking.Trials(own), torch.Generator())
        chosen.append(checking._greedy(bench))
    assert torch.equal(*chosen)
    assert 0 < int(chosen[0].sum()) <= checking.GREEDY


def test_a_circuit_is_written_where_it_was_looked_for(tmp_path: Path) -> None:
    circuit = found(cp.Question(), tmp_path / "own")
    assert cp.load_circuit(tmp_path / "own").members == circuit.members


def test_remarks_come_before_anything_else() -> None:
    circuit = found(cp.Question(effect="kl"))
    stable = {"0.2": {"jaccard": 0.9, "over_chance": 0.8}}
    plain = replace(circuit, stability=stable, chosen=replace(circuit.chosen, share=0.5))
    fair = replace(
        circuit.curve,
        empty=SimpleNamespace(value=1.0, low=0.5, high=1.5),
        intact=SimpleNamespace(value=0.5, low=0.5, high=0.5),
        guessing=2.0,
    )
    plain = replace(plain, curve=fair)
    assert plain.remarks == []
    large = replace(
        plain, chosen=replace(circuit.chosen, share=0.85), stability={"0.2": {"over_chance": 0.3}}
    )
    assert large.remarks[0] == "nothing is sparse here: the circuit is 85% of the units"
    assert large.remarks[1].startswith("not stable")
    mixed = replace(large, description=circuit.description | {"sizes_of": "weights"})
    assert mixed.remarks[0].endswith("85% of the weights")
    nothing = replace(fair, empty=SimpleNamespace(value=0.1, low=-0.1, high=0.3))
    assert replace(plain, curve=nothing).remarks == [
        "closing all units costs nothing that shows (+0.1 nats per token): f says nothing"
    ]
    worse = replace(plain, curve=replace(fair, guessing=0.9)).remarks
    assert worse == [
        "f flatters: with no unit left the model is worse than a guess (1.5 nats per token, guessing 0.9)"
    ]
    asked = circuit.description["question"] | {"ablation": "counterfactual"}
    other = replace(plain, description=circuit.description | {"question": asked})
    assert replace(other, curve=replace(fair, guessing=0.9)).remarks == []
