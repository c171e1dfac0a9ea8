"""What long work says: what it is at, how far it has come, and how long the whole command still takes.

A live line on a terminal; in a log a line when something begins, and one every few seconds, even where nothing has changed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:  # torch takes seconds
    from causalprune.core import types

LOG_SECONDS = 8.0
AT_ONCE = 0.2
"""Seconds after which a log names what has begun: what is over by then is not worth a line."""
TELLING = 0.02
"""Of what the dearest job of a kind costs: the least that tells of its pace."""
MARKS = 300
"""Seconds of the part at hand that its rate is taken from."""

console = Console(stderr=True)


@contextmanager
def shown(
    label: str, *, quiet: bool = False, log: Callable[[str], None] | None = None
) -> "Iterator[types.Progress]":
    """Show how far a stage has come and how long the command still takes; hand out the callback to feed it.

    A `log` gets the lines that stderr gets where that is no terminal; with `quiet` it is the only one to hear.
    """
    line = Line(label)
    with ExitStack() as stack:
        stack.enter_context(_steady())
        if not quiet:
            stack.enter_context(_live(line) if console.is_terminal else _logged(line, _print))
        if log is not None:
            stack.enter_context(_logged(line, log))
        yield line
    _command.finish(line)


def _print(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _steady() -> Iterator[None]:
    """Write to where it is written now, also while a library's own words are redirected."""
    before, console.file = console._file, console.file  # noqa: SLF001
    try:
        yield
    finally:
        console._file = before  # noqa: SLF001


class _Command:
    """The jobs of the command, in their order, with what each costs, and how long those of a kind took."""

    def __init__(self) -> None:
        self.jobs: dict[str, float] = {}
        self._dearest: dict[str, float] = {}
        """What the dearest job of a kind costs."""
        self._spent: dict[str, tuple[float, float]] = {}
        """Seconds, and what they bought, of the latest job of a kind."""

    def plan(self, jobs: Mapping[str, float]) -> None:
        """Take note of what is to come; what costs nothing is done already."""
        self.jobs, self._dearest = dict(jobs), {}
        for label, price in jobs.items():
            self._dearest[_kind(label)] = max(price, self._dearest.get(_kind(label), 0.0))

    def number(self, label: str) -> str:
        """Return which job of how many this is, where there are several."""
        at = list(self.jobs).index(label) + 1 if label in self.jobs else 0
        return f"job {at} of {len(self.jobs)}, " if at and len(self.jobs) > 1 else ""

    def later(self, line: "Line", own: float | None) -> float | None:
        """Return the seconds of the jobs after this one, and of this one where it cannot tell; None where nothing tells."""
        spent, left = dict(self._spent), self.jobs.get(line.label, 0.0) * (1 - line.share())
        if own and left and self._tells(line.label, self.jobs[line.label]):
            spent[_kind(line.label)] = own, left
        seconds, bought = (sum(column) for column in zip((0.0, 0.0), *spent.values(), strict=True))
        total = 0.0
        for label, price in self.jobs.items():
            if price and (label != line.label or own is None):
                if not bought:
                    return None
                of_kind = spent.get(_kind(label), (seconds, bought))
                total += price * of_kind[0] / of_kind[1]
        return total

    def finish(self, line: "Line") -> None:
        """Take note of how long a job took; of one that went on from an earlier run, by the share that was done now.

        What costs next to nothing, as a pruning that looks at no data, tells nothing of the pace of others.
        """
        bought = self.jobs.get(line.label, 0.0) * line.worked()
        if bought and self._tells(line.label, bought):
            self._spent[_kind(line.label)] = time.monotonic() - line.began, bought
        if line.label in self.jobs:
            self.jobs[line.label] = 0.0

    def _tells(self, label: str, price: float) -> bool:
        """Tell whether work at a price says something of the pace of a kind of jobs."""
        return price >= TELLING * self._dearest.get(_kind(label), 0.0)


_command = _Command()


