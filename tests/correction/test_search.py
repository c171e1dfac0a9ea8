"""Which candidates are tried, in which order, and what is said where none may go."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from planted import built, samples
from torch import Tensor

import causalprune as cp
from causalprune.circuits import Value
from causalprune.core.errors import OptionError
from causalprune.core.resuming import State
from causalprune.correction.candidates import Chosen
from causalprune.correction.correcting import candidates_of
from causalprune.correction.evidence import DRIFT, HARM, ODDS, Looking, Need
from causalprune.correction.measuring import Trials
from causalprune.correction.ranking import spared
from causalprune.correction.records import Contrast, Point
from causalprune.correction.samples import Half, halves
from causalprune.correction.scores import SCORES, Known, Score, contrast
from causalprune.correction.search import NONE, TRIES, Search, _largest


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
        harms = dict.fromkeys(own.looking.half.sources, Value(harm, harm, harm))
        found = point(chosen, number, predicted)
        return replace(found, benefit=Value(len(chosen) + number / 10, 1.0, 1.0), harm=harms)

    own.point = told  # type: ignore[method-assign]
    return own


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("budget", [1, 6])
@pytest.mark.parametrize("score", ["contrast", "magnitude"])
def test_others_go_where_the_first_alone_does_too_much(score: str, budget: int, rounds: int) -> None:
    own = search(budget=budget, score=score, rounds=rounds)
    first = int(own.ranked(NONE, 1, None)[0][0])
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


def told(own: Search, slopes: dict[Need, Tensor]) -> Search:
    """Let slopes be these, whatever is closed, and what is measured be benefit and harm of one source by number."""

    class Fixed:
        half, candidates = own.looking.half, own.candidates

        def gather(self, need: Need, closed: Chosen, name: str, tell: object) -> Tensor:
            assert len(closed) > 0 or need != DRIFT
            return slopes[need]

    own.looking = Fixed()  # type: ignore[assignment]
    return forbidden(own, lambda _: False)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_units_are_chosen_anew_in_every_round(rounds: int) -> None:
    own = search(budget=2, rounds=rounds)
    n, sources = own.candidates.count, len(own.looking.half.sources)
    odds, drift = torch.zeros(n), torch.zeros(sources, n)
    odds[:3] = torch.tensor([3.0, 2.0, 1.0])
    drift[:, 0] = -10.0  # closing it raises the loss
    slopes = {ODDS: odds, HARM: torch.zeros_like(drift), DRIFT: drift}
    chosen, point = told(own, slopes).run()
    assert sorted(chosen.tolist()) == ([0, 1] if rounds == 1 else [1, 2])
    assert point.round == rounds


def test_before_anything_is_closed_the_worst_source_counts() -> None:
    own = search(budget=2)
    own.ranking._known = "", {ODDS: torch.ones(2), HARM: torch.tensor([[1.0, 3.0], [2.0, 1.0]])}
    harm = own.ranking._expected(NONE, {})
    known = Known({ODDS: torch.ones(2)}, harm, torch.ones(2), 0.0)
    assert contrast(known).tolist() == [0.5, pytest.approx(1 / 3)]


def test_what_a_source_may_still_lose_weighs_its_harm() -> None:
    """Of what is closed it is what opening would spare."""
    own = search(budget=2, harm=math.expm1(0.1))
    own.looking = Looking(own.candidates, two_sources(own), own.how.how(), State())
    n = own.candidates.count
    harm, drift = torch.zeros(2, n), torch.zeros(2, n)
    harm[:, 0], harm[:, 1] = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0])
    drift[:, 0], drift[:, 1] = torch.tensor([-4.0, 0.0]), torch.tensor([-4.0, 0.0])
    own.ranking._known = "", {ODDS: torch.zeros(n), HARM: harm, DRIFT: drift}
    before = replace(
        own.point(NONE, 1, 0.0), harm={"one": Value(0.09, 0.09, 0.09), "other": Value(0.03, 0.03, 0.03)}
    )
    found = own.ranking._expected(torch.tensor([1]), own._shares(before))
    assert found is not None
    assert found[:3].tolist() == pytest.approx([(3 * 5 + 3) / 4, (3 * 3 - 3) / 4, 0.0])
    far = replace(before, harm={"one": Value(0.09, 0.09, 0.09), "other": Value(-0.5, 0.0, 0.0)})
    found = own.ranking._expected(torch.tensor([1]), own._shares(far))
    assert found is not None
    assert found[:2].tolist() == pytest.approx([(4 * 5 + 3) / 5, (4 * 3 - 3) / 5])


def two_sources(own: Search) -> Half:
    """Return the choosing half with its preserved samples from two sources in turns."""
    half = own.looking.half
    named = tuple(replace(e, source=("one", "other")[i % 2]) for i, e in enumerate(half.preserve))
    return Half(half.undesired, named)


@pytest.mark.parametrize("power", [0.5, 1.3, 3.0, math.inf, math.nan])
@pytest.mark.parametrize("near", [0, 1, 7, 40, 99, 100, 300])
@pytest.mark.parametrize("largest", [0, 1, 6, 41, 99, 100])
def test_the_largest_number_that_fits_is_found(largest: int, near: int, power: float) -> None:
    """Whether shares are a power of the number, none at all below the limit, or not known above it."""
    tried = list[int]()

    def share_of(count: int, left: int) -> float:
        tried.append(count)
        if power < math.inf:
            return float((count / (largest + 0.5)) ** power)
        return 0.0 if count <= largest else power

    assert _largest(share_of, 0, 100, near, 0.0) == largest
    assert len(tried) == len(set(tried)) <= 20
    assert tried[0] == (near if 0 < near < 100 else 100)
    found = _largest(share_of, 0, 100, near, 0.25)
    assert found <= largest <= max(1.25 * found, found + 1)


def test_numbers_near_an_expected_one_take_few_trials() -> None:
    tried = list[int]()

    def share_of(count: int, left: int) -> float:
        tried.append(count)
        return (count / 60) ** 1.5

    assert 48 <= _largest(share_of, 0, 400, 50, 0.25) <= 60
    assert len(tried) <= 3


def test_on_the_way_what_takes_most_of_the_limit_is_enough() -> None:
    tried = list[int]()

    def share_of(count: int, left: int) -> float:
        tried.append(count)
        return (count / 60) ** 1.5

    assert _largest(share_of, 0, 400, 50, 0.0, 0.7) == 50
    assert tried == [50]  # takes 0.76
    assert _largest(share_of, 0, 400, 50, 0.0, 0.8) > 50


def test_what_does_less_harm_is_tried_first() -> None:
    own = search(budget=1)
    order = own.ranked(NONE, 1, None, own.candidates.count)[0]
    assert own.ranking.harm is not None
    harm = own.ranking.harm.amax(0)
    after = spared(own.ranking.harm, order[:1], order[1:])
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
