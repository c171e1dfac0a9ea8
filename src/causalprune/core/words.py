"""What a progress may be told beside numbers."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from causalprune.core.types import Progress


@runtime_checkable
class Spoken(Protocol):
    """A `Progress` that also shows words."""

    def __call__(self, done: int, total: int) -> None:
        """Take note of the work done and the work in all."""

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
        """Show words; what is empty stays as it was.

        Args:
            note: something to know, once, on a line of its own.
            unit: what the work done and the work in all are counted in.
            part: what is done now, as `2 of 4: trials`, until the work done is `stop`.
            count: how much of the part is done, in place of the work done.
            jobs: the stages of the command in their order, with what they cost in any one unit: 0 where they are done.
        """


def say(progress: Progress, **words: Any) -> None:
    """Let a `Spoken` progress show these words; others show none."""
    if isinstance(progress, Spoken):
        progress.say(**words)
