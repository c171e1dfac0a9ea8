"""A bar for notebooks and scripts: what long functions show unless they are told otherwise; the command line has its own."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from tqdm.auto import tqdm

from causalprune.core.types import Progress

DELAY_SECONDS = 1.5
"""What is over by then shows nothing."""


def bar(given: Progress | None, label: str) -> AbstractContextManager[Progress]:
    """Open the progress of a function: what its caller gave, or else a bar for as long as it lasts."""
    return bars(label) if given is None else nullcontext(given)


@contextmanager
def bars(label: str) -> Iterator[Progress]:
    """Show each stage as a bar of its own on stderr: the default `Stage` of what has several."""
    # Made before the work begins, as some of it silences other bars; shown by `reset`, as nothing else ends the delay.
    with tqdm(desc=label, delay=math.inf, mininterval=0.5, miniters=0) as own:
        yield _Bar(own)


class _Bar:
    """Feeds a bar of tqdm with the work done in all."""

    def __init__(self, own: tqdm) -> None:
        self.own, self.began = own, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        passed = time.monotonic() - self.began
        if passed < DELAY_SECONDS or self.own.disable:  # as TQDM_DISABLE=1 asks
            return
        if total != self.own.total or done < self.own.n:  # at first, and where other work begins
            self.own.reset(total)
            self.own.delay, self.own.start_t = 0, self.own.start_t - passed
            self.own.n = self.own.last_print_n = done
            self.own.refresh()
        self.own.update(done - self.own.n)

    def remark(self, text: str) -> None:
        self.own.set_postfix_str(text, refresh=False)
