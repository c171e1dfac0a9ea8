"""Written answers in runs, sweeps and recipes, as measures and as calibration data."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Run, assert_refused
from speaking import own_file
from tinydata import tiny_decoder

from causalprune.core.errors import MismatchError, OptionError
from causalprune.core.types import EvalResult
from causalprune.evaluation.results import load_rows
from causalprune.reports.evidence import read_run
from causalprune.reports.summary import summary
from causalprune.reports.writing import report
from causalprune.runs.plans import plan
from causalprune.runs.recipe import CalibrationSpec, ModelSpec, Recipe, read_recipe
from causalprune.runs.study import run as carry_out
from causalprune.runs.sweeping import worst_difference
from causalprune.runs.traces import calibrated

QWEN = "{{ messages[0].content }}[assistant]{% if not enable_thinking %}<think></think>{% endif %}"


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module of scorers be imported."""
    module = ModuleType("mymetrics")

    def size(texts: list[str], targets: list[str] | None) -> list[int]:
        return [len(text) for text in texts]

    vars(size)["higher_is_better"] = False
    vars(module)["size"] = size
    monkeypatch.setitem(sys.modules, "mymetrics", module)


def recipe(model: Path, own: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": ModelSpec(str(model)),
        "calibration": CalibrationSpec(("gsm8k",), n=4, subsets=2),
        "methods": ("magnitude",),
        "sparsities": (0.5,),
        "on": (f"{own}_answers", f"{own}_size:3"),
        "general_text": "none",
        "max_new_tokens": 4,
        "scorers": ("size=mymetrics:size",),
    }
    return Recipe(**{**values, **changes})


@pytest.mark.thorough
def test_a_run_measures_answers_and_scores(model: Path, data: Path, tmp_path: Path, run: Run) -> None:
    own, folder = own_file(tmp_path, ["10", "11", "12", "13"]), tmp_path / "run"
    wanted = recipe(model, own)
    jobs = {job.name: job.tokens for job in plan(wanted, folder, data_dir=data).jobs}
    assert jobs[f"{own}_answers"] > jobs[f"{own}_size:3"] > 0
    first = dataclasses.replace(wanted, on=wanted.on[:1], scorers=())
    carry_out(first, folder, data_dir=data)
    carry_out(wanted, folder, data_dir=data)
    for _, (answers, sizes) in load_rows(folder):
        assert (answers.metric, len(answers.values)) == ("accuracy", 4)
        assert (sizes.metric, len(sizes.values)) == ("size", 3)
        assert sizes.values == tuple(map(len, sizes.texts))
        assert answers.description["answers"]["tokens"] == [4] * 4
    told = summary([read_run(folder)])["runs"][0]
    assert [task["higher_is_better"] for task in told["tasks"]] == [True, False]
    cell = told["models"][1]["cells"][f"{own}_size · size"]
    assert cell["dense"]["verdict"] in ("better", "worse", "no difference shown")
    assert cell["ended"] == "100% did not end, 4 tokens"
    (page,) = report([folder], tmp_path / "page.html")
    assert "100% did not end, 4 tokens" in page.read_text(encoding="utf-8")
    code, out, err = run("compare", folder, "--markdown")
    assert code == 0, err
    assert "100% did not end, 4 tokens |" in out
    assert "answers read as number, as all targets end so" in out
    with pytest.raises(MismatchError, match="with answer None, which is now text"):
        carry_out(dataclasses.replace(wanted, answer="text"), folder, data_dir=data)


def test_scorers_of_a_recipe_run_only_where_it_is_trusted(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "r.yaml"
    lines = [
        "model: {name: nowhere}",
        "calibration: {task: [gsm8k], thinking: on}",
        "methods: [magnitude]",
        "sparsities: [0.5]",
        "on: [a.jsonl_size]",
        "scorers: ['size=mymetrics:size']",
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(OptionError, match=r"runs code to score answers .*--trust-remote-code"):
        read_recipe(path)
    code, _, err = run("run", path, "--dry-run")
    assert code == 2
    assert "runs code" in err
    trusted = read_recipe(path, trust_remote_code=True)
    assert (trusted.calibration.thinking, trusted.model.trust_remote_code) == ("on", True)
    code, _, err = run("run", path, "--dry-run", "--trust-remote-code")
    assert "nowhere" in err, "it gets as far as the model"
    path.write_text("\n".join(["model: {name: nowhere, trust_remote_code: true}", *lines[1:]]))
    assert read_recipe(path).scorers == ("size=mymetrics:size",)


@pytest.mark.parametrize(("higher", "expected"), [(True, -0.5), (False, 10 / 0.95 - 10)])
def test_what_a_scorer_may_lose(higher: bool, expected: float) -> None:
    about = {"higher_is_better": higher}
    dense = EvalResult("a_size", "size", (8.0, 12.0), (1.0, 1.0), ("a", "b"), description=about)
    assert worst_difference(dense, 0.95) == pytest.approx(expected)
    with pytest.raises(OptionError, match="needs a value above zero"):
        worst_difference(dataclasses.replace(dense, values=(-8.0, 1.0)), 0.95)


def test_options_reach_what_is_measured(model: Path, tmp_path: Path, run: Run) -> None:
    own, output = own_file(tmp_path, ["so 10", "Rome"]), tmp_path / "r.json"
    tasks = ["-t", f"{own}_answers", "-t", f"{own}_size", "--scorer", "size=mymetrics:size"]
    how = ["--answer", "regex:([0-9])", "--max-new-tokens", "3"]
    code, out, err = run("evaluate", model, *tasks, *how, "-o", output)
    assert code == 0, err
    assert "100% did" in out
    assert "answers read as regex:([0-9])" in out.replace("\n", " ")
    answers, sizes = json.loads(output.read_text())["results"]
    assert answers["description"]["read_as"] == "regex:([0-9])"
    assert answers["description"]["answers"]["tokens"] == [3, 3]
    assert re.search(r"\.size \([0-9a-f]{12}\)$", sizes["description"]["scorer"]), "an edited one is noticed"
    (tmp_path / "list.txt").write_text("Of course!\n")
    none = tmp_path / "no.json"
    unused = run("evaluate", model, *tasks, "--phrases", tmp_path / "list.txt", "-o", none)
    assert_refused(unused, "--phrases: no measure looks for them", none)
    code, _, err = run(
        "evaluate", model, *tasks, "--answer", "text", "--thinking", "on", "-o", tmp_path / "no.json"
    )
    assert code == 2
    assert "thinking cannot be switched on, as there is no chat template" in err


def test_own_answers_hold_the_thoughts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decoder = tiny_decoder(chat=True)
    words = decoder.tokenizer
    words.chat_template = QWEN
    said, asked = ["<think>2</think>4", "<think>2", "4"], list[str]()

    def generate(tokens: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = []
        for row, real in zip(tokens.tolist(), attention_mask.tolist(), strict=True):
            asked.append(words.decode([token for token, is_real in zip(row, real, strict=True) if is_real]))
            own = words(said[(len(asked) - 1) % 3])["input_ids"]
            rows.append(row + own + [words.eos_token_id] * (40 - len(own)))
        return torch.tensor(rows)

    monkeypatch.setattr(decoder.model, "generate", generate)
    spec = CalibrationSpec(("own:gsm8k",), n=3, subsets=1, max_tokens=400, thinking="on")
    found = calibrated(decoder, spec, data)
    assert all("<think>" not in prompt for prompt in asked)
    for example in found.examples:
        assert words.decode(example.tokens[: example.target_start]) in asked
        assert words.decode(example.tokens[example.target_start :]) == "<think>2</think>4"
