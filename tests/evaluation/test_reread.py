"""Data that are read otherwise than they seem: files that change, numbers with commas, few of them, and long texts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import calibration, shared
from test_results import result
from tinydata import tiny_decoder, write_jsonl

from causalprune.calibration import batches
from causalprune.calibration.data import Problem
from causalprune.calibration.encoding import Reader, encode, question_text, question_tokens
from causalprune.calibration.forms import own_rows
from causalprune.core.errors import MismatchError
from causalprune.core.ledger import Ledger
from causalprune.evaluation.measures import digests, evaluate
from causalprune.evaluation.results import interval, load_rows, paired_difference, write_json
from causalprune.evaluation.tasks.answers import extract, guess
from causalprune.interventions import losses
from causalprune.runs.study import note_data


def rows(*targets: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1?", "target": target} for i, target in enumerate(targets)]


def test_a_file_that_was_changed_is_not_compared_with_itself(tmp_path: Path) -> None:
    decoder, file = tiny_decoder(), tmp_path / "test.jsonl"
    write_jsonl(file, rows("one", "two", "three"))
    (before,) = evaluate(decoder, [f"{file}_nll"])
    for count in (1, 2):
        with Ledger(tmp_path / "run" / "results.ledger", {}) as book:
            note_data(book, digests([f"{file}_nll", "gsm8k_nll"]))
            assert len(book.rows) == 1, count
            assert not any("/" in key for key in book.rows), "it would be taken for a measurement"
    write_jsonl(file, rows("one", "two", "threw"))  # as long
    (after,) = evaluate(decoder, [f"{file}_nll"])
    assert after.weights == before.weights
    with (
        Ledger(tmp_path / "run" / "results.ledger", {}) as book,
        pytest.raises(MismatchError, match=r"test\.jsonl has changed since .*run was begun"),
    ):
        note_data(book, digests([f"{file}_nll"]))
    with pytest.raises(MismatchError, match="the file was changed between these results"):
        paired_difference(after, before)
    old = {key: own for key, own in before.description.items() if key != "data"}
    paired_difference(after, replace(before, description=old))  # of a release that did not note it


def test_running_text_of_a_file_is_measured(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "text.jsonl", [{"text": "It rained all day."}, {"text": "Then it stopped."}]
    )
    (found,) = evaluate(tiny_decoder(), [f"{file}_nll"])
    assert len(found.values) == 2
    assert found.description["data"]


@pytest.mark.parametrize(
    ("targets", "kind", "texts"),
    [
        (("Das sind 3,5", "1.234,5 kg", "7"), "number_comma", {"also 12,5.": "12.5", "1.234.567 Euro": "1234567", "-0,50": "-0.5"}),
        (("1 234 €".replace(" ", "\u202f"), "3"), "number_comma", {"12\u202f000": "12000"}),
        (("1,234", "$5.50"), "number", {"1,234.5": "1234.5", "3, 4 and 5": "5"}),
        (("1,234,567", "12"), "number", {"-3": "-3"}),
    ],
)  # fmt: skip
def test_numbers_are_read_as_the_targets_write_them(
    targets: tuple[str, ...], kind: str, texts: dict[str, str]
) -> None:
    assert guess(targets) == kind
    assert {text: extract(text, kind) for text in texts} == texts


def test_a_plain_prompt_of_a_chat_model_begins_as_a_text_does() -> None:
    decoder = tiny_decoder(chat=True, bos=True)
    reader = Reader(decoder.tokenizer, chat=True, max_tokens=100)
    problem = Problem("ioi", "Anna met Bert. Bert handed a book to", " Anna", plain=True)
    tokens = question_tokens(reader, problem, question_text(reader, problem))
    assert tokens[0] == decoder.tokenizer.bos_token_id
    assert tuple(tokens) == encode(reader, problem).tokens[: len(tokens)]


def test_fewer_answers_than_asked_for_are_said(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "own.jsonl", rows("1", "2", "3"))
    with pytest.warns(UserWarning, match="8 examples asked for, 3 taken: all that it holds"):
        evaluate(tiny_decoder(), [f"{file}_answers:8"], max_new_tokens=2)


def test_logits_of_long_texts_exist_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, seen, logits = shared("llama3"), list[int](), losses.target_logits
    (batch,) = batches(calibration(((14, 5), (13, 4))).examples, max_batch_tokens=100)
    whole = losses.target_nats(decoder, batch)

    def counted(*given: Any) -> Any:
        seen.append(len(given[2].tokens))
        return logits(*given)

    monkeypatch.setattr(losses, "target_logits", counted)
    width = decoder.model.get_output_embeddings().weight.shape[0] * 4
    monkeypatch.setattr(losses, "ROOM", 16 * width)
    torch.testing.assert_close(losses.target_nats(decoder, batch), whole)
    assert max(seen) == 4 < sum(seen) == 18


def test_intervals_of_a_few_hold_what_they_promise() -> None:
    """In 300 draws of nothing, an interval excludes 0 in about one of twenty, whatever there is of it."""
    chance = np.random.default_rng(0)
    for n in (2, 3, 5):
        wrong = 0
        for _ in range(300):
            one = result(chance.normal(size=n), metric="nats_per_token")
            other = result(np.zeros(n), metric="nats_per_token")
            wrong += paired_difference(one, other).verdict != "no difference shown"
        assert wrong < 30, (n, wrong)
    share, surprise = interval(result([1, 1, 1, 0])), interval(result([2, 2.5, 2.2], metric="perplexity"))
    assert (share.high, type(share.low)) == (1.0, float)
    assert 0 < surprise.low < surprise.value < surprise.high


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_text("prompt,target\nhow?," + "a" * 200_000 + "\n")
    ((_, row),) = own_rows(file, measured=False)
    assert len(row["target"]) == 200_000


def test_means_over_draws_are_found_in_their_folder(tmp_path: Path) -> None:
    record = {"rows": [{"label": "dense", "results": [json.loads(json.dumps(vars(result([1, 0]))))]}]}
    write_json(tmp_path / "draws.json", record)
    assert [label for label, _ in load_rows(tmp_path)] == ["dense"]
