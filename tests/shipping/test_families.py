"""Families in both runtimes: the same tokens and the same logits in llama.cpp as in transformers."""

from pathlib import Path

import numpy as np
import pytest
import shipped
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from causalprune.core.errors import ModelError
from causalprune.shipping.converting import convert
from causalprune.shipping.runtime import running, same_tokens


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
    folder, file = shipped.write(tmp_path / "model", family), tmp_path / "model.gguf"
    convert(folder, file, pre_tokenizer=shipped.PRE.get(family, "gpt-2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer.encode(shipped.TEXT)[:40]
    with running(file, context=256, exact=True) as run, torch.inference_mode():
        assert same_tokens(run, tokenizer) is None
        for length in (5, 17, 40):
            expected = model(torch.tensor([tokens[:length]])).logits[0, -1].double().log_softmax(-1).numpy()
            found = run.log_probabilities(tokens[:length], model.config.vocab_size)
            assert np.abs(found - expected).max() <= 1e-3 * np.ptp(expected)
