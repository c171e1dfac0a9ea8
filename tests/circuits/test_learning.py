"""Gates that are learned let in what circuits lack, from wherever they begin, and go on where they were stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constructed import constructed, problems

import causalprune as cp
from causalprune.attribution.questions import Estimator, Question
from causalprune.circuits import learning
from causalprune.circuits.behaviour import Behaviour, Trials, behaviour
from causalprune.circuits.learning import learned
from causalprune.circuits.ranking import Round, order_of, places, resampled_orders, values_of
from causalprune.circuits.terms import turns
from causalprune.core.errors import OptionError
from causalprune.core.resuming import State
from causalprune.core.types import Example, Unit

EVEN = torch.ones(16, dtype=torch.float64)


def of(name: str, ablation: str = "zero", effect: str = "kl") -> Behaviour:
    question = Question(effect=effect, ablation=ablation)  # type: ignore[arg-type]
    return behaviour(constructed(name), problems(name, 12).examples, question, Estimator("gradient"))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_what_a_circuit_lacks_comes_to_the_front(ablation: str) -> None:
    own = of("suppressor", ablation)
    helps, hinders = (own.units.index(Unit(*place)) for place in ((0, 6), (1, 2)))
    others = [i for i in range(16) if i not in (helps, hinders)]
    order = torch.tensor([helps, *others, hinders])  # without the last one the first says too much
    moves = learned(own, order, EVEN, Estimator(epochs=10), State(), cp.silent)
    assert int(moves.argmax()) == hinders


def test_wrong_answers_move_nothing() -> None:
    plain = problems("and", 12).examples
    pairs = [with_wrong(example, plain[(i + 1) % 12]) for i, example in enumerate(plain)]
    own = behaviour(constructed("and"), pairs, Question(effect="kl"), Estimator("gradient"))
    alone = behaviour(own.decoder, plain, Question(effect="kl"), Estimator("gradient"))
    moves = [
        learned(one, torch.arange(16), EVEN, Estimator(epochs=2), State(), cp.silent) for one in (own, alone)
    ]
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longer", [False, True])
def test_a_wrong_answer_counts_by_how_much_likelier_the_right_one_is(longer: bool) -> None:
    plain = problems("and", 12).examples
    pairs = [with_wrong(example, plain[(i + 1) % 12]) for i, example in enumerate(plain)]
    if longer:  # another pass is needed for an answer of two tokens
        pairs[0] = replace(pairs[0], instead=replace(pairs[0].instead, tokens=(*pairs[0].instead.tokens, 1)))
    own = behaviour(constructed("and"), pairs, Question(), Estimator("gradient"))
    away, keep = (
        learning._departure(own, torch.ones(16)),
        torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) < 0.5,
    )
    _, lost = away([*range(12)], keep)
    trials = Trials(own).nats([torch.ones(16, dtype=torch.bool), *keep])
    expected = torch.stack([trials[1 + i, i] - trials[0, i] for i in range(12)]).abs()
    torch.testing.assert_close(lost, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paired", [False, True])
def test_by_the_loss_what_a_circuit_lacks_comes_to_the_front_too(paired: bool) -> None:
    every = problems("suppressor", 12).examples
    given = (
        [with_wrong(e, replace(e, tokens=(*e.tokens[:-1], 1 + e.tokens[-1]))) for e in every]
        if paired
        else every
    )
    own = behaviour(constructed("suppressor"), given, Question(), Estimator("gradient"))
    helps, hinders = (own.units.index(Unit(*place)) for place in ((0, 6), (1, 2)))
    order = torch.tensor([helps, *(i for i in range(16) if i not in (helps, hinders)), hinders])
    moves = learned(own, order, EVEN, Estimator(epochs=10), State(), cp.silent)
    assert int(moves.argmax()) == hinders


def test_by_the_loss_what_a_behaviour_hangs_on_does_not_fall_far() -> None:
    """A circuit that loses a little less than the model is not nearer to it without a neuron that is worth 3 nats."""
    slopes, keeps = torch.tensor([[-3.0], [-1.0], [0.02], [-0.02]]), torch.tensor([[True, False, True, True]])
    rises = learning._to_either_side(slopes, torch.tensor([-0.05]), keeps, torch.ones(4))
    torch.testing.assert_close(rises[:, 0], torch.tensor([-2.9, 1.0, -0.02, 0.02]))  # negative: better open
    falls = learning._to_either_side(slopes, torch.tensor([-4.0]), keeps, torch.ones(4))[:, 0]
    typical = torch.tensor([3.0, 1.0, 0.02, 0.02]).square().mean().sqrt()
    torch.testing.assert_close(falls, torch.tensor([typical, 1.0, -0.02, 0.02]))


def test_no_unit_falls_faster_for_its_size_than_a_typical_one() -> None:
    """What is lost with a large unit says nothing of how fast a small one may fall."""
    slopes, cost = torch.tensor([[-0.1]] * 9 + [[-1.0], [-3.0], [-3.0]]), torch.tensor([0.1] * 10 + [5.5] * 2)
    keeps = torch.ones(1, 12, dtype=torch.bool)
    falls = learning._to_either_side(slopes, torch.tensor([-4.0]), keeps, cost)[:, 0] / cost
    typical = (slopes[:, 0] / cost).square().mean().sqrt()
    assert falls.max() == pytest.approx(float(typical))
    assert falls[[0, 11]].tolist() == pytest.approx([1.0, 3.0 / 5.5])


def with_wrong(example: Example, other: Example) -> Example:
    """Return an example whose wrong answer is another one's right one."""
    tokens = (*example.tokens[: example.target_start], *other.tokens[other.target_start :])
    return replace(example, instead=replace(example, tokens=tokens))


