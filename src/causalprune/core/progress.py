"""Progress with rate and time left: a live line on a terminal, a line now and then in a log."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from causalprune.core import types

LOG_SECONDS = 30.0
WINDOW = 10
TOKENS = ("attribution", "effects", "what ")
"""Stages that begin so count their work in tokens."""

console = Console(stderr=True)


@contextmanager
def shown(label: str) -> Iterator[types.Progress]:
    """Show how far a stage has come, how fast, and how long it still takes; hand out the callback to feed it."""
    if console.is_terminal:
        remark = TextColumn("{task.fields[remark]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(
            TextColumn("{task.description}"), BarColumn(20), *columns, remark, console=console
        ) as bar:
            yield _Line(bar, bar.add_task(label, total=None, rate="", remark=""), label)
    else:
        yield _Log(label)


class _Line:
    """A live line: job, bar, work done of all, rate, time, remark."""

    def __init__(self, bar: Progress, task: TaskID, label: str) -> None:
        self.bar, self.task, self.unit = bar, task, unit_of(label)
        self.start: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.start = self.start or (now, done)
        passed, rate = now - self.start[0], f"{done:,}/{total:,}{self.unit}"
        if passed > 1:
            rate += f" {(done - self.start[1]) / passed:,.3g}{self.unit}/s"
        self.bar.update(self.task, completed=done, total=total, rate=rate)

    def remark(self, text: str) -> None:
        self.bar.update(self.task, remark=text)


class _Log:
    """Writes a line every `LOG_SECONDS`; the rate is that of the last `WINDOW` lines, as resumed work is instant."""

    def __init__(self, label: str) -> None:
        self.label, self.unit, self.text = label, unit_of(label), ""
        self.marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.marks and now - self.marks[-1][0] < LOG_SECONDS:
            return
        self.marks.append((now, done))
        if len(self.marks) == 1:
            return
        (then, before), share = self.marks[0], done / max(total, 1)
        said = f"{self.label}: {share:.0%}, {done:,}/{total:,}{self.unit}"
        if done > before:
            rate = (done - before) / (now - then)
            said += f", {rate:,.3g}{self.unit}/s, {(total - done) / rate:.0f} s left"
        console.print(f"{said}; {self.text}" if self.text else said, highlight=False, markup=False)

    def remark(self, text: str) -> None:
        self.text = text


def unit_of(label: str) -> str:
    """Return what a stage counts, where that is tokens."""
    return " tokens" if label.startswith(TOKENS) else ""
