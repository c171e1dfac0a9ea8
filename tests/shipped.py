"""Tiny models of families that llama.cpp runs, with tokenizers trained on the spot, as folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from causalprune.checkpoints.saving import save
from causalprune.core.types import Calibration, Example, quiet
from causalprune.models.loading import load
from causalprune.shipping.converting import convert
from causalprune.shipping.runtime import running, same_tokens
from causalprune.shrinking.removal import Shares, shrink
from causalprune.shrinking.worth import Kind, Shrinking

PRE = {"qwen2": "qwen2"}
"""How tokenizers of a family cut texts, by llama.cpp's name for it, where transformers gives them a class of their own; else gpt-2."""
SIZE, ROWS = 400, 416
"""Tokens, and rows of the embedding: more, as in most models."""
SHARES: dict[Kind, float] = {"neurons": 1 / 3, "kv_groups": 0.5, "experts": 0.5, "layers": 0.5}
"""Of the units of a kind, those that go from a tiny model."""
TEXT = (
    "Ann has 3 pears and gets 14 more. How many pears has she now? She has 3+14=17 pears. The quick brown fox jumps over "
    "13 lazy dogs, x = [3.14, 42]; print(x) for i in range(10): naïve café. "
)
_SHAPE: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROPE = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama3": lambda: LlamaConfig(**_GROUPED, rope_parameters=_ROPE),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_WIDE),
    "gemma3": lambda: Gemma3TextConfig(
        **(_WIDE | {"vocab_size": SIZE}), query_pre_attn_scalar=32, sliding_window=64
    ),
    "gpt2": lambda: GPT2Config(**{k: v for k, v in _SHAPE.items() if k != "intermediate_size"}),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE),
    "starcoder2": lambda: Starcoder2Config(**_GROUPED, sliding_window=None),
    "stablelm": lambda: StableLmConfig(**_GROUPED),
    "granite": lambda: GraniteConfig(**_GROUPED),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "cohere": lambda: CohereConfig(**_GROUPED),
    "gpt_bigcode": lambda: GPTBigCodeConfig(vocab_size=ROWS, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "falcon": lambda: FalconConfig(
        **{k: v for k, v in _SHAPE.items() if k != "intermediate_size"},
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "phi": lambda: PhiConfig(**_SHAPE | {"intermediate_size": 256}),
    "bloom": lambda: BloomConfig(vocab_size=ROWS, hidden_size=64, n_layer=2, n_head=4),
    "mixtral": lambda: MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "olmoe": lambda: OlmoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_WIDE, **_EXPERTS, norm_topk_prob=True),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of `SIZE` tokens that knows every byte."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet)
    )
    missing = SIZE - own.get_vocab_size()
    own.add_tokens([f"<unused{i}>" for i in range(missing)])
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def write(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a tiny random model of a family and its tokenizer as a folder."""
    config = CONFIGS[family]()
    config.update(changes)
    model = tiny(AutoConfig.for_model(**config.to_dict()) if changes else config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def in_both(family: str, place: Path) -> tuple[str | None, float]:
    """Write a tiny model as a folder and as a file, and run both.

    Returns the text that their tokenizers cut otherwise, if there is one, and how far log-probabilities are apart over their range.
    """
    return _compared(write(place / "model", family), family)


def smaller_in_both(family: str, kind: Kind, place: Path) -> tuple[str | None, float]:
    """Take some units out of a tiny model, and run what is left as `in_both` does."""
    decoder = load(str(write(place / "whole", family)), device="cpu")
    shares = Shares(**{kind: SHARES[kind]})
    examples = tuple(Example(tuple(range(at, at + 40)), 1, "tiny", str(at)) for at in (5, 9))
    how = Shrinking(by="magnitude", update="none")
    made = shrink(decoder, shares, Calibration(examples, (0, 0)), how, stage=quiet)
    return _compared(save(made.decoder, place / "model", made), family)


def _compared(folder: Path, family: str) -> tuple[str | None, float]:
    file = folder.with_suffix(".gguf")
    convert(folder, file, pre_tokenizer=PRE.get(family, "gpt-2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, apart = tokenizer.encode(TEXT)[:40], 0.0
    with running(file, context=256, exact=True) as run, torch.inference_mode():
        other = same_tokens(run, tokenizer)
        for length in (5, 17, 40):
            expected = model(torch.tensor([tokens[:length]])).logits[0, -1].double().log_softmax(-1).numpy()
            found = run.log_probabilities(tokens[:length], model.config.vocab_size)
            apart = max(apart, float(np.abs(found - expected).max() / np.ptp(expected)))
    return other, apart
