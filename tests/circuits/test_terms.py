"""What may be asked of a search: mistakes are named in a line, before anything is measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from constructed import constructed, problems
from reference import calibration, shared
from test_finding import PROBLEMS, find
from transformers import LlamaConfig, LlamaForCausalLM

import causalprune as cp
from causalprune.circuits.finding import Search
from causalprune.core.errors import CheckpointError, DataError, MismatchError, OptionError
from causalprune.core.types import Calibration
from causalprune.models.anatomy import inspect_model


def test_mistakes_in_python_are_named() -> None:
    decoder = shared("llama2")
    with pytest.raises(OptionError, match=r"as `cp.calibrate` returns them, not as a list"):
        find(decoder, PROBLEMS, list(PROBLEMS.examples))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="not as a tuple"):
        find(decoder, PROBLEMS.examples)  # type: ignore[arg-type]
    assert cp.Question("heads") == cp.Question(("heads",))  # type: ignore[arg-type]


def test_too_few_problems_are_told_by_the_side_they_are_on() -> None:
    decoder, few = shared("llama2"), calibration(tuple((12 + i, 5) for i in range(9)))
    with pytest.raises(
        DataError, match=r"of 9 problems \(--task\) 5 are to score on and 4 .* at least 16, or others .*--on"
    ):
        find(decoder, few)
    six = Calibration(few.examples[:6], (0,) * 6)
    with pytest.raises(DataError, match=r"6 problems to decide on \(--on\) are too few"):
        find(decoder, few, six)
    with pytest.raises(DataError, match=r"6 problems to score on \(--task\) are too few"):
        find(decoder, six, few)


def test_a_share_that_is_missed_to_the_other_side_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "_rise", lambda *_: -0.1)
    with pytest.raises(OptionError, match=r"keep 1\.105, too far to the other side: .* the rank 'signed'"):
        find(shared("llama2"), PROBLEMS, PROBLEMS, estimator=cp.Estimator("gradient"), rescore=1, keep=0.95)


def test_problems_are_compared_with_wrong_answers_on_both_sides_or_on_none() -> None:
    pairs = [replace(one, instead=replace(one, tokens=(*one.tokens[:-1], 7))) for one in PROBLEMS.examples]
    paired = Calibration(tuple(pairs), (0,) * len(pairs))
    for sides, words in (
        (
            (PROBLEMS, paired),
            r"to decide on \(--on\) have a wrong answer .* to score on \(--task\) have none",
        ),
        (
            (paired, PROBLEMS),
            r"to score on \(--task\) have a wrong answer .* to decide on \(--on\) have none",
        ),
    ):
        with pytest.raises(OptionError, match=words):
            find(shared("llama2"), *sides, question=cp.Question())


def test_one_unit_alone_is_no_choice(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4
    )
    decoder = inspect_model(LlamaForCausalLM(config).eval(), None, name="one")
    with pytest.raises(OptionError, match=r"one has only one unit of mlp, .* smaller units \(--units\)"):
        find(decoder, PROBLEMS, PROBLEMS, question=cp.Question(("mlp",)), folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.thorough
def test_without_a_question_the_effect_follows_and_one_circuit_is_no_overlap() -> None:
    found = find(constructed("and"), problems("and", 24), problems("and", 24, 1), rank="signed")
    assert found.description["question"]["effect"] == "ce"
    with pytest.raises(OptionError, match="at least two circuits"):
        cp.overlap(found)  # type: ignore[arg-type]


def test_what_is_no_circuit_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, why in (("config.json", "was not written by causalprune"), ("gone", "No such file")):
        with pytest.raises(CheckpointError, match=f"{name} is no circuit of `causalprune circuit`.*{why}"):
            cp.load_circuit(tmp_path / name)


def test_a_search_that_ends_before_it_measures_leaves_its_folder_to_others(tmp_path: Path) -> None:
    decoder = shared("llama2")
    how: dict[str, Any] = {"folder": tmp_path, "question": cp.Question(), "rescore": 1, "keep": 0.01}
    with pytest.raises(
        OptionError, match=r"take the estimator exact, or in `attribute` a --budget below 2\.6x"
    ):
        find(decoder, PROBLEMS, PROBLEMS, **how, estimator=cp.Estimator("adaptive"))
    assert not (tmp_path / "circuit.ledger").exists()
    find(decoder, PROBLEMS, PROBLEMS, **how, estimator=cp.Estimator("gradient"))
    with pytest.raises(
        MismatchError, match=r"estimator\.gates was \[1\.0\] and is now .*: delete the folder"
    ):
        find(decoder, PROBLEMS, PROBLEMS, **how)
