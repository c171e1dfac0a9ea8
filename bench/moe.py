"""Pruning a mixture of experts: a small one is trained here on generated problems, so that its experts differ.

    python bench/moe.py    # trains (some minutes, kept), prunes and shrinks; rows that are there are not done again

The model has the architecture of Qwen3-MoE: 4 layers, 16 experts, 2 of them for a token. Five kinds of problems with worked
solutions, on bytes. Pruned to 50 and 75 % by every method on the same 128 problems; a quarter and a half of the experts removed by
their effect, by REAP's criterion (`activation`), by magnitude and at random; nothing makes up for an expert that is gone.
"""

import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RUNS, record, write_figures
from packed import light
from tables import ours
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from causalprune.attribution.estimators import attribute
from causalprune.calibration.examples import calibrate
from causalprune.core.progress import shown
from causalprune.core.types import Calibration, Decoder, EvalResult, quiet
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import headline, paired_difference, results_in
from causalprune.models.loading import load
from causalprune.pruning.layers import prune
from causalprune.runs.rows import parse_method
from causalprune.shrinking.removal import Shares, shrink
from causalprune.shrinking.worth import Shrinking

FOLDER = RUNS / "moe"
METHODS = ("magnitude", "wanda", "cap", "sparsegpt", "causal")
CHOICES = ("effect", "activation", "magnitude", "random")
SPARSITIES, SHARES = (0.5, 0.75), (0.25, 0.5)
EXAMPLES, TEST = 128, 400
STEPS, BATCH, RATE = 1500, 96, 2e-3
ITEMS = (3, 6)


def problem(source: random.Random) -> dict[str, str]:
    """Return a problem with its worked solution: a step for every number, the answer on the last line."""
    kind = source.choice(("sum", "max", "min", "odd", "swap"))
    numbers = [source.randint(0, 9) for _ in range(source.randint(*ITEMS))]
    steps: list[Any] = []
    for i, number in enumerate(numbers):
        last = steps[-1] if steps else number
        steps.append(
            {
                "sum": (int(last) if i else 0) + number,
                "max": max(int(last), number),
                "min": min(int(last), number),
                "odd": number % 2,
                "swap": numbers[-1 - i],
            }[kind]
        )
    answer = sum(steps) if kind == "odd" else steps[-1]
    prompt = f"{kind} {' '.join(map(str, numbers))}"
    return {"prompt": prompt, "target": f"{' '.join(map(str, steps))}\n#### {answer}"}


def write_problems() -> tuple[Path, Path]:
    """Write calibration and test problems that share no prompt."""
    source, seen, files = random.Random(1), set(), []
    for name, count in (("train", 4 * EXAMPLES), ("test", TEST)):
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            row = problem(source)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row)
        files.append(Path(f"{name}.jsonl"))
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files[0], files[1]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for a byte."""
    vocab = {"</s>": 0} | {s: i + 1 for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def train(folder: Path, test: Path) -> None:
    """Train the model on problems that are not in the test file, and save it."""
    torch.manual_seed(0)
    held = {json.loads(line)["prompt"] for line in test.read_text().splitlines()}
    words = tokenizer()
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=257,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        intermediate_size=96,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    source = random.Random(0)
    with shown("training") as progress:
        for step in range(STEPS):
            rows = []
            while len(rows) < BATCH:
                row = problem(source)
                if row["prompt"] not in held:
                    rows.append(row)
            loss = model(**_batch(words, rows)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress(step + 1, STEPS)
    print(f"loss {loss.item():.4f}")
    model.config.output_router_logits = False
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)


def _batch(words: Any, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    parts = [(words(f"{r['prompt']}\n\n")["input_ids"], words(r["target"])["input_ids"]) for r in rows]
    longest = max(len(a) + len(b) for a, b in parts)
    tokens = torch.zeros(len(parts), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, target) in enumerate(parts):
        tokens[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels[i, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    return {"input_ids": tokens, "labels": labels, "attention_mask": (tokens > 0).long()}


def pruned(model: Path, calibration: Calibration, sparsity: float, method: str) -> Decoder:
    """Return the model with a share of its weights set to zero."""
    decoder = load(str(model))
    effects = attribute(decoder, calibration) if method == "cap" else None
    prune(decoder, parse_method(method, sparsity), calibration=calibration, effects=effects)
    return decoder


def shrunk(model: Path, calibration: Calibration, share: float, by: str) -> Decoder:
    """Return the model with a share of its experts removed."""
    return shrink(
        load(str(model)), Shares(experts=share), calibration, Shrinking(by, "refit"), stage=quiet
    ).decoder


def figures(rows: dict[str, EvalResult]) -> dict[str, float]:
    """Return losses, and how `causal` and `effect` compare with the others in pairs."""
    found = {f"nll_{label}".replace(" ", "_"): headline(result) for label, result in rows.items()}
    for label, result in rows.items():
        base = ours(label)
        if label != "dense" and base in rows and base != label:
            difference = paired_difference(rows[base], result)
            found[f"{base.split()[1]}_minus_{label}_high".replace(" ", "_")] = difference.high
    return found


def main() -> None:
    """Train, measure what is missing, and write `results/moe.json`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.chdir(FOLDER)  # so that results name no folder of this machine
    source, test = write_problems()
    model, task = Path("model"), f"{test}_nll"
    if not (model / "config.json").exists():
        train(model, test)
    known = record("moe")["raw"].get("rows", {})
    rows = dict(zip(known, results_in(list(known.values())), strict=True))
    calibration = calibrate(load(str(model)).tokenizer, [f"{source}"], n=EXAMPLES)
    cells: dict[str, Callable[[], Decoder]] = {"dense": lambda: load(str(model))}
    steps = (("prune", pruned, SPARSITIES, METHODS), ("shrink", shrunk, SHARES, CHOICES))
    cells |= {
        f"{kind} {name} {share:g}": partial(make, model, calibration, share, name)
        for kind, make, shares, names in steps
        for share in shares
        for name in names
    }
    for label, make in cells.items():
        if label in rows:
            continue
        start = time.perf_counter()
        decoder = make()
        seconds = time.perf_counter() - start
        rows[label] = results_in([light(vars(evaluate(decoder, [task])[0]))])[0]
        print(f"{label}: {headline(rows[label]):.4f} nats per token, {seconds:.0f} s", flush=True)
        rows = {label: rows[label] for label in cells if label in rows}
        raw = {"rows": {k: vars(v) for k, v in rows.items()}}
        write_figures("moe", figures(rows), raw, seeds=[0, 1])


if __name__ == "__main__":
    main()
