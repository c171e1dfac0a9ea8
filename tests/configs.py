"""Tiny models of every type that the installed transformers knows: sizes by general rules, and by `SPECIAL` where those fail.

Shapes are chosen to tell things apart: key-value heads are fewer than heads, widths of heads differ by what they carry, and
each kind of layer that the default configuration has is there at least once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB = 96
CAUSAL, IMAGE_TEXT = (
    tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
)
_RULES: tuple[tuple[str, int], ...] = (
    ("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCAB),
    ("hidden_size d_model n_embd dim embedding_size lru_width backbone_hidden_size emb_dim", 32),
    (
        "intermediate_size intermediate_size_mlp n_inner ffn_dim ffn_hidden_size dim_ff dff d_ff dense_intermediate_size",
        40,
    ),
    ("moe_intermediate_size expert_ffn_hidden_size", 20),
    ("shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size", 24),
    ("moe_shared_expert_intermediate_size share_expert_dim", 24),
    ("num_attention_heads n_head n_heads num_heads swa_num_attention_heads num_sliding_attention_heads", 4),
    ("num_key_value_heads num_kv_heads n_head_kv kv_n_heads swa_num_key_value_heads", 2),
    ("num_query_groups num_global_key_value_heads", 2),
    ("head_dim", 12),
    ("dim_head swa_head_dim attention_head_size attention_head_dim kv_channels global_head_dim", 8),
    ("max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length", 128),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    ("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts", 2),
    ("n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts", 1),
    ("first_k_dense_replace num_dense_layers", 1),
    ("q_lora_rank", 12),
    ("kv_lora_rank", 16),
    ("qk_nope_head_dim", 8),
    ("qk_rope_head_dim", 4),
    ("v_head_dim", 6),
    ("qk_head_dim", 12),
    ("linear_num_key_heads", 2),
    ("linear_num_value_heads linear_num_heads", 4),
    ("linear_key_head_dim linear_head_dim", 8),
    ("linear_value_head_dim", 6),
    (
        "sliding_window local_attention sliding_window_size attention_window_size attention_chunk_size window_size",
        8,
    ),
    ("mamba_n_heads mamba_num_heads n_mamba_heads", 4),
    ("mamba_d_head mamba_head_dim mamba_headdim", 16),
    ("mamba_d_ssm", 64),
    ("mamba_d_state ssm_state_size state_size", 8),
    ("mamba_n_groups n_groups mamba_ngroups", 2),
    ("mamba_chunk_size chunk_size", 8),
    ("mamba_dt_rank time_step_rank", 4),
    ("index_head_dim", 8),
    ("index_n_heads", 2),
    ("index_topk", 64),
    ("rotary_dim", 4),
    ("query_pre_attn_scalar", 8),
    ("hidden_size_per_layer_input", 12),
    ("num_kv_shared_layers", 0),
    ("num_nextn_predict_layers", 0),
    ("laurel_rank", 6),
    ("adapter_rank", 4),
    (
        "conv_L_cache linear_conv_kernel_dim short_conv_kernel_size conv_kernel conv_kernel_size mamba_d_conv",
        3,
    ),
    ("bos_token_id eos_token_id cls_token_id sep_token_id decoder_start_token_id", 2),
    ("pad_token_id", 0),
    # towers of images and sounds
    ("embed_dim hidden_dim", 32),
    ("depth encoder_layers num_encoder_layers", 2),
    ("out_hidden_size text_hidden_size projector_hidden_size output_dim projection_dim", 32),
    ("image_size", 28),
    ("patch_size", 14),
    ("num_position_embeddings", 16),
)
_SMALL = {name: value for names, value in _RULES for name in names.split()}
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "layers")
_TOKENS = (
    "image_token",
    "video_token",
    "audio_token",
    "vision_start",
    "vision_end",
    "boi_token",
    "eoi_token",
    "boa_token",
)
_TOKENS += (
    "eoa_token",
    "image_start",
    "image_end",
    "video_start",
    "video_end",
    "user_token",
    "audio_start",
    "audio_end",
)
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_GEMMA_3N = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GEMMA_4 = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
    "vocab_size_per_layer_input": VOCAB,
    "global_head_dim": 16,
}


def _sections(*sizes: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes)}
    return {"text_config": {"rope_parameters": rope}}


SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga", "ernie4_5_vl_moe"),
        _sections(2, 1, 1),
    ),
    "glm4v_moe": _sections(1, 1, 0),
    "paddleocr_vl": _sections(2, 2, 2),
    "mistral4": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
    },
    "cohere_compass_text": {"rope_parameters": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"new_decoder_architecture": True},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 1,
        "intermediate_size": [40] * 4,
        "layer_types": _GEMMA_3N,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    },
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": {"text_config": _GEMMA_4},
    "gemma4_unified_text": _GEMMA_4,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "helium": {"head_dim": 8},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
    },
}
"""By type: what the general rules do not say, and those that have to differ."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a small configuration of a type, every kind of its layers in it."""
    return _shrunk(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))


