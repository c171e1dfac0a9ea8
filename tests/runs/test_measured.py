"""What commands measure: the same text tomorrow, no leak unsaid, no example too few for nothing."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as inside
import yaml
from conftest import Run
from tinydata import tiny_decoder, write_jsonl, write_model

from causalprune.core import Ledger

DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def clock(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Now":
            return cls(2031, 7, day)

    monkeypatch.setattr(inside, "datetime", Now)


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    decoder = tiny_decoder(chat=True)
    decoder.tokenizer.chat_template = DATED
    return write_model(tmp_path / "dated", decoder)


def rows(path: Path, numbers: range) -> Path:
    return write_jsonl(
        path, [{"prompt": f"Is {i} even?", "target": "yes" if i % 2 == 0 else "no"} for i in numbers]
    )


@pytest.mark.thorough
def test_a_day_later_all_is_as_it_was(
    run: Run, dated: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--data-dir", data)
    hashes, losses = [], []
    for day in (1, 2):
        clock(monkeypatch, day)
        out = tmp_path / f"wanda-{day}"
        assert run("prune", dated, "-o", out, "--method", "wanda", "-t", "gsm8k", "-n", "6", *common)[0] == 0
        hashes.append(json.loads((out / "causalprune.json").read_text())["files"]["model.safetensors"])
        assert run("evaluate", dated, "--on", "gsm8k_nll:4", "-o", tmp_path / f"{day}.json", *common)[0] == 0
        losses.append(json.loads((tmp_path / f"{day}.json").read_text())["results"][0]["values"])
    assert hashes[0] == hashes[1]
    assert losses[0] == losses[1]
    other = tmp_path / "other.json"
    on = ("--on", "gsm8k_nll:4", "-o", other, *common)
    assert run("evaluate", dated, *on, "--date", "2024-02-29")[0] == 0
    code, _, err = run("compare", tmp_path / "1.json", other)
    assert code == 2
    assert "date is '2024-02-29' and '2026-01-01'" in err
    assert run("evaluate", dated, *on, "--overwrite", "--date", "yesterday")[0] == 2


def test_a_stopped_attribution_goes_on_after_midnight(
    run: Run, dated: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("attribute", dated, "-o", tmp_path / "own", "-t", "gsm8k", "-n", "6", "--data-dir", data)
    append, count = Ledger.append, [0]

    def stops(*given: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        append(*given)

    clock(monkeypatch, 1)
    monkeypatch.setattr(Ledger, "append", stops)
    assert run(*words)[0] == 130
    clock(monkeypatch, 2)
    code, _, err = run(*words)
    assert code == 0, err
    assert "going on: 2 of" in err


def test_a_leak_is_named_before_anything_is_loaded(run: Run, tmp_path: Path, model: Path) -> None:
    train, test = rows(tmp_path / "train.jsonl", range(64)), rows(tmp_path / "test.jsonl", range(1, 64))
    recipe = {
        "model": {"name": str(model)},
        "calibration": {"task": [str(train)], "n": 16},
        "methods": ["wanda"],
        "sparsities": [0.5],
        "on": [f"{test}_nll"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for more in (("--dry-run",), ()):
        code, _, err = run("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", *more)
        assert code == 2
        said = " ".join(err.split())
        assert re.search(
            r"16 examples asked for, 1 of 64 usable .*63 of 64 are also in .*test.jsonl", said
        ), said


def test_two_examples_are_enough_for_what_needs_no_subsets(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    few = ("-t", "gsm8k", "-n", "2", "--data-dir", data, "--sparsity", "0.5")
    code, _, err = run("prune", model, "-o", tmp_path / "wanda", "--method", "wanda", *few)
    assert code == 0, err
    manifest = json.loads((tmp_path / "wanda" / "causalprune.json").read_text())["run"]
    assert manifest["calibration"]["subsets"] == 2
    assert manifest["method_version"] == 2
    code, _, err = run("prune", model, "-o", tmp_path / "cap", "--method", "cap", *few)
    assert code == 2
    assert "2 examples cannot be cut into 3 subsets" in err


def test_data_are_shown_as_the_model_sees_them(run: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_decoder(chat=True, positions=60))
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [
            {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]},
            {"prompt": "long", "target": "x" * 60},
            {"prompt": "a", "target": "b"},
            {"prompt": "a", "target": "b"},
        ],
    )
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "A", "target": "c"}])
    code, out, err = run("data", model, "-t", train, "-t", test)
    assert code == 0, err
    assert "[user]2+3?[assistant]▶5◀" in out
    code, out, err = run("data", model, "-t", train, "-t", test, "--json")
    own, other = json.loads(out)["sources"]
    assert (own["rows"], own["skipped"]["too_long"], own["skipped"]["duplicate"]) == (4, 1, 1)
    assert other["skipped"]["also_in"] == {str(train): 1}
    assert own["target_tokens"] == [1, 1.0, 60]
    assert run("data", model, "-t", train, "--row", "9")[0] == 2
