"""Exact attribution against the naive way, head by head, in one run.

Naive: a hook that zeroes the head, a full forward pass of one padded batch, logits at all positions.
Exact: `causalprune.attribution.exact`. Same model, same examples, same process, one after the other.

    python bench/attribution.py [--examples 4]
"""

import argparse
import time

import torch
from common import data_folder, write_figures
from torch import Tensor

from causalprune.attribution import exact
from causalprune.calibration import calibrate
from causalprune.embedded import embedded_model
from causalprune.model import load
from causalprune.progress import shown
from causalprune.types import Calibration, Decoder


def naive(decoder: Decoder, calibration: Calibration) -> Tensor:
    """Return `[unit sequence]` nats of the target tokens by one full forward pass per head."""
    examples = calibration.examples
    longest = max(len(e.tokens) for e in examples)
    tokens = torch.tensor([list(e.tokens) + [0] * (longest - len(e.tokens)) for e in examples])
    real = torch.tensor([[i < len(e.tokens) for i in range(longest)] for e in examples])
    rows = []
    with shown("naive") as progress, torch.inference_mode():
        for layer in decoder.layers:
            attention = layer.attention
            for head in range(attention.n_heads):
                rows.append(
                    _removed(
                        decoder, attention.output, head * attention.head_dim, attention.head_dim, tokens, real
                    )
                )
                progress(len(rows), len(decoder.layers) * attention.n_heads)
    spans = [(i, slice(e.target_start - 1, len(e.tokens) - 1)) for i, e in enumerate(examples)]
    return torch.stack([torch.stack([nats[i, span].sum() for i, span in spans]) for nats in rows])


def _removed(
    decoder: Decoder, output: torch.nn.Module, start: int, width: int, tokens: Tensor, real: Tensor
) -> Tensor:
    def zero(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].clone()
        heads[..., start : start + width] = 0
        return (heads,)

    hook = output.register_forward_pre_hook(zero)
    try:
        logits = decoder.model(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits
    finally:
        hook.remove()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    ).double()


def main() -> None:
    """Measure and write `results/attribution_exact.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=4)
    n = parser.parse_args().examples
    decoder = load(str(embedded_model()))
    calibration = calibrate(decoder.tokenizer, ["gsm8k"], n=n, subsets=2, data_dir=data_folder())
    start = time.perf_counter()
    with shown("exact") as progress:
        effects = exact(decoder, calibration, on_progress=progress)
    exact_seconds = time.perf_counter() - start
    start = time.perf_counter()
    reference = naive(decoder, calibration)
    naive_seconds = time.perf_counter() - start
    tokens = effects.tokens
    difference = ((effects.masked_nats - reference).sum(1) / tokens.sum()).abs()
    per_sequence = ((effects.masked_nats - reference) / tokens).abs()
    figures = {
        "exact_vs_naive_speedup": naive_seconds / exact_seconds,
        "exact_vs_naive_max_abs_diff_nats": float(difference.max()),
        "exact_vs_naive_max_abs_diff_nats_per_sequence": float(per_sequence.max()),
    }
    raw = {
        "examples": n,
        "heads": len(effects.units),
        "exact_seconds": exact_seconds,
        "naive_seconds": naive_seconds,
        "exact_nats": effects.masked_nats.tolist(),
        "naive_nats": reference.tolist(),
        "target_tokens": tokens.tolist(),
        "tokens": [len(e.tokens) for e in calibration.examples],
    }
    print(write_figures("attribution_exact", figures, raw, seeds=[0]))
    print(figures)


if __name__ == "__main__":
    main()