class Line:
    """A stage at work, as a `Progress` that is `Spoken` and `Remarked`."""

    def __init__(self, label: str) -> None:
        self.label, self.part, self.unit, self.count, self.text = label, "", "", "", ""
        self.done = self.total = self.stop = 0
        self.began = self.changed = time.monotonic()
        self.outlets: list[Callable[[str], None]] = []
        """Where lines go that are said once."""
        self.wakes: list[threading.Event] = []
        """Set where a log has something to say before its time."""
        self.on_change: Callable[[], None] = lambda: None
        self._first: tuple[float, int] | None = None
        self._last = (self.began, 0)
        self._marks: deque[tuple[float, int]] = deque(maxlen=MARKS)

    def __call__(self, done: int, total: int) -> None:
        """Take note of the work done and the work in all."""
        now = time.monotonic()
        if self.total != total or self._first is None:
            self._first, self._marks = (now, done), deque(maxlen=MARKS)
        elif not self._marks:  # a part begins: what was skipped is no work of now
            self._first = self._first[0], self._first[1] + done - self.done
        self.changed = now if (done, total) != (self.done, self.total) else self.changed
        self.done, self.total, self._last = done, total, (now, done)
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append(self._last)
        self.on_change()

    def remark(self, text: str) -> None:
        """Show this text beside the progress, in place of the one before."""
        self.text = text

    def say(
        self,
        *,
        note: str = "",
        unit: str = "",
        part: str = "",
        stop: int = 0,
        count: str = "",
        jobs: Mapping[str, float] | None = None,
    ) -> None:
        """Show words (`words.Spoken`)."""
        if jobs is not None and self.label not in _command.jobs:  # a job of a larger plan makes none
            _command.plan(jobs)
        for outlet in self.outlets if note else ():
            outlet(note)
        if part:
            self.part, self.stop, self.count, self.changed = part, stop, "", time.monotonic()
            self._marks = deque(maxlen=MARKS)  # not cleared: another thread may be reading it
            for wake in self.wakes:
                wake.set()
        self.unit, self.count = unit or self.unit, count or self.count

    def head(self) -> str:
        """Return what is at work: job of how many, stage, part of how many."""
        part = f", {self.part}" if self.part else ""
        return f"{_command.number(self.label)}{self.label}{part}"

    def body(self) -> str:
        """Return how much of it is done, and how fast that goes where it is counted alike all along."""
        if self.count or self.part or not self.total:
            return self.count
        rate = f", {per:,.3g}/s" if (per := self._rate()) else ""
        return f"{self.done:,} of {self.total:,}{f' {self.unit}' if self.unit else ''}{rate}"

    def left(self) -> str:
        """Return how long the command still takes, empty where that is not known."""
        own = self._left()
        later = _command.later(self, own)
        if later is None or (own is None and not later):
            return ""
        return f"{spoken(later + (own or 0.0))} left"

    def share(self) -> float:
        """Return which share of this stage is done."""
        return self.done / self.total if self.total else 0.0

    def worked(self) -> float:
        """Return which share of this stage was done in this process."""
        return (self.done - self._first[1]) / self.total if self._first and self.total else 1.0

    def _rate(self, since: tuple[float, int] | None = None) -> float:
        """Return the work of a second since then, or lately in the part at hand; 0 where that cannot be said."""
        (now, done), marks = self._last, self._marks
        since = since or (marks[0] if marks else None)
        return (done - since[1]) / (now - since[0]) if since and now - since[0] > 0.5 else 0.0

    def _left(self) -> float | None:
        """Return the seconds that this stage takes: the part at hand by its own rate, what follows by that of all so far."""
        overall = self._rate(self._first)
        own = self._rate() or overall
        if not own:
            return None
        stop = min(self.stop or self.total, self.total)
        seconds = (stop - self.done) / own + (self.total - stop) / (overall or own)
        return max(seconds - (time.monotonic() - self._last[0]), 0.0)


def spoken(seconds: float) -> str:
    """Return a time as one says it: `1 h 12 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"


def _kind(label: str) -> str:
    """Return what jobs of equal pace have in common: all but the names of the model and the draw that they are about."""
    return label.rpartition(": ")[2].partition(" (")[0]


class _Words(ProgressColumn):
    """A column of words that are asked for whenever the line is drawn."""

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self.words = words

    def render(self, task: Task) -> Text:
        return Text(self.words())


@contextmanager
def _live(line: Line) -> Iterator[None]:
    """Draw a line again and again, also while nothing is fed to it."""
    columns = (_Words(line.body), TimeElapsedColumn(), _Words(line.left), _Words(lambda: line.text))
    with Progress(_Words(line.head), BarColumn(20), *columns, console=console) as bar:
        task = bar.add_task("", total=None)
        line.on_change = lambda: bar.update(task, completed=line.done, total=line.total or None)
        line.outlets.append(_print)
        yield


@contextmanager
def _logged(line: Line, outlet: Callable[[str], None]) -> Iterator[None]:
    """Write a line when a stage or a part of it begins, and every `LOG_SECONDS`."""
    over, wake = threading.Event(), threading.Event()
    line.outlets.append(outlet)
    line.wakes.append(wake)
    writer = threading.Thread(target=_write, args=(line, outlet, wake, over), daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        wake.set()
        writer.join()


def _write(line: Line, outlet: Callable[[str], None], wake: threading.Event, over: threading.Event) -> None:
    before, pause = "", 0.0
    while True:
        wake.wait(pause)
        if over.wait(AT_ONCE):
            return
        wake.clear()
        text = ": ".join(filter(None, (line.head(), line.body())))
        still = f"still {text}, {time.monotonic() - line.changed:.0f} s"
        said = [still if text == before else text, line.left()]
        said = [", ".join(filter(None, said)), line.text]
        outlet("; ".join(filter(None, said)))
        before, pause = text, LOG_SECONDS
