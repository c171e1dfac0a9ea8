"""What a long job shows: how far, how fast, what was found; in a terminal and in a log."""

import io

import micro
import pytest
from rich.console import Console

from causalprune.attribution.estimators import attribute
from causalprune.core import progress
from causalprune.core.types import Remarked


def console(*, terminal: bool, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def written(own: Console) -> str:
    assert isinstance(own.file, io.StringIO)
    return own.file.getvalue()


@pytest.mark.parametrize("width", [60, 160])
def test_a_live_line_names_job_work_rate_and_remark(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    own, clock = console(terminal=True, width=width), iter(range(100))
    monkeypatch.setattr(progress, "console", own)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.shown("attribution") as tell:
        assert isinstance(tell, Remarked)
        for done in (0, 1000, 2000, 4000):
            tell(done, 8000)
        tell.remark("strongest: layer 1 head 0 (+0.184)")
    lines = written(own).splitlines()
    assert all(len(line.rpartition("\r")[2]) < width + 40 for line in lines)
    if width == 160:
        assert "4,000/8,000 tokens 1.33e+03 tokens/s" in written(own)
        assert "strongest: layer 1 head 0" in written(own)


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    own, now = console(terminal=False), [0.0]
    monkeypatch.setattr(progress, "console", own)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.shown("dense: gsm8k_nll") as tell:
        assert isinstance(tell, Remarked)
        for done in range(0, 101, 10):
            tell.remark("[found]")
            tell(done, 200)
            now[0] += progress.LOG_SECONDS / 2
    lines = written(own).splitlines()
    assert len(lines) == 5
    assert lines[-1] == "dense: gsm8k_nll: 50%, 100/200, 0.667/s, 150 s left; [found]"


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
