"""Every row is measured, or counted among those that are not; chance is no finding; padding is no text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tinydata import tiny_decoder, write_data, write_jsonl

from causalprune.cli import tables
from causalprune.core.errors import DataError, MismatchError
from causalprune.core.types import Decoder, EvalResult
from causalprune.evaluation.measures import evaluate, same_as_before
from causalprune.evaluation.results import at_chance, left_out, of_task, paired_difference
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.tasks import generation
from causalprune.reports.summary import verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def shown(result: EvalResult) -> str:
    table = tables.comparison([("dense", [result])])
    return " ".join([str(table.caption), *(str(cell) for c in table.columns for cell in c.cells)])


def test_equal_prompts_with_other_targets_are_all_measured(tmp_path: Path) -> None:
    rows = [{"prompt": "Write a line.", "target": f"Line {i % 11}."} for i in range(12)]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    (found,) = evaluate(tiny_decoder(), [f"{path}_nll"])
    assert len(found.values) == 11
    assert len(set(found.examples)) == 1, "pairs are still made by prompt"
    assert left_out(found) == "left out: 1 repeated"
    assert "left out: 1 repeated" in shown(found)
    assert sorted(found.golds) == sorted(f"Line {i}." for i in range(11))


def test_one_example_has_no_interval_and_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "target": "b"}])
    (found,) = evaluate(tiny_decoder(), [f"{path}_nll"])
    assert "one example: no interval" in shown(found)
    assert "nan" not in shown(found)
    two = tables.comparison([("a", [found]), ("b", [found])])
    assert "one example: no interval" in str(list(two.columns[1].cells)[1])


def test_rows_longer_than_the_model_has_positions_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "target": "t" * (30 if i % 2 else 9)} for i in range(8)]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    decoder = tiny_decoder(positions=20)
    (found,) = evaluate(decoder, [f"{path}_nll:1"])
    assert found.description["max_tokens"] == 20
    with pytest.raises(DataError, match=r"8 examples asked for, 1 of 8 usable .*the model has 20 positions"):
        evaluate(decoder, [f"{path}_nll:8"])


def test_a_choice_at_chance_is_said_and_decides_nothing(folder: Path) -> None:
    (dense,) = evaluate(tiny_decoder(), ["strategyqa"], data_dir=folder)
    assert dense.description["chance"] == 0.5
    half = replace(dense, values=(1.0, 0.0) * 3)
    assert at_chance(half)
    assert "at chance (50%), so it decides nothing" in shown(half)
    assert not at_chance(replace(half, values=(1.0,) * 6))
    loss = EvalResult("strategyqa_nll", "nats_per_token", (1.0,) * 6, (1.0,) * 6, dense.examples)
    worse = replace(loss, values=(0.9,) * 6)
    rows: list[dict[str, Any]] = [
        {"label": "dense", "criterion": "dense", "sparsity": 0.0, "results": [half, loss]},
        {"label": "wanda-row-0.5", "criterion": "wanda", "scope": "row", "sparsity": 0.5},
    ]
    rows[1]["results"] = [replace(half, values=(0.0,) * 6), worse]
    record = {"rows": [row | {"results": [vars(r) for r in row["results"]]} for row in rows]}
    found = verdict(record)
    assert "strategyqa: the dense model is at chance there" in " ".join(found.reasons)
    assert "worse on strategyqa" not in found.headline


def test_arc_has_the_chance_of_its_options(folder: Path) -> None:
    found = evaluate(tiny_decoder(), ["arc_challenge"], data_dir=folder)
    assert found[0].description["chance"] == pytest.approx(
        (2 / 4 + 1 / 4 + 1 / 4 + 1 / 3 + 1 / 5 + 1 / 4) / 6, abs=0.06
    )
    assert of_task(replace(found[0], description={})) == []


@pytest.mark.parametrize("task", ["gsm8k_cot", "harness"])
def test_a_pad_token_that_the_model_has_not_does_no_harm(folder: Path, task: str) -> None:
    decoder = tiny_decoder()
    own = str(generation.__file__).replace("generation.py", "gsm8k_cot.yaml") if task == "harness" else task
    options: dict[str, Any] = {"data_dir": folder, "max_new_tokens": 4}
    (before,) = evaluate(decoder, [own], **options)
    decoder.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert decoder.tokenizer.pad_token_id >= decoder.model.get_input_embeddings().num_embeddings
    (found,) = evaluate(decoder, [own], **options)
    assert found.texts == before.texts


def test_models_that_read_padding_answer_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, sizes = tiny_decoder(), list[int]()
    own = generation.greedy

    def greedy(speaker: Any, context: torch.Tensor, *rest: Any) -> generation.Continued:
        sizes.append(len(context))
        return own(speaker, context, *rest)

    monkeypatch.setattr(generation, "greedy", greedy)
    options: dict[str, Any] = {"data_dir": folder, "max_new_tokens": 2}
    (several,) = evaluate(decoder, ["gsm8k_answers"], **options)
    assert max(sizes) > 1
    sizes.clear()
    monkeypatch.setattr(generation, "UNPADDED", ("llama",))
    (single,) = evaluate(decoder, ["gsm8k_answers"], **options)
    assert set(sizes) == {1}
    assert single.texts == several.texts


def test_results_of_two_dates_or_versions_are_not_compared(folder: Path) -> None:
    decoder = tiny_decoder(chat=True)
    decoder.tokenizer.chat_template = "{{ strftime_now('%B') }}{{ messages[0].content }}"
    (found,) = evaluate(decoder, ["gsm8k_nll"], data_dir=folder)
    assert found.description["date"] == "2026-01-01"
    other = replace(found, description=found.description | {"date": "2026-02-01"})
    with pytest.raises(MismatchError, match="date is '2026-01-01' and '2026-02-01'"):
        paired_difference(found, other)
    old = {k: v for k, v in found.description.items() if k != "method_version"}
    assert paired_difference(found, replace(found, description=old)).difference == 0
    moved = replace(found, description=old, weights=tuple(w + 1 for w in found.weights))
    with pytest.raises(MismatchError, match=r"versions 2 and 1 of the method.*one text.*measure both anew"):
        paired_difference(found, moved)


def dated(decoder: Decoder) -> Decoder:
    decoder.tokenizer.chat_template = "{{ strftime_now('%B') }}{{ messages[0].content }}"
    return decoder


def test_what_an_earlier_version_measured_alike_is_known(folder: Path, tmp_path: Path) -> None:
    def same(tasks: list[str], decoder: Decoder) -> bool:
        return same_as_before(tasks, Settings(data_dir=folder), decoder)

    assert same(["gsm8k_nll:3", "arc_challenge", "wikitext2_ppl", "own_kl"], tiny_decoder())
    assert same(["gsm8k_answers"], tiny_decoder(chat=True))
    assert not same(["gsm8k_answers"], tiny_decoder())
    assert not same(["gsm8k_nll"], dated(tiny_decoder(chat=True)))
    assert not same(["gsm8k_nll"], tiny_decoder(positions=100))
    twice = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "p", "target": t} for t in "ab"])
    assert not same([f"{twice}_nll"], tiny_decoder())
