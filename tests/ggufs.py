"""GGUF files of tiny models, written by the `gguf` package alone as llama.cpp's converter writes them."""

import math
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

SPECIAL = {"bos": 1, "eos": 2}
SCALED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
"""How Llama 3 scales rotary frequencies."""


def write_gguf(
    path: Path,
    model: Any,
    architecture: str = "llama",
    *,
    tensors: dict[str, Tensor] | None = None,
    pre: str = "gpt-2",
    **settings: Any,
) -> Path:
    """Write a model, whose vocabulary is single characters and one merge; `settings` have `__` for a dot, and None leaves one out."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    for name, value in (_settings(config) | {k.replace("__", "."): v for k, v in settings.items()}).items():
        kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}.get(type(value))
        if kind is not None:
            key = name if name.startswith("split.") else f"{architecture}.{name}"
            writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    _write_tokenizer(writer, config.vocab_size)
    writer.add_tokenizer_pre(pre)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            base, _, suffix = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(base)}.{suffix}", _stored(name, value, config).numpy())
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(config: Any) -> dict[str, Any]:
    heads, head = config.num_attention_heads, getattr(config, "head_dim", None)
    head = head or config.hidden_size // heads
    rope = config.rope_parameters
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }


def _stored(name: str, value: Tensor, config: Any) -> Tensor:
    """Return a tensor as the converter stores it: rotated pairs of a Llama beside each other, norms of Gemma around one."""
    part = name.split(".")[-2]
    if config.model_type == "llama" and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        halves = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
        return halves.swapaxes(1, 2).reshape(value.shape).contiguous()
    return value + 1 if config.model_type.startswith("gemma") and part.endswith("norm") else value


def _write_tokenizer(writer: Any, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("!") + i) for i in range(size - 1)] + ["!$"])
    writer.add_token_types([1] * size)
    writer.add_token_scores([0.0] * size)
    writer.add_token_merges(["! $"])
    for name, token in SPECIAL.items():
        getattr(writer, f"add_{name}_token_id")(token)


def factors(width: int, base: float, found: dict[str, Any]) -> Tensor:
    """Return what llama.cpp's converter divides the frequencies of Llama 3 by (conversion/llama.py)."""
    frequencies = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    positions, low, high = (
        found[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    own = []
    for wave in (2 * math.pi / frequencies).tolist():
        share = min(max((positions / wave - low) / (high - low), 0), 1)
        own.append(1 / ((1 - share) / found["factor"] + share))
    return torch.tensor(own, dtype=torch.float32)
