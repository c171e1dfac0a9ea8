"""Jobs are handed out longest first to whoever is free; what was lost is done again, and nothing twice."""

import heapq
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import calibration, shared

from causalprune.attribution.cluster import Cluster, fill, hand_out, in_order
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import planned
from causalprune.core.errors import OptionError
from causalprune.core.types import silent


class Clock:
    """A crew whose work takes simulated time, and which loses some jobs the first time."""

    def __init__(self, workers: int, seconds: Mapping[str, float], lost: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.idle, self.now, self.seconds, self.lost = workers, 0.0, seconds, set(lost)
        self.running: list[tuple[float, str]] = []
        self.begun: list[str] = []

    @property
    def free(self) -> bool:
        return self.idle > 0

    def begin(self, key: str) -> None:
        self.idle -= 1
        self.begun.append(key)
        heapq.heappush(self.running, (self.now + self.seconds[key], key))

    def finished(self) -> tuple[str, bool]:
        self.now, key = heapq.heappop(self.running)
        self.idle += 1
        done = key not in self.lost
        self.lost.discard(key)
        return key, done


def test_intact_losses_come_first_and_then_the_longest() -> None:
    costs = {(0, 0): 4.0, (0, 1): 2.0, (1, 0): 8.0, (1, 1): 0.0}
    assert list(in_order(costs)) == ["0:intact", "1:intact", "1:0", "0:0", "0:1"]
    assert list(in_order(costs).values()) == [0, 1, (1, 0), (0, 0), (0, 1)]


@given(
    seconds=st.lists(st.floats(0.1, 10), min_size=1, max_size=30),
    workers=st.integers(1, 6),
    lost=st.sets(st.integers(0, 29)),
)
def test_everything_is_done_once_within_the_bound_of_list_scheduling(
    seconds: list[float], workers: int, lost: set[int]
) -> None:
    jobs = {str(i): t for i, t in enumerate(seconds)}
    crew = Clock(workers, jobs, {str(i) for i in lost})
    assert sorted(hand_out(jobs, crew)) == sorted(jobs)
    assert not crew.running
    again = [jobs[str(i)] for i in lost if str(i) in jobs]
    last = max(seconds) * (
        2 if again else 1 - 1 / workers
    )  # what is done again can only begin when it is lost
    assert crew.now <= (sum(seconds) + sum(again)) / workers + last + 1e-9


def test_a_lost_job_is_the_next() -> None:
    crew = Clock(1, dict.fromkeys("abc", 1.0), {"a"})
    assert list(hand_out("abc", crew)) == ["a", "b", "c"]
    assert crew.begun == ["a", "a", "b", "c"]


def test_nobody_waits_while_there_is_work() -> None:
    crew = Clock(2, {"a": 3.0, "b": 1.0, "c": 1.0, "d": 1.0})
    list(hand_out("abcd", crew))
    assert crew.now == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "Ray does not start on this machine .*timed out"),
        ("auto", "no Ray cluster at 'auto'.*timed out"),
    ],
)
def test_a_cluster_that_does_not_start_is_said(
    address: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 (as Ray does)

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    plan = planned(shared("llama2"), calibration())
    with pytest.raises(OptionError, match=message):
        fill(plan, tmp_path / "ledger", lambda: Passes(plan), Cluster(1, address), silent)


def test_without_ray_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    plan = planned(shared("llama2"), calibration())
    with pytest.raises(OptionError, match=r"install causalprune\[ray\]"):
        fill(plan, tmp_path / "ledger", lambda: Passes(plan), Cluster(1), silent)
