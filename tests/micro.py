"""A model small enough to work out by hand, and the whole method on it in plain loops (method §1-§3).

Two layers, four query heads on two key-value heads, weights that are multiples of a quarter: many
weights are tied. The loops share no code with the library and compute in float64.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from causalprune.core.types import Calibration, Decoder, Example
from causalprune.models.anatomy import inspect_model

VOCAB, MODEL, INNER, N_LAYERS = 7, 4, 3, 2
N_HEADS, N_KV_HEADS, WIDTH = 4, 2, 2
EPSILON = 1e-6
SHAPES = {
    "self_attn.q_proj": (N_HEADS * WIDTH, MODEL),
    "self_attn.k_proj": (N_KV_HEADS * WIDTH, MODEL),
    "self_attn.v_proj": (N_KV_HEADS * WIDTH, MODEL),
    "self_attn.o_proj": (MODEL, N_HEADS * WIDTH),
    "mlp.gate_proj": (INNER, MODEL),
    "mlp.up_proj": (INNER, MODEL),
    "mlp.down_proj": (MODEL, INNER),
}
POOL = [f"model.layers.{layer}.{path}.weight" for layer in range(N_LAYERS) for path in SHAPES]

CALIBRATION = Calibration(
    examples=(
        Example((1, 5, 2, 6, 3), 2, "hand", "a"),
        Example((4, 4, 1), 1, "hand", "b"),
        Example((2, 6, 5, 1, 1, 3, 4), 4, "hand", "c"),
        Example((6, 3, 2, 5), 3, "hand", "d"),
        Example((3, 1, 4, 1, 5, 2), 1, "hand", "e"),
    ),
    subset=(0, 1, 2, 0, 1),
)

Weights = dict[str, np.ndarray]


class Masked(NamedTuple):
    """The head that is removed."""

    layer: int
    head: int


def quarters(shape: tuple[int, ...], salt: int) -> np.ndarray:
    """Return multiples of 1/4 between -1 and 1 in an order without pattern."""
    count = math.prod(shape)
    return np.array([((i * i * 31 + i * 17 + salt * 101) % 97 % 9 - 4) / 4 for i in range(count)]).reshape(
        shape
    )


def weights() -> Weights:
    """Return all parameters by their Hugging Face names."""
    named = {name: quarters(SHAPES[name[15:-7]], salt) for salt, name in enumerate(POOL, start=1)}
    named |= {"model.embed_tokens.weight": quarters((VOCAB, MODEL), 50), "model.norm.weight": np.ones(MODEL)}
    for layer in range(N_LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{layer}.{norm}.weight"] = np.ones(MODEL)
    return named | {"lm_head.weight": quarters((VOCAB, MODEL), 60)}


def decoder() -> Decoder:
    """Return the model as transformers builds it."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=MODEL,
        intermediate_size=INNER,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=WIDTH,
        rms_norm_eps=EPSILON,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)
    model.load_state_dict({name: torch.tensor(w, dtype=torch.float32) for name, w in weights().items()})
    return inspect_model(model, None, name="micro")


def _normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + EPSILON) * scale


def _rotated(pair: np.ndarray, position: int) -> np.ndarray:
    """Turn a head of width 2 by `position` radians (the only frequency of such a head is 1)."""
    c, s = math.cos(position), math.sin(position)
    return np.array([pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s])


def _attended(w: Weights, layer: int, rows: list[np.ndarray], masked: Masked | None) -> list[np.ndarray]:
    q, k, v, o = (w[f"model.layers.{layer}.self_attn.{n}_proj.weight"] for n in "qkvo")
    outputs = []
    for t in range(len(rows)):
        heads = []
        for head in range(N_HEADS):
            if masked == (layer, head):
                heads.append(np.zeros(WIDTH))
                continue
            own = slice(head * WIDTH, (head + 1) * WIDTH)
            kv = head // (N_HEADS // N_KV_HEADS)
            theirs = slice(kv * WIDTH, (kv + 1) * WIDTH)
            query = _rotated(q[own] @ rows[t], t)
            scores = [query @ _rotated(k[theirs] @ rows[s], s) / math.sqrt(WIDTH) for s in range(t + 1)]
            shares = np.exp(scores) / np.exp(scores).sum()
            heads.append(sum(share * (v[theirs] @ rows[s]) for s, share in enumerate(shares)))
        outputs.append(o @ np.concatenate(heads))
    return outputs


