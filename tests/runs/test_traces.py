"""The model's own answers as calibration data, and examples that preserve."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tinydata import byte_tokenizer, tiny_decoder, write_jsonl

from causalprune.calibration.data import load_problems
from causalprune.calibration.encoding import Reader
from causalprune.calibration.examples import draw
from causalprune.core.errors import DataError
from causalprune.models.anatomy import inspect_model
from causalprune.runs.recipe import CalibrationSpec
from causalprune.runs.traces import _answers, calibrated, own_answers

SPEC = CalibrationSpec(("own:gsm8k",), n=4, subsets=2, max_tokens=400)
ANSWER = "It is 7."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def speaking(monkeypatch: pytest.MonkeyPatch, endless: int = 0) -> tuple[Any, list[int]]:
    """Return a decoder that answers every prompt alike, the first `endless` without coming to an end."""
    decoder, calls = tiny_decoder(), []

    def generate(tokens: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["max_new_tokens"] == 400 - int(attention_mask.sum(1).min()), (
            "the shortest has most room"
        )
        assert bool((attention_mask.sum(1) > 0).all())
        own = [*decoder.tokenizer(ANSWER)["input_ids"], decoder.tokenizer.eos_token_id]
        rows = []
        for row in tokens.tolist():
            ended = sum(calls) + len(rows) >= endless
            rows.append(row + (own if ended else [5] * len(own)))
        calls.append(len(rows))
        return torch.tensor(rows)

    monkeypatch.setattr(decoder.model, "generate", generate)
    return decoder, calls


def test_own_answers_take_the_place_of_worked_solutions(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    decoder, calls = speaking(monkeypatch)
    found = calibrated(decoder, SPEC, data)
    reader = Reader(decoder.tokenizer, chat=False, max_tokens=400, data_dir=data)
    problems = {e.tokens[: e.target_start] for e in draw(reader, "gsm8k", "calibration")}
    assert len(found.examples) == 4
    for example in found.examples:
        assert example.tokens[: example.target_start] in problems
        assert decoder.tokenizer.decode(example.tokens[example.target_start :]) == ANSWER
    known = {p.content for p in load_problems("gsm8k", "calibration", data_dir=data)}
    assert {example.content for example in found.examples} < known, "an answer is in the half of its problem"
    assert found.description["sources"] == {"own:gsm8k": 4}
    assert len(found.description["own_answers_sha256"]["own:gsm8k"]) == 64
    assert calibrated(decoder, SPEC, data).fingerprint == found.fingerprint
    assert len(calls) == 1, "answers are written once"


def test_answers_without_an_end_are_left_out(
    monkeypatch: pytest.MonkeyPatch, data: Path, cache: Path
) -> None:
    decoder, _ = speaking(monkeypatch, endless=3)
    reader = Reader(decoder.tokenizer, chat=False, max_tokens=400, data_dir=data)
    rows = own_answers(decoder, reader, "gsm8k", 4).read_text(encoding="utf-8").splitlines()
    first = [e.tokens[: e.target_start] for e in draw(reader, "gsm8k", "calibration")][:3]
    shown = [tuple(decoder.tokenizer(json.loads(row)["prompt"] + "\n\n")["input_ids"]) for row in rows]
    assert len(shown) == 4
    assert not set(first) & set(shown)
    silent, _ = speaking(monkeypatch, endless=10**6)
    other = Reader(silent.tokenizer, chat=False, max_tokens=399, data_dir=data)
    monkeypatch.setattr(
        "causalprune.runs.traces._answers", lambda _decoder, _some, _most, rows: [""] * len(rows)
    )
    with pytest.raises(
        DataError, match=r"own:gsm8k: 5 examples asked for, 0 of 12 usable \(12 too long\).*without own:"
    ):
        own_answers(silent, other, "gsm8k", 5)


def test_a_source_with_fewer_problems_gives_all_its_answers(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    decoder, _ = speaking(monkeypatch, endless=1)
    spec = dataclasses.replace(SPEC, n=99)
    with pytest.warns(UserWarning, match="own:gsm8k: 99 examples asked for, 11 taken.* but 1 too long"):
        found = calibrated(decoder, spec, data)
    assert found.description["sources"] == {"own:gsm8k": 11}
    assert len(found.examples) == 11


def test_without_memory_fewer_answers_are_written_at_once(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    decoder, calls = speaking(monkeypatch)
    own = decoder.model.generate

    def crowded(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(tokens, **options)

    monkeypatch.setattr(decoder.model, "generate", crowded)
    reader = Reader(decoder.tokenizer, chat=False, max_tokens=400, data_dir=data)
    with pytest.warns(UserWarning, match="out of memory"):
        rows = own_answers(decoder, reader, "gsm8k", 4).read_text(encoding="utf-8").splitlines()
    assert len(rows) == 4
    assert max(calls) == 3


def test_evaluation_problems_are_never_answered(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    decoder, _ = speaking(monkeypatch)
    reader = Reader(decoder.tokenizer, chat=False, max_tokens=400, data_dir=data)
    out = {e.content for e in draw(reader, "gsm8k", "calibration")}
    with pytest.raises(DataError, match=r"0 of 12 usable \(12 kept for measuring\)"):
        own_answers(decoder, reader, "gsm8k", 4, frozenset(out))


def test_real_generation_gives_text_or_nothing(data: Path) -> None:
    decoder = tiny_decoder()
    reader = Reader(decoder.tokenizer, chat=False, max_tokens=400, data_dir=data)
    with pytest.raises(DataError, match="raise the token limit"):  # a random model does not come to an end
        own_answers(decoder, reader, "gsm8k", 3)


def test_what_is_preserved_comes_after_the_task(data: Path) -> None:
    decoder = tiny_decoder()
    alone = CalibrationSpec(("gsm8k", "arc_challenge"), n=8, subsets=2, max_tokens=200)
    spec = dataclasses.replace(alone, preserve=("wikitext2", "strategyqa:3"))
    found = calibrated(decoder, spec, data)
    assert found.description["sources"] == {"gsm8k": 4, "arc_challenge": 4, "wikitext2": 2, "strategyqa": 3}
    assert found.description["preserve"] == ["wikitext2", "strategyqa"]
    assert found.examples[:8] == calibrated(decoder, alone, data).examples
    text = [e for e in found.examples if e.source == "wikitext2"]
    assert len(text) == 2
    assert all(e.target_start == 1 for e in text)


@pytest.mark.thorough
def test_own_text_is_a_share_of_the_tokens(data: Path) -> None:
    decoder = tiny_decoder()
    alone = CalibrationSpec(("gsm8k",), n=8, subsets=2, max_tokens=200, preserve=())
    task = calibrated(decoder, alone, data)
    assert "own_text_sha256" not in task.description
    found = calibrated(decoder, dataclasses.replace(alone, preserve=("own",)), data)
    wanted = round(task.description["tokens"] / 4 / 200)
    assert found.description["sources"] == {"gsm8k": 8, "own": wanted}
    assert 1 < wanted < 8
    assert found.examples[:8] == task.examples
    assert len(found.description["own_text_sha256"]) == 64


def test_own_answers_to_problems_of_a_file(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    decoder, _ = speaking(monkeypatch)
    file = data / "gsm8k" / "train.jsonl"
    rows = [
        {"prompt": json.loads(line)["question"], "target": "no matter"}
        for line in file.read_text().splitlines()
    ]
    own = write_jsonl(data / "own.jsonl", rows)
    found = calibrated(decoder, CalibrationSpec((f"own:{own}",), n=4, subsets=2, max_tokens=400))
    assert all(decoder.tokenizer.decode(e.tokens[e.target_start :]) == ANSWER for e in found.examples)


def test_running_text_has_no_answers_of_its_own(tmp_path: Path) -> None:
    decoder, own = tiny_decoder(), write_jsonl(tmp_path / "own.jsonl", [{"text": "Some words."}])
    reader = Reader(decoder.tokenizer, chat=False, max_tokens=40)
    with pytest.raises(DataError, match=r"own.jsonl:1: running text has nothing to answer: .* as it is"):
        own_answers(decoder, reader, str(own), 1)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_answers_stay_within_the_positions_of_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = inspect_model(FAMILIES[family](), byte_tokenizer(), name=family)
    reader = Reader(decoder.tokenizer, chat=False, max_tokens=64, positions=64)
    generate, asked = decoder.model.generate, list[tuple[int, int]]()

    def counted(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append((len(tokens), tokens.shape[1] + options["max_new_tokens"]))
        return generate(tokens, **options, eos_token_id=63)

    monkeypatch.setattr(decoder.model, "generate", counted)
    monkeypatch.setattr("causalprune.runs.traces.ends_of", lambda _model, _tokenizer: {63})
    monkeypatch.setattr(
        decoder.model.get_output_embeddings(), "bias", torch.nn.Parameter(-9.0 * (torch.arange(64) == 63))
    )
    _answers(decoder, [[*range(3, 53)], [5, 6, 7]], reader, [0, 1])
    assert asked == [(2, 64), (1, 64)], "the shorter one goes on alone"
