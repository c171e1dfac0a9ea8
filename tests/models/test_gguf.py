"""A model in a GGUF file is the one that was put there, or it is refused by the name of what cannot be read."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, tiny
from ggufs import SCALED, SPECIAL, factors, write_gguf
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config

from causalprune.checkpoints.saving import save
from causalprune.core.errors import ModelError
from causalprune.models.gguf import _llama3
from causalprune.models.loading import load, read_shape

TOKENS = torch.arange(3, 51)[None] % VOCAB
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def llama(**fields: Any) -> Any:
    return tiny(LlamaConfig(**SMALL | fields))


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **fields}}


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (llama, "llama", {"rope__dimension_count": 16}),
    "tied, other norm": (lambda: llama(tie_word_embeddings=True, rms_norm_eps=1e-3), "llama", {}),
    "biases": (lambda: llama(attention_bias=True, mlp_bias=True), "llama", {}),
    "wide heads": (lambda: llama(head_dim=24), "llama", {"rope__dimension_count": 24}),
    "llama 3": (
        lambda: llama(**rope("llama3", **SCALED)),
        "llama",
        {"tensors": {"rope_freqs.weight": factors(16, 500.0, SCALED)}},
    ),
    "linear": (
        lambda: llama(**rope("linear", factor=4.0)),
        "llama",
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "linear, as it was written before": (
        lambda: llama(**rope("linear", factor=4.0)),
        "llama",
        {"rope__scale_linear": 4.0},
    ),
    "yarn": (
        lambda: llama(**rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0)),
        "llama",
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 16,
            "rope__scaling__yarn_beta_fast": 16.0,
        },
    ),
    "longrope": (
        lambda: tiny(
            Phi3Config(
                **SMALL,
                sliding_window=8,
                original_max_position_embeddings=16,
                **rope(
                    "longrope",
                    short_factor=[1.0, 1.5] * 2,
                    long_factor=[2.0, 3.0] * 2,
                    partial_rotary_factor=0.5,
                    original_max_position_embeddings=16,
                ),
            )
        ),
        "phi3",
        {
            "attention__sliding_window": 8,
            "rope__dimension_count": 8,
            "rope__scaling__original_context_length": 16,
            "rope__scaling__attn_factor": math.sqrt(1 + math.log(4) / math.log(16)),
            "tensors": {
                "rope_factors_long.weight": torch.tensor([2.0, 3.0] * 2),
                "rope_factors_short.weight": torch.tensor([1.0, 1.5] * 2),
            },
        },
    ),
    "qwen 3": (lambda: tiny(Qwen3Config(**SMALL, head_dim=24, attention_bias=True)), "qwen3", {}),
    "gemma 2": (
        lambda: tiny(
            Gemma2Config(
                **SMALL,
                head_dim=24,
                query_pre_attn_scalar=24,
                sliding_window=8,
                attn_logit_softcapping=20.0,
                final_logit_softcapping=10.0,
                tie_word_embeddings=True,
            )
        ),
        "gemma2",
        {
            "attention__sliding_window": 8,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma 3": (
        lambda: tiny(
            Gemma3TextConfig(
                **{**SMALL, "num_hidden_layers": 7},
                head_dim=24,
                query_pre_attn_scalar=24,
                sliding_window=8,
                tie_word_embeddings=True,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                },
            )
        ),
        "gemma3",
        {
            "attention__sliding_window": 8,
            "rope__scaling__type": "linear",
            "rope__scaling__factor": 8.0,
            "rope__freq_base_swa": 700.0,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_in_the_file(case: str, tmp_path: Path) -> None:
    make, architecture, settings = CASES[case]
    model = make()
    found = load(str(write_gguf(tmp_path / "tiny.gguf", model, architecture, **settings))).model
    with torch.inference_mode():
        wanted, own = model(TOKENS).logits, found(TOKENS).logits
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert [found.config.bos_token_id, found.config.eos_token_id] == [*SPECIAL.values()]


@pytest.mark.parametrize(("asked", "held"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_what_is_saved_has_the_dtype_that_it_has_in_memory(
    asked: str, held: torch.dtype, tmp_path: Path
) -> None:
    decoder = load(str(write_gguf(tmp_path / "tiny.gguf", llama())), dtype=asked)
    again = load(str(save(decoder, tmp_path / "plain")))
    assert decoder.source is not None
    assert (decoder.model.dtype, decoder.source.dtype, again.model.dtype) == (held, held, held)
    assert again.fingerprint == decoder.fingerprint


def test_what_was_read_back_is_saved(tmp_path: Path) -> None:
    make, architecture, settings = CASES["llama 3"]
    file = str(write_gguf(tmp_path / "tiny.gguf", make(), architecture, **settings))
    folder = save(load(file), tmp_path / "plain")
    assert load(str(folder)).model.config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        **SCALED,
    }
    assert read_shape(file)[2] == sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize(
    ("width", "factor", "low", "high", "positions"),
    [
        (128, 8.0, 1.0, 4.0, 8192),
        (64, 32.0, 1.0, 4.0, 8192),
        (128, 16.0, 1.0, 8.0, 4096),
        (64, 8.0, 2.0, 8.0, 8192),
    ],
)
def test_frequencies_of_llama_3_give_its_parameters(
    width: int, factor: float, low: float, high: float, positions: int
) -> None:
    given = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    given["original_max_position_embeddings"] = positions
    waves = 2 * math.pi * 500_000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width).numpy()
    found = _llama3(factors(width, 500_000.0, given).numpy(), waves)
    same = {
        "low_freq_factor": 1.0,
        "high_freq_factor": high / low,
        "original_max_position_embeddings": positions / low,
    }
    assert found == given | same | {"rope_type": "llama3"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention__sliding_window": 8}, "llama.attention.sliding_window = 8"),
        ({"expert_count": 4}, "llama.expert_count = 4"),
        ({"logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type = longrope"),
        ({"rope__scaling__yarn_log_multiplier": 0.5}, "yarn_log_multiplier"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count = 8"),
        ({"attention__causal": False}, "llama.attention.causal"),
        ({"tensors": {"rope_freqs.weight": torch.arange(1.0, 9.0) ** 2}}, "rope_freqs.weight"),
        ({"tensors": {"blk.0.attn_q_norm.weight": torch.ones(16)}}, "attn_q_norm.weight"),
        ({"split.count": 3, "split.no": 1}, "part 2 of 3 of a split GGUF.*llama-gguf-split --merge"),
    ],
)
def test_what_the_model_would_not_have_is_named(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama(), **settings)
    with pytest.raises(ModelError, match=words) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama(), "internlm2")
    with pytest.raises(ModelError, match=r"architecture internlm2.*llama, qwen2"):
        load(str(file))


def test_the_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    for i in range(2):
        settings = {"split.count": 2, "split.no": i}
        write_gguf(tmp_path / f"tiny-0000{i + 1}-of-00002.gguf", llama(), **settings)
    with pytest.raises(ModelError, match="part 1 of 2"):
        load(str(tmp_path))
