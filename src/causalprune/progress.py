"""Progress with time left: a live bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from causalprune import types

LOG_SECONDS = 30.0

console = Console(stderr=True)


@contextmanager
def shown(label: str) -> Iterator[types.Progress]:
    """Show how far a stage has come, and how long it still takes; hand out the callback to feed it."""
    if console.is_terminal:
        columns = (TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _Log(label).update


class _Log:
    """Writes a line at most every `LOG_SECONDS`."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.start = self.written = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.written < LOG_SECONDS:
            return
        self.written = now
        rate = (done - self.first) / (now - self.start)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        console.print(f"{self.label}: {done / max(total, 1):.0%}{left}", highlight=False)