def _shrunk(kind: Any, special: Mapping[str, Any]) -> Any:
    default = kind()
    record, names = default.to_dict(), dict(default.attribute_map or {})
    count, keep = _kept_layers(default, record)
    fields: dict[str, Any] = {}
    for name, value in record.items():
        if name not in kind.sub_configs:
            fields |= _small(name, value, count, keep)
        elif (own := getattr(default, name, None)) is not None:
            fields[name] = _shrunk(type(own), special.get(name, {})).to_dict()
    if record.get("kv_lora_rank"):
        fields |= {k: v for k, v in _LATENT.items() if k in record or k == "num_key_value_heads"}
    fields |= {k: v for k, v in special.items() if k not in kind.sub_configs}
    twice = {old for old, new in names.items() if old in fields and new in fields and old not in special}
    return kind(**{k: v for k, v in fields.items() if k not in twice})


def _small(name: str, value: Any, count: int, keep: list[int]) -> dict[str, Any]:
    """Return a field with a small value, nothing where the default is kept."""
    if name == "rope_parameters" and isinstance(value, dict) and value.get("mrope_section"):
        half = int(8 * value.get("partial_rotary_factor", 1)) // 2
        return {name: value | {"mrope_section": [half - 2, 1, 1]}}
    if isinstance(value, list) and len(value) == count:
        return {name: [value[i] for i in keep]}
    if not isinstance(value, int) or isinstance(value, bool):
        return {}
    if name in _COUNTS:
        return {name: len(keep)}
    if name.startswith(_TOKENS) and value > 8:
        return {name: 90 + sum(map(ord, name)) % 5}
    return {name: _SMALL[name]} if name in _SMALL else {}


def _kept_layers(default: Any, record: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Return the number of layers by default, and those that show each kind at least once."""
    count = next((record[n] for n in _COUNTS if isinstance(record.get(n), int)), 0) or getattr(
        default, "num_hidden_layers", 0
    )
    rows = [v for v in record.values() if isinstance(v, list) and len(v) == count and count > 2]
    keep: list[int] = []
    seen: set[tuple[int, str]] = set()
    for i in range(count):
        new = {(n, repr(row[i])) for n, row in enumerate(rows)} - seen
        if new:
            seen |= new
            keep.append(i)
    keep = keep[:6]
    for i in range(count):
        if len(keep) >= 3:
            break
        if i not in keep:
            keep = sorted([*keep, i])
    return count, keep or [0, 1, 2]


def build(config: PreTrainedConfig, *, image_text: bool = False, **options: Any) -> Any:
    """Return a seeded random model for inference: float32, every parameter away from its default."""
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText if image_text else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim > 1 else 0.1
            own = parameter if parameter.ndim == 1 else 0
            parameter.copy_(torch.randn_like(parameter) * spread + own)
    return model.eval().requires_grad_(requires_grad=False)
