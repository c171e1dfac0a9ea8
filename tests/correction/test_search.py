"""Which candidates are tried, in which order, and what is said where none may go."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from planted import built, samples

import causalprune as cp
from causalprune.circuits import Value
from causalprune.core.errors import OptionError
from causalprune.core.resuming import State
from causalprune.correction.candidates import Chosen
from causalprune.correction.correcting import candidates_of
from causalprune.correction.evidence import Looking
from causalprune.correction.measuring import Trials
from causalprune.correction.records import Contrast, Point
from causalprune.correction.samples import halves
from causalprune.correction.scores import SCORES, Score
from causalprune.correction.search import NONE, TRIES, Search, _spared


def search(**own: object) -> Search:
    decoder, planting = built(3)
    how = Contrast(**own)  # type: ignore[arg-type]
    chooses, decides = halves(*samples(planting))
    candidates = candidates_of(decoder, chooses, how)
    looking, trials = Looking(candidates, chooses, how.how(), State()), Trials(decoder, decides, 2048, None)
    return Search(candidates, looking, trials, how, how.number(candidates.count), cp.quiet)


def forbidden(own: Search, which: Callable[[int], bool]) -> Search:
    """Let some candidates do great harm, and the others none."""
    point = own.point

    def told(chosen: Chosen, number: int, predicted: float) -> Point:
        harm = float(any(map(which, chosen.tolist())))
        found = point(chosen, number, predicted)
        return replace(
            found, benefit=Value(1.0 * len(chosen), 1.0, 1.0), harm={"all": Value(harm, harm, harm)}
        )

    own.point = told  # type: ignore[method-assign]
    return own


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("budget", [1, 6])
@pytest.mark.parametrize("score", ["contrast", "magnitude"])
def test_others_go_where_the_first_alone_does_too_much(score: str, budget: int, rounds: int) -> None:
    own = search(budget=budget, score=score, rounds=rounds)
    first = int(own.ranked(NONE, 1, 0.0)[0][0])
    chosen, point = forbidden(own, lambda number: number == first).run()
    assert first not in chosen.tolist()
    assert point.count == budget
    assert sum(tried.count == 1 for tried in own.curve) >= 2


def test_neurons_go_where_heads_do_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    own = search(budget=2, units=("heads", "neurons:1"), score="random")
    heads = [unit.kind == "head" for unit in own.candidates.units]  # type: ignore[attr-defined]
    assert 0 < sum(heads) <= TRIES
    monkeypatch.setitem(SCORES, "random", Score(lambda _: torch.tensor(heads).float(), ()))  # heads first
    chosen, _ = forbidden(own, lambda number: heads[number]).run()
    assert [heads[number] for number in chosen.tolist()] == [False, False]


def test_what_does_less_harm_is_tried_first() -> None:
    own = search(budget=1)
    order = own.ranked(NONE, 1, 0.0, own.candidates.count)[0]
    assert own._harm is not None
    harm = own._harm.amax(0)
    after = _spared(own._harm, order[:1], order[1:])
    less = int((harm[after] < harm[order[0]]).sum())
    assert 0 < less < len(after)
    assert bool((harm[after[:less]] < harm[order[0]]).all())
    assert sorted(after.tolist()) == sorted(order[1:].tolist())


def test_where_none_may_go_it_is_said_what_was_tried() -> None:
    own = forbidden(search(budget=3, harm=1e-10), lambda _: True)
    with pytest.raises(
        OptionError, match=rf"of {TRIES + 1} candidates .* within 1e-08% of perplexity: .* 172% \(1 nats\)"
    ):
        own.run()
    own = forbidden(search(budget=1, units=("layers",), score="random"), lambda _: True)
    with pytest.raises(OptionError, match="of 2 candidates that were closed alone"):
        own.run()
