"""Slow and plain versions of what the library computes, and small inputs for both.

Nothing here uses the library's hooks, batches or formulas: one sequence at a time, whole forward
passes, loops over heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from families import FAMILIES, VOCAB
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from causalprune.core.types import Calibration, Decoder, Example, Layer, Projection, Unit
from causalprune.models.anatomy import inspect_model

ROUNDING = {"rtol": 2e-5, "atol": 2e-5}
"""Sums of a dozen float32 losses, computed in different orders."""


def fresh(family: str) -> Decoder:
    """Return a tiny model of its own, to be changed at will."""
    return inspect_model(FAMILIES[family](), None, name=family)


@cache
def shared(family: str) -> Decoder:
    """Return the tiny model of a family that no test may leave changed."""
    return fresh(family)


class Expert(nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(part.shape[1], len(part), bias=False) for part in gate_up.chunk(2))
        self.w2 = nn.Linear(down.shape[1], len(down), bias=False)
        for linear, weight in zip((self.w1, self.w3, self.w2), (*gate_up.chunk(2), down), strict=True):
            linear.weight.data = weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Experts(nn.ModuleList):
    """Experts as modules of their own, as remote code has them."""

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self):
            rows, places = (chosen == e).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += expert(x[rows]) * shares[rows, places, None]
        return out


def with_expert_modules() -> Decoder:
    """Return the tiny Mixtral with its stacked experts as modules."""
    model = fresh("mixtral").model
    for layer in model.model.layers:
        old = layer.mlp.experts
        layer.mlp.experts = Experts(map(Expert, old.gate_up_proj.data, old.down_proj.data))
    return inspect_model(model, None, name="modules")


@contextmanager
def restored(decoder: Decoder) -> Iterator[dict[str, Tensor]]:
    """Yield a copy of all parameters by name, and put them back in the end."""
    before = {name: p.data.clone() for name, p in decoder.model.named_parameters()}
    try:
        yield before
    finally:
        for name, p in decoder.model.named_parameters():
            p.data.copy_(before[name])


def weights(decoder: Decoder) -> dict[str, Tensor]:
    """Return a copy of every projection's weights `[out in]`, by name."""
    return {projection.name: projection.read().clone() for projection in decoder.projections}


def example(length: int, target_start: int, seed: int = 0) -> Example:
    """Return random tokens, none of them special."""
    tokens = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(tokens), target_start, "random", f"{seed}:{length}")


def calibration(
    shapes: Sequence[tuple[int, int]] = ((14, 5), (13, 9), (9, 1), (4, 3)), subsets: int = 3, seed: int = 0
) -> Calibration:
    """Return random examples of the given (length, target start): some fit one batch, some do not."""
    examples = [example(length, start, seed + i) for i, (length, start) in enumerate(shapes)]
    return Calibration(tuple(examples), tuple(i % subsets for i in range(len(examples))))


ONE_ROUTE = Calibration((Example((7,) * 6, 1, "equal", ""),), (0,))
"""Equal tokens have equal hidden states: they all go to the same experts, and the others see none."""


def logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Return all logits `[time vocab]` of one sequence without padding."""
    with torch.inference_mode():
        output: Any = model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    return output.logits[0]


def nats(model: PreTrainedModel, one: Example) -> float:
    """Return the cross-entropy of the target tokens, from all logits."""
    every = logits(model, one.tokens).double()
    log_probabilities = every.log_softmax(-1)
    return -sum(
        float(log_probabilities[position - 1, one.tokens[position]])
        for position in range(one.target_start, len(one.tokens))
    )


@contextmanager
def without_head(layer: Layer, head: int) -> Iterator[None]:
    """Set the columns of `W_o` that read one head to zero for a while."""
    output = next(p for p in layer.projections if p.role == "o")
    before = output.read().clone()
    width = before.shape[1] // layer.attention.n_heads
    changed = before.clone()
    changed[:, head * width : (head + 1) * width] = 0
    output.write(changed)
    try:
        yield
    finally:
        output.write(before)


def lowest_go(scores: list[Tensor], count: int) -> list[np.ndarray]:
    """Return what stays when the first `count` of all scores, in a stable order, go."""
    flat = np.concatenate([score.float().numpy().ravel() for score in scores])
    keep = np.ones(len(flat), dtype=bool)
    keep[np.argsort(flat, kind="stable")[:count]] = False
    parts = np.split(keep, np.cumsum([score.numel() for score in scores])[:-1])
    return [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]


def columns_read(decoder: Decoder, unit: Unit) -> Iterator[tuple[Projection, slice]]:
    """Yield the columns of output and down projections that read a unit, written down a second time."""
    layer = decoder.layers[unit.layer]
    attention = layer.attention
    per_group = attention.n_heads // attention.n_kv_heads
    width = {"head": attention.head_dim, "kv_group": per_group * attention.head_dim}.get(unit.kind)
    for p in layer.projections:
        if p.role == "o" and width:
            yield p, slice(unit.index * width, (unit.index + 1) * width)
        if p.role == "o" and unit.kind in ("attention", "layer"):
            yield p, slice(None)
        if p.role == "down" and unit.kind in ("mlp", "layer"):
            yield p, slice(None)
        if p.role == "down" and unit.kind == "expert" and f".experts.{unit.index}." in p.name:
            yield p, slice(None)
        if p.role == "down" and unit.kind == "neurons":
            yield p, slice(unit.index * 16, (unit.index + 1) * 16)


@contextmanager
def removed(decoder: Decoder, unit: Unit) -> Iterator[None]:
    """Set what reads a unit to zero for a while."""
    with ExitStack() as stack:
        for p, columns in columns_read(decoder, unit):
            before = p.read().clone()
            stack.callback(p.write, before)
            changed = before.clone()
            changed[:, columns] = 0
            p.write(changed)
        yield


def problems(n: int = 6, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (14 + i % 3,), generator=generator).tolist() for i in range(n)]
    return Calibration(
        tuple(Example(tuple(row), 5, "random", str(i)) for i, row in enumerate(rows)), (0,) * n
    )
