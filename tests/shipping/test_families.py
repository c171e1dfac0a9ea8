"""Families in both runtimes: the same tokens and the same logits in llama.cpp as in transformers."""

from pathlib import Path

import pytest
import shipped

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
