"""Files of a user's, and models that answer as they are told to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tinydata import byte_tokenizer, write_jsonl

from causalprune.core.types import Decoder
from causalprune.evaluation import answering
from causalprune.evaluation.tasks.generation import Answer


def own_file(folder: Path, targets: Sequence[str], prompt: str = "Question {}?") -> Path:
    rows = [{"prompt": prompt.format(i), "target": target} for i, target in enumerate(targets)]
    return write_jsonl(folder / "own.jsonl", rows)


Says = Callable[[str], str]


def speak(
    monkeypatch: pytest.MonkeyPatch, says: Says, *, ended: bool = True
) -> list[tuple[str, int, list[str]]]:
    """Let every model answer as `says` a prompt; return prompts, limits and stops, the longest prompt first."""
    calls: list[tuple[str, int, list[str]]] = []

    def answers(
        decoder: Decoder, prompts: Sequence[Sequence[int]], limit: int, stop: list[str], *_: Any
    ) -> list[Answer]:
        found = []
        for prompt in prompts:
            text = decoder.tokenizer.decode(prompt)
            calls.append((text, limit, stop))
            tokens = tuple(byte_tokenizer()(says(text))["input_ids"])
            found.append(Answer(tokens, len(tokens) + ended, ended, broken=False))
        return found

    monkeypatch.setattr(answering, "answers", answers)
    return calls
