"""Tiny random models, one for every family that the structure finder must understand.

Shapes are chosen to tell things apart: grouped-query attention wherever the family has it, a head
width that is not `hidden_size / heads` where the family allows it, and an MLP width that is neither
the model width nor a multiple of it. Weights have a spread that lets every one of them matter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 64
N_LAYERS = 3
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 12}

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def tiny(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a seeded random model for inference: float32, every parameter away from its default."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * spread + (parameter if parameter.ndim == 1 else 0))
    return model.eval().requires_grad_(requires_grad=False)


def _family(
    config: type[PreTrainedConfig], shape: dict[str, Any], **fields: Any
) -> Callable[[], PreTrainedModel]:
    return partial(lambda: tiny(config(**(shape | fields))))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama2": _family(LlamaConfig, _SHAPE),
    "llama3": _family(LlamaConfig, _GROUPED, rope_parameters=_LLAMA_3_ROPE, tie_word_embeddings=True),
    "mistral": _family(MistralConfig, _GROUPED, sliding_window=8),
    "qwen2": _family(Qwen2Config, _GROUPED, tie_word_embeddings=True),
    "qwen3": _family(Qwen3Config, _WIDE),
    "gemma2": _family(Gemma2Config, _WIDE, sliding_window=8, query_pre_attn_scalar=12),
    "gemma3": _family(Gemma3TextConfig, _WIDE, sliding_window=8, query_pre_attn_scalar=12),
    "phi3": _family(Phi3Config, _GROUPED),
    "gpt2": _family(GPT2Config, {k: v for k, v in _SHAPE.items() if k != "intermediate_size"}, n_inner=40),
    "gpt_neox": _family(GPTNeoXConfig, _SHAPE),
    "opt": _family(OPTConfig, _SHAPE, ffn_dim=40, word_embed_proj_dim=24),
    "mixtral": _family(MixtralConfig, _GROUPED, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": _family(
        Qwen3MoeConfig,
        _WIDE,
        num_local_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        mlp_only_layers=[1],
    ),
    "olmoe": _family(OlmoeConfig, _GROUPED, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _family(
        Qwen2MoeConfig,
        _GROUPED,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=24,
    ),
}
