"""SparseGPT on stacks of experts: seconds, and what stays, in whichever build runs this file.

python bench/experts.py OUT.json     # called by `python bench/families.py experts`, for both builds
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import causalprune as cp

try:
    from causalprune.core import Calibration, Example
except ImportError:  # the build before
    from causalprune.types import Calibration, Example  # type: ignore[import-not-found,no-redef]

TOKENS, LENGTH, VOCAB = 2000, 250, 512


def model(layers: int, seed: int) -> Any:
    """Return a decoder with 64 experts a layer, hidden 256, width 128."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=128, intermediate_size=128, num_experts=64,
        num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
        return cp.load(folder)


def calibration() -> Any:
    """Return random tokens."""
    rows = torch.randint(3, VOCAB, (TOKENS // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    own = tuple(Example(tuple(row), 5, "random", str(i)) for i, row in enumerate(rows.tolist()))
    return Calibration(own, (0,) * len(own))


def pruned(layers: int, seed: int) -> tuple[float, dict[str, list[int]]]:
    """Return the seconds that pruning takes, and the indices of what stays in the experts of the first layer."""
    decoder, data = model(layers, seed), calibration()
    start = time.perf_counter()
    cp.prune(decoder, cp.Method("sparsegpt", 0.5), calibration=data)
    seconds = time.perf_counter() - start
    own = [p for p in decoder.layers[0].projections if p.expert is not None]
    return seconds, {p.name: p.read().ne(0).flatten().nonzero().flatten().tolist() for p in own}


def main() -> None:
    """Write seconds of four layers, and what stays where inputs are the intact model's: in the first layer, of four models."""
    seconds, _ = pruned(4, 0)
    stays = [pruned(1, seed)[1] for seed in range(4)]
    Path(sys.argv[1]).write_text(json.dumps({"seconds": seconds, "stays": stays}))


if __name__ == "__main__":
    main()
