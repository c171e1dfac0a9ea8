"""Families in both runtimes: the same tokens and the same logits in llama.cpp as in transformers."""

import json
from pathlib import Path

import pytest
import shipped
from conftest import REPOSITORY

from causalprune.checkpoints.card import alike
from causalprune.core.errors import ModelError
from causalprune.shipping.converting import convert


@pytest.mark.parametrize(("family", "granted"), [("qwen2_moe", False), ("qwen3_moe", True), ("olmoe", False)])
def test_experts_that_llama_cpp_would_weigh_otherwise_are_refused(
    family: str, granted: bool, tmp_path: Path
) -> None:
    folder = shipped.write(tmp_path / "model", family, norm_topk_prob=not granted)
    with pytest.raises(ModelError, match=f"norm_topk_prob {str(not granted).lower()}.*every {family}"):
        convert(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", shipped.CONFIGS)
def test_tokens_and_logits_are_the_same(family: str, tmp_path: Path) -> None:
    other, apart = shipped.in_both(family, tmp_path)
    assert other is None
    assert apart <= 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "falcon", "phi"])
def test_files_have_the_width_that_is_left(family: str, tmp_path: Path) -> None:
    """The converter writes four times the width of the model (findings/llama-cpp-mlp-width.sh), which llama.cpp then refuses."""
    other, apart = shipped.smaller_in_both(family, "neurons", tmp_path)
    assert other is None
    assert apart <= 1e-3


def test_cards_call_tried_what_was_found_to_be_the_same() -> None:
    record = json.loads((REPOSITORY / "bench/results/fit.json").read_text(encoding="utf-8"))
    types = {family: make().model_type for family, make in shipped.CONFIGS.items()}
    found = record["raw"]["runtime"]["smaller"]
    assert found.keys() == types.keys()
    for kind, named in alike().items():
        assert {types[family] for family, own in found.items() if own[kind] == "same"} == set(named)