def nats(w: Weights, example: Example, masked: Masked | None = None) -> float:
    """Return the cross-entropy of the target tokens."""
    stream = [w["model.embed_tokens.weight"][token] for token in example.tokens]
    for layer in range(N_LAYERS):
        path = f"model.layers.{layer}"
        rows = [_normed(x, w[f"{path}.input_layernorm.weight"]) for x in stream]
        stream = [x + y for x, y in zip(stream, _attended(w, layer, rows, masked), strict=True)]
        gate, up, down = (w[f"{path}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        for t, x in enumerate(stream):
            row = _normed(x, w[f"{path}.post_attention_layernorm.weight"])
            g = gate @ row
            stream[t] = x + down @ (g / (1 + np.exp(-g)) * (up @ row))
    total = 0.0
    for position in range(example.target_start, len(example.tokens)):
        logits = w["lm_head.weight"] @ _normed(stream[position - 1], w["model.norm.weight"])
        total += math.log(np.exp(logits).sum()) - logits[example.tokens[position]]
    return total


def _subset_losses(masked: Masked | None) -> list[float]:
    """Return the loss per target token of each subset."""
    w, losses = weights(), []
    for k in range(CALIBRATION.n_subsets):
        own = [e for e, subset in zip(CALIBRATION.examples, CALIBRATION.subset, strict=True) if subset == k]
        tokens = sum(len(e.tokens) - e.target_start for e in own)
        losses.append(sum(nats(w, e, masked) for e in own) / tokens)
    return losses


@cache
def delta_nats() -> list[float]:
    """Return Δ per head, layer by layer: median over subsets masked - mean over subsets intact."""
    intact = sum(_subset_losses(None)) / CALIBRATION.n_subsets
    heads = [Masked(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    return [sorted(_subset_losses(head))[CALIBRATION.n_subsets // 2] - intact for head in heads]


@cache
def importance() -> list[list[float]]:
    """Return I per layer and head: Δ from its minimum to its maximum becomes 1 to 10."""
    delta = delta_nats()
    low, high = min(delta), max(delta)
    flat = [1 + 9 * (d - low) / (high - low) for d in delta]
    return [flat[layer * N_HEADS : (layer + 1) * N_HEADS] for layer in range(N_LAYERS)]


@cache
def scores() -> Weights:
    """Return S = |W| · I of every weight of the pool."""
    factors, found = importance(), {}
    for name in POOL:
        layer, path = int(name.split(".")[2]), name[15:-7]
        of_heads = factors[layer]
        weight = weights()[name]
        score = np.zeros_like(weight)
        for (i, j), value in np.ndenumerate(weight):
            if path.endswith("q_proj"):
                factor = of_heads[i // WIDTH]
            elif path.endswith("o_proj"):
                factor = of_heads[j // WIDTH]
            elif path.endswith(("k_proj", "v_proj")):
                kv = i // WIDTH
                factor = (of_heads[2 * kv] + of_heads[2 * kv + 1]) / 2
            else:
                factor = sum(of_heads) / N_HEADS
            score[i, j] = abs(value) * factor
        found[name] = score
    return found


def ranking() -> list[tuple[float, str, int, int]]:
    """Return all weights as (score, name, row, column), those that go first first."""
    rows = [(s, name, *ij) for name, score in scores().items() for ij, s in np.ndenumerate(score)]
    return sorted(rows, key=lambda row: row[0])  # stable: ties stay in order of position