def test_units_move_by_what_is_lost_for_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(problems: list[int], keeps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((16, len(problems)), -1.0, dtype=torch.float64), torch.ones(len(problems))

    monkeypatch.setattr(learning, "_departure", lambda *_: alike)
    monkeypatch.setattr(learning, "NEAR", 1.0)  # all move in every step
    sizes = torch.tensor([3.0, 1.0] * 8, dtype=torch.float64)
    moves = learned(of("and"), torch.arange(16), sizes, Estimator(epochs=2), State(), cp.silent)
    assert (moves[1::2] / moves[::2]).tolist() == pytest.approx([3.0] * 8)


@pytest.mark.parametrize("effect", ["kl", "ce"])
def test_a_stopped_run_goes_on_bit_for_bit(
    effect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, how = of("and", effect=effect), Estimator(epochs=6)
    whole = learned(own, torch.arange(16), EVEN, how, State(), cp.silent)
    monkeypatch.setattr(State, "due", lambda self: self.path is not None)

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(own, torch.arange(16), EVEN, how, State(tmp_path), stop)
    seen: list[int] = []
    again = learned(own, torch.arange(16), EVEN, how, State(tmp_path), lambda done, _: seen.append(done))
    assert torch.equal(whole, again)
    assert len(seen) < 12
    assert torch.equal(learned(own, torch.arange(16), EVEN, how, State(tmp_path), cp.silent), whole)


def test_moves_change_places_and_not_what_units_are_worth() -> None:
    scores = torch.tensor([[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    moves = torch.tensor([0.0, 0.0, 0.0, 0.6], dtype=torch.float64)  # from 0.25 to 0.85
    rounds = [Round(scores, 0, moves)]
    assert places(torch.tensor([2, 0, 1])).tolist() == pytest.approx([2 / 3, 1 / 3, 1])
    assert order_of(rounds, "absolute").tolist() == [0, 3, 1, 2]
    assert values_of(rounds, "absolute").tolist() == [4, 3, 2, 1]
    assert {tuple(order.tolist()) for order in resampled_orders(rounds, "absolute")} == {(0, 3, 1, 2)}


def test_gates_are_learned_where_that_is_asked_for_or_nothing_else_is() -> None:
    kl, ce = Question(effect="kl"), Question()

    def both(question: Question, rescore: int | None = None, **own: object) -> tuple[int, int | None]:
        how, rounds = turns(question, Estimator(**{"name": "integrated", **own}), rescore)  # type: ignore[arg-type]
        return rounds, how.epochs

    assert both(kl) == (1, 10)
    assert both(kl, epochs=0) == (3, 0)
    assert both(kl, 2) == (2, 0)
    assert both(kl, 2, epochs=5) == (2, 5)
    assert both(ce) == (3, 0)
    assert both(kl, name="exact") == (1, 0)
    pairs = Question(ablation="counterfactual")
    assert both(pairs) == (1, 10)
    assert both(pairs, name="relevance") == (3, 0)
    assert turns(pairs, Estimator("integrated"), None, "signed")[1] == 3
    with pytest.raises(OptionError, match="no epochs with --rank signed"):
        cp.circuit(constructed("and"), problems("and", 24), Question(), Estimator(epochs=3), rank="signed")
    with pytest.raises(OptionError, match="at least 0 epochs, not -1"):
        cp.circuit(constructed("and"), problems("and", 24), estimator=Estimator(epochs=-1))
