"""How large models are and how fast they were seen to run, in numbers and in words."""

from dataclasses import dataclass
from typing import Any

from causalprune.core.types import Decoder


@dataclass(frozen=True)
class Size:
    """The parameters of a model, shared ones counted once, and the bytes of their values as they are saved."""

    parameters: int
    bytes: int

    def beside(self, before: "Size") -> str:
        """Return this size in words, beside that of the model it was made from."""
        if self == before:
            return f"{self}, as before"
        fewer = 1 - self.parameters / before.parameters
        return f"{self}, from {before} ({fewer:.1%} fewer)"

    def __str__(self) -> str:
        """Return this size in words."""
        return f"{self.parameters:,} parameters in {_short(self.bytes / 1e6)} MB"


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a smaller model and of the whole one, timed in turns: medians of `rounds`.

    `reading_gain` and `writing_gain` are medians of the ratios within a round; `how` says what was timed, and on what.
    """

    reading: float
    writing: float
    dense_reading: float
    dense_writing: float
    reading_gain: float
    writing_gain: float
    rounds: int
    how: str

    def __str__(self) -> str:
        """Return the speed in words."""
        read = f"reading {_short(self.reading)} tokens/s ({self.reading_gain:.2f} times the dense model's)"
        return f"{read}, writing {_short(self.writing)} ({self.writing_gain:.2f} times)"


def size_of(decoder: Decoder) -> Size:
    """Return the size of a model, wherever its weights are, in the dtype of its files."""
    own, source = list[Any](decoder.model.parameters()), decoder.source
    width = source.dtype.itemsize if source else None
    return Size(sum(p.numel() for p in own), sum(p.numel() * (width or p.element_size()) for p in own))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
