"""Progress with time left: a live bar on a terminal, a line now and then in a log."""

import time
from collections import deque
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
WINDOW = 10

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
    """Writes a line every `LOG_SECONDS`; the rate is that of the last `WINDOW` lines, as resumed work is instant."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.marks and now - self.marks[-1][0] < LOG_SECONDS:
            return
        self.marks.append((now, done))
        if len(self.marks) == 1:
            return
        (then, before), share = self.marks[0], done / max(total, 1)
        left = f", {(total - done) * (now - then) / (done - before):.0f} s left" if done > before else ""
        console.print(f"{self.label}: {share:.0%}{left}", highlight=False)
