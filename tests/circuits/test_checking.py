"""What a circuit is compared with, and what is said of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import calibration, shared

import causalprune as cp
from causalprune.circuits import Checks, Circuit, checking, examined, save_circuit, sentences
from causalprune.circuits.behaviour import behaviour
from causalprune.circuits.finding import halves
from causalprune.circuits.telling import NONE
from causalprune.core.errors import DataError, OptionError
from causalprune.core.types import Calibration, Example, Unit
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


def test_checks_are_written_beside_their_circuit_and_stay_where_it_is_found_again(tmp_path: Path) -> None:
    file, checks = tmp_path / "own" / "circuit.json", Checks(3, tests=True)
    circuit = found(cp.Question(), file.parent)
    for folder in (file.parent, tmp_path / "another"):
        whole = examined(circuit, shared("llama2"), PROBLEMS, checks, folder=folder, stage=cp.quiet)
    assert not (tmp_path / "another" / "circuit.json").exists(), "which has no circuit"
    assert cp.load_circuit(file).checks == whole.checks
    told = replace(whole, description=whole.description | {"on": ["x"], "git_commit": "other"})
    save_circuit(told, file)
    again = found(cp.Question(), file.parent)
    assert (again.checks, again.tests.keys()) == (whole.checks, whole.tests.keys())
    assert cp.load_circuit(file).checks == whole.checks
    assert cp.load_circuit(file).description["on"] == ["x"]
    examined(again, shared("llama2"), PROBLEMS, Checks(2), folder=file.parent, stage=cp.quiet)
    kept = cp.load_circuit(file)
    assert (kept.checks["controls"]["count"], kept.tests.keys()) == (2, whole.tests.keys())
    for other in (
        {"size": circuit.size + 1},
        {"order": circuit.order.flip(0)},
        {"description": circuit.description | {"keep": 0.4}},
        {"model_fingerprint": "other"},
    ):
        save_circuit(replace(told, **other), file)
        assert not found(cp.Question(), file.parent).checks
    file.write_text("{")
    assert found(cp.Question(), file.parent).members == circuit.members == cp.load_circuit(file).members


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
    better = replace(fair, empty=SimpleNamespace(value=-0.2, low=-0.3, high=-0.1), guessing=0.1)
    assert replace(plain, curve=better).remarks == [
        "closing all units lowers the loss by 0.2 nats per token: f, CPR and CMD are upside down; read the KL"
    ]
    worse = replace(plain, curve=replace(fair, guessing=0.9)).remarks
    assert worse == [
        "f flatters: with no unit left the model is worse than a guess (1.5 nats per token, guessing 0.9)"
    ]
    asked = circuit.description["question"] | {"ablation": "counterfactual"}
    other = replace(plain, description=circuit.description | {"question": asked})
    assert replace(other, curve=replace(fair, guessing=0.9)).remarks == []


def test_controls_are_further_from_the_model_on_either_side() -> None:
    circuit = replace(found(cp.Question()), size=2)
    intact, own, others = 1.0, 1.2, torch.tensor([0.5, 0.9, 1.1, 1.5])
    for rank, worse in (("absolute", 0.5), ("signed", 0.25)):
        told = replace(circuit, description=circuit.description | {"rank": rank})
        bench = SimpleNamespace(
            circuit=told,
            keep=lambda: torch.tensor([True]),
            random=lambda *_: [torch.tensor([False])] * len(others),
            nats=lambda keeps: torch.tensor([intact, own, *others]).double(),
            faithfulness=lambda keeps: torch.ones(len(keeps)),
        )
        controls = checking._controls(bench, 4)  # type: ignore[arg-type]
        assert controls["worse"] == worse
        words = {"absolute": "50% of them are further from the model", "signed": "25% of them are worse"}[
            rank
        ]
        assert any(words in said for said in sentences(replace(told, checks={"controls": controls})))


def test_controls_are_never_the_circuit_itself() -> None:
    """Of a kind that every layer has one of, other layers'; where nothing else can be drawn, that is said."""
    circuit = found(cp.Question(("mlp",)))
    few = replace(circuit, size=1)
    made = examined(few, shared("llama2"), PROBLEMS, Checks(3, tests=True), stage=cp.quiet)
    for random in (
        made.checks["necessity"]["random_nats"]["value"],
        made.checks["controls"]["random_nats"][1],
    ):
        assert random not in (made.checks["necessity"]["nats"]["value"], made.checks["controls"]["nats"])
    assert made.checks["necessity"]["share"] == pytest.approx(1 / len(circuit.units))
    said = "\n".join(sentences(made))
    assert f"without the first unit, {1 / len(circuit.units):.1%} of the units, " in said
    assert "the same kinds (and layers, where one has several) " in said
    whole = replace(few, size=len(circuit.units))
    made = examined(whole, shared("llama2"), PROBLEMS, Checks(3, tests=True), stage=cp.quiet)
    assert {f"{what}: {NONE}" for what in ("controls", "sufficiency", "partial necessity")} < {
        *sentences(made)
    }
    assert checking.alike([Unit(0, 0, "mlp"), Unit(0, 0), Unit(0, 1), Unit(1, 0, "mlp"), Unit(1, 0)]) == {
        (None, "mlp"): [0, 3],
        (0, "head"): [1, 2],
        (1, "head"): [4],
    }
    one = replace(made, checks=made.checks | {"necessity": made.checks["necessity"] | {"random_nats": None}})
    assert any(said.startswith("necessity") and said.endswith(NONE) for said in sentences(one))
