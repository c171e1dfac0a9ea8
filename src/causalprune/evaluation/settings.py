"""How tasks are run, and what every result says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from causalprune import calibration
from causalprune.calibration import Chat, Reader, Thinking, Turns
from causalprune.core import METHOD_VERSION, Decoder
from causalprune.evaluation.tasks.answers import check_kind
from causalprune.evaluation.tasks.scorers import Scorer, reference
from causalprune.models import positions

NEWER = ("answer", "thinking", "scorers", "turns", "fold_system", "phrases")
"""Settings that ledgers of earlier releases do not know."""


@dataclass(frozen=True)
class Settings:
    """How tasks are run.

    `limit` is the number of problems (tokens for perplexity) of tasks that name none; which ones is
    fixed by `seed`. `max_tokens` bounds a sequence of a solution loss, `window` is the length of a
    perplexity window, or the model's positions where it has fewer. A batch holds up to `batch_tokens` tokens, in the harness `batch_size`
    sequences. `max_new_tokens` is the length of generated answers at most; None: that of task files, else 512, and 4,096 for
    a model that thinks first, or what fits its positions. `thinking` says whether it does, `answer` how answers to problems
    of a file are read (None: as its targets end). `scorers` are functions that a task `SOURCE_name` calls by their names.
    `turns` and `fold_system` are as in `calibration.Reader`, `phrases` what `SOURCE_phrases` looks for.
    """

    limit: int | None = None
    data_dir: Path | str | None = None
    seed: int = 0
    max_tokens: int = 512
    window: int = 2048
    chat: Chat = "auto"
    batch_tokens: int = 4096
    batch_size: int = 16
    max_new_tokens: int | None = None
    answer: str | None = None
    thinking: Thinking = "auto"
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    turns: Turns = "last"
    fold_system: bool = False
    phrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.answer is not None:
            check_kind(self.answer)

    def identity(self) -> dict[str, Any]:
        """Return what results depend on, as ledgers keep it: newer settings where they are used."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "data_dir"}
        own["scorers"] = {name: reference(scorer) for name, scorer in self.scorers.items()}
        return {
            key: value
            for key, value in own.items()
            if key not in NEWER or value not in (None, "auto", {}, "last", False, ())
        }


def reader_for(decoder: Decoder, settings: Settings, *, chat: bool | None = None) -> Reader:
    """Return how the problems of a task are read, by the chat template or not."""
    uses = calibration.uses_chat(decoder.tokenizer, settings.chat) if chat is None else chat
    return Reader(
        decoder.tokenizer,
        uses,
        settings.max_tokens,
        settings.seed,
        settings.data_dir,
        turns=settings.turns,
        fold_system=settings.fold_system,
        positions=positions(decoder.model.config),
    )


def described(decoder: Decoder, settings: Settings, *, chat: bool = False) -> dict[str, Any]:
    """Return what every result says of its model, its examples, and how their texts are made."""
    model: dict[str, Any] = {"model": decoder.name, "revision": decoder.revision}
    model |= {
        "fingerprint": decoder.fingerprint,
        "split": "evaluation",
        "limit": settings.limit,
        "seed": settings.seed,
    }
    read = calibration.described(reader_for(decoder, settings, chat=chat))
    return {**model, **read, "method_version": METHOD_VERSION}
