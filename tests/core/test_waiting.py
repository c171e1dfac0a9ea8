"""Bars of notebooks and scripts: there after a moment, fed with the work done in all, and gone on request."""

from functools import partial
from types import SimpleNamespace

import pytest

from causalprune.core import waiting
from causalprune.core.types import Progress, Remarked, silent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the bars see this time."""
    now = [0.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


Screen = pytest.CaptureFixture[str]


def test_a_bar_appears_after_the_delay_only(clock: list[float], capsys: Screen) -> None:
    with waiting.bars("pruning") as tell:
        tell(1, 8)
        clock[0] = waiting.DELAY_SECONDS - 0.01
        tell(2, 8)
        assert not capsys.readouterr().err
        clock[0] = waiting.DELAY_SECONDS
        tell(4, 8)
        assert "pruning:  50%" in capsys.readouterr().err
        assert isinstance(tell, Remarked)
        tell.remark("layer 3")
        tell(8, 8)
    said = capsys.readouterr().err
    assert "8/8" in said
    assert "layer 3" in said


def test_what_is_over_soon_or_says_nothing_shows_no_bar(clock: list[float], capsys: Screen) -> None:
    with waiting.bars("short") as tell:
        tell(8, 8)
    with waiting.bars("mute"):
        clock[0] = 100.0
    assert not capsys.readouterr().err


def test_other_work_begins_anew_in_the_same_bar(clock: list[float], capsys: Screen) -> None:
    with waiting.bars("both") as tell:
        clock[0] = 10.0
        tell(7, 8)
        tell(1, 20)
        assert "| 1/20 " in capsys.readouterr().err
        tell(20, 20)
    assert capsys.readouterr().err.count("100%") == 1


def test_a_bar_is_there_where_none_is_given(clock: list[float], capsys: Screen) -> None:
    told: list[int] = []

    def given(done: int, total: int) -> None:
        told.append(done)

    def work(on_progress: Progress | None) -> None:
        with waiting.bar(on_progress, "work") as tell:
            clock[0] += 10.0
            tell(1, 2)

    work(given)
    work(silent)
    assert told == [1]
    assert not capsys.readouterr().err
    work(None)
    assert "work:  50%" in capsys.readouterr().err


def test_a_bar_ends_where_work_fails(clock: list[float], capsys: Screen) -> None:
    def fails() -> None:
        with waiting.bars("broken") as tell:
            clock[0] = 10.0
            tell(1, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert "50%" in (said := capsys.readouterr().err)
    assert said.endswith("\n")


def test_bars_can_be_disabled(clock: list[float], capsys: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "tqdm", partial(waiting.tqdm, disable=True))
    with waiting.bars("off") as tell:
        clock[0] = 10.0
        tell(1, 2)
    assert not capsys.readouterr().err
