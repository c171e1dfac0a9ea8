"""What a long job shows: at what it is, how far, how long it still takes; in a terminal and in a log."""

import contextlib
import io
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import micro
import pytest
from rich.console import Console

from causalprune.attribution.estimators import attribute
from causalprune.core import progress
from causalprune.core.progress import Line, spoken
from causalprune.core.types import Remarked, silent
from causalprune.core.words import Spoken, say


def console(*, terminal: bool, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def written(own: Console) -> str:
    assert isinstance(own.file, io.StringIO)
    return own.file.getvalue()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, which stands still; no job of another test is known."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "_command", progress._Command())
    return clock


def until(there: Callable[[], bool]) -> None:
    """Wait for another thread."""
    for _ in range(1000):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("width", [60, 160])
def test_a_live_line_names_job_work_rate_and_remark(
    monkeypatch: pytest.MonkeyPatch, width: int, now: list[float]
) -> None:
    own = console(terminal=True, width=width)
    monkeypatch.setattr(progress, "console", own)
    with progress.shown("attribution") as tell:
        assert isinstance(tell, Remarked)
        assert isinstance(tell, Spoken)
        tell.say(unit="tokens", note="going on: 3 of 8 jobs done")
        for done in (0, 1000, 2000, 4000):
            tell(done, 8000)
            now[0] += 1
        tell.remark("strongest: layer 1 head 0 (+0.184)")
    lines = written(own).splitlines()
    assert all(len(line.rpartition("\r")[2]) < width + 40 for line in lines)
    assert "going on: 3 of 8 jobs done" in written(own)
    if width == 160:
        assert "4,000 of 8,000 tokens, 1.33e+03/s" in written(own)
        assert "2 s left" in written(own)
        assert "strongest: layer 1 head 0" in written(own)


def test_a_log_has_a_line_for_what_begins_and_one_now_and_then_even_where_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = console(terminal=False)
    monkeypatch.setattr(progress, "console", own)
    monkeypatch.setattr(progress, "_command", progress._Command())  # no job of another test is known
    monkeypatch.setattr(progress, "AT_ONCE", 0.05)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    with progress.shown("pruning") as tell:
        say(tell, note="going on: gradients done")
        until(lambda: re.search(r"still pruning, \d+ s\n", written(own)) is not None)
        say(tell, part="2 of 4: trials", stop=500, count="3 of 30 layers")
        tell(100, 1000)
        until(lambda: "still pruning, 2 of 4: trials: 3 of 30 layers, " in written(own))
        assert isinstance(tell, Remarked)
        tell.remark("[found]")
        until(lambda: "; [found]\n" in written(own))
    lines = written(own).splitlines()
    assert lines[:2] == ["going on: gradients done", "pruning"]
    assert re.fullmatch(r"still pruning, \d+ s", lines[2])
    assert "pruning, 2 of 4: trials: 3 of 30 layers" in lines
    time.sleep(0.05)
    assert written(own).splitlines() == lines  # the writer has ended with the stage


def test_what_is_over_at_once_is_not_worth_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    own = console(terminal=False)
    monkeypatch.setattr(progress, "console", own)
    monkeypatch.setattr(progress, "AT_ONCE", 60.0)
    with progress.shown("calibration data"):
        pass
    assert not written(own)


@pytest.mark.thorough
def test_a_live_line_moves_while_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    own = console(terminal=True)
    monkeypatch.setattr(progress, "console", own)
    with progress.shown("loading model"):
        until(lambda: len(set(re.findall(r"0:00:0\d", written(own)))) > 1)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_library_silences_for_itself_goes_on_here(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    own = Console(stderr=True, force_terminal=terminal, width=160, color_system=None)
    monkeypatch.setattr(progress, "console", own)
    monkeypatch.setattr(progress, "AT_ONCE", 0.01)
    with progress.shown("loading model"), contextlib.redirect_stderr(io.StringIO()) as swallowed:
        time.sleep(0.3)
        sys.stderr.write("words of a library")
    found = capfd.readouterr().err
    assert "loading model" in found
    assert "library" not in found
    assert "loading" not in swallowed.getvalue()


def fed(line: Any, now: list[float], per_second: int, seconds: int, total: int) -> None:
    for _ in range(seconds):
        now[0] += 1
        line(line.done + per_second, total)


def test_parts_of_other_speeds_are_not_judged_by_the_one_at_hand(now: list[float]) -> None:
    line = Line("pruning")
    line(0, 1000)
    line.say(part="1 of 2: gradients", stop=200)
    line(0, 1000)
    fed(line, now, 10, 20, 1000)
    assert line.left() == "80 s left"
    line.say(part="2 of 2: layers", stop=1000)
    line(200, 1000)
    assert line.left() == "80 s left"  # nothing is known of this part: as fast as all so far
    fed(line, now, 1, 10, 1000)
    assert line.left() == "13 min left"


def test_parts_that_an_earlier_run_has_done_do_not_count_as_fast(now: list[float]) -> None:
    line = Line("pruning")
    line(100, 1000)
    line.say(part="2 of 2: layers", stop=1000)
    line(800, 1000)
    assert not line.left()
    fed(line, now, 1, 10, 1000)
    assert line.left() == "3 min left"


def test_work_of_an_earlier_run_does_not_count_as_fast(now: list[float]) -> None:
    line = Line("attribution")
    line(900, 1000)
    fed(line, now, 1, 10, 1000)
    assert line.left() == "90 s left"
    now[0] += 30
    assert line.left() == "60 s left"  # and time goes on while nothing is reported


def test_time_left_is_that_of_all_jobs_each_by_those_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    monkeypatch.setattr(progress, "console", console(terminal=False))
    jobs = {"dense: loss": 100.0, "dense: answers": 100.0, "wanda: pruning": 50.0, "wanda: loss": 100.0}
    with progress.shown("loading model") as tell:
        say(tell, jobs={**jobs, "wanda: answers": 100.0, "done: loss": 0.0})
    with progress.shown("dense: loss") as tell:
        assert isinstance(tell, Line)
        assert tell.head() == "job 1 of 6, dense: loss"
        assert not tell.left()
        tell(0, 10)
        fed(tell, now, 1, 5, 10)
        assert tell.left() == f"{spoken(5 + 100 * 0.1 + 50 * 0.1 + 200 * 0.1)} left"
        fed(tell, now, 1, 5, 10)
    with progress.shown("dense: answers") as tell:
        assert isinstance(tell, Line)
        assert tell.left() == f"{spoken(35.0)} left"
        now[0] += 100
    with progress.shown("wanda: pruning") as tell:
        assert isinstance(tell, Line)
        assert tell.head() == "job 3 of 6, wanda: pruning"
        assert tell.left() == f"{spoken(50 * 110 / 200 + 10 + 100)} left"


def test_a_job_that_costs_next_to_nothing_tells_nothing_of_the_others(
    monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    """As `cap`, which has its effects and looks at no data, between methods that do."""
    monkeypatch.setattr(progress, "console", console(terminal=False))
    with progress.shown("loading model") as tell:
        say(tell, jobs={"wanda: pruning": 2000.0, "cap: pruning": 1.0, "causal: pruning": 10_000.0})
    with progress.shown("wanda: pruning") as tell:
        tell(0, 20)
        fed(tell, now, 1, 20, 20)
    with progress.shown("cap: pruning") as tell:
        assert isinstance(tell, Line)
        tell(0, 10)
        fed(tell, now, 1, 5, 10)
        assert tell.left() == f"{spoken(5 + 100)} left"
        fed(tell, now, 1, 5, 10)
    with progress.shown("causal: pruning") as tell:
        assert isinstance(tell, Line)
        assert tell.left() == f"{spoken(100)} left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4321.0, "1 h 12 min"),
        (3600.0, "1 h 0 min"),
        (725.0, "12 min"),
        (100.0, "2 min"),
        (99.0, "99 s"),
        (0.2, "0 s"),
    ],
)
def test_times_are_said_in_hours_and_minutes(seconds: float, text: str) -> None:
    assert spoken(seconds) == text


def test_words_are_lost_on_those_who_do_not_show_them() -> None:
    say(silent, note="going on", jobs={})


def test_attribution_names_the_strongest_unit() -> None:
    class Watched:
        said: list[str] = []  # noqa: RUF012

        def __call__(self, done: int, total: int) -> None:
            assert 0 < done <= total

        def remark(self, text: str) -> None:
            self.said.append(text)

    watched = Watched()
    effects = attribute(micro.decoder(), micro.CALIBRATION, on_progress=watched)
    best = effects.units[int(effects.paired_delta_nats().argmax())]
    value = float(effects.paired_delta_nats().max())
    assert watched.said[-1] == f"strongest: layer {best.layer} head {best.index} ({value:+.3g})"
