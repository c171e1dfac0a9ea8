"""Two small hybrids, trained here on chains of sums, pruned by every method: a step of `bench/families.py`.

There are no small hybrids to be had as packages. A model of two million parameters learns to add up numbers of two digits, one after
the other, writing every sum; then most of its weights go, and the loss on other chains is compared in pairs.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, RUNS
from transformers import AutoModelForCausalLM, BambaConfig, Qwen3_5TextConfig

import causalprune as cp
from causalprune.core.progress import shown

sys.path.insert(0, str(ROOT / "tests"))
from tinydata import byte_tokenizer

FOLDER = RUNS / "hybrids"
STEPS, BATCH, RATE = 2000, 32, 2e-3
NUMBERS = 5
BETWEEN = "\n\n"
"""Between a problem and its solution, as calibration and measures have it without a template."""
LEARNED = 0.3
"""Nats a token that the dense model may have, for a comparison to mean anything."""
PROBLEMS = {"train": 64, "test": 200}
SPARSITY = 0.7
"""At half of the weights SparseGPT loses next to nothing here, and methods cannot be told apart."""
METHODS = ("wanda", "sparsegpt", "cap", "causal")
_COMMON: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "qwen3_5": Qwen3_5TextConfig(
        **_COMMON, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=48,
        linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=24, linear_value_head_dim=24,
    ),
    "bamba": BambaConfig(
        **_COMMON, intermediate_size=512, num_hidden_layers=4, attn_layer_indices=[2], num_attention_heads=4,
        num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=48, mamba_d_state=32, mamba_n_groups=1, mamba_expand=2,
        mamba_chunk_size=16,
    ),
}  # fmt: skip


def problem(generator: random.Random) -> dict[str, str]:
    """Return a chain of numbers, and its sums."""
    numbers = [generator.randrange(100) for _ in range(NUMBERS)]
    sums = [sum(numbers[: i + 1]) for i in range(1, NUMBERS)]
    return {"prompt": "+".join(map(str, numbers)) + "=", "target": ";".join(map(str, sums)) + "\n"}


def trained(name: str) -> Path:
    """Return the folder of a model, after training it (a quarter of an hour on one core)."""
    folder = FOLDER / name
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    generator, tokenizer = random.Random(0), byte_tokenizer()
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    with shown(f"training {name}") as progress:
        for step in range(STEPS):
            rows = [problem(generator) for _ in range(BATCH)]
            tokens = [tokenizer(row["prompt"] + BETWEEN + row["target"])["input_ids"] for row in rows]
            width = max(map(len, tokens))
            inputs = torch.tensor([own + [0] * (width - len(own)) for own in tokens])
            labels = torch.tensor([own + [-100] * (width - len(own)) for own in tokens])
            for own, row in zip(labels, rows, strict=True):
                own[: len(row["prompt"] + BETWEEN)] = -100
            loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress(step + 1, STEPS)
            if step % 250 == 0:
                print(name, step, round(float(loss), 4), flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hybrids() -> dict[str, Any]:
    """Prune both models by every method; return losses, and differences in pairs, of a run's results."""
    found: dict[str, Any] = {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    generator = random.Random(1)
    for name, count in PROBLEMS.items():
        rows = [json.dumps(problem(generator)) for _ in range(count)]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    for name in CONFIGS:
        recipe = {
            "model": {"name": str(trained(name))},
            "calibration": {
                "task": [str(FOLDER / "train.jsonl")],
                "n": PROBLEMS["train"],
                "preserve": ["none"],
            },
            "attribution": {"estimator": "exact", "units": ["heads", "mixers"]},
            "methods": list(METHODS),
            "sparsities": [SPARSITY],
            "on": [f"{FOLDER / 'test.jsonl'}_nll:{PROBLEMS['test']}"],
            "general_text": "none",
        }
        cp.run(recipe, FOLDER / f"{name}-run")
        found[name] = json.loads((FOLDER / f"{name}-run" / "results.json").read_text())["rows"]
        (dense,) = found[name][0]["results"]
        if (loss := sum(dense["values"]) / sum(dense["weights"])) > LEARNED:
            raise SystemExit(f"{name} has not learned the task: {loss:.3f} nats a token")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for own in sys.argv[1:]:
        trained(own)
