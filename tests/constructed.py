"""Models whose circuits are known because they are built by hand: 16 heads, most of them decoys.

GPT-2 with ReLU. Every feature is a pair of coordinates of opposite sign, and a constant a thousand times as large keeps
the norms linear. The true members are written down in `TRUE`.
"""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from causalprune.core.types import Calibration, Decoder, Example, Unit
from causalprune.models.anatomy import inspect_model

VOCAB, PLACES, HEADS, WIDTH, LAYERS = 16, 16, 8, 20, 2
MODEL = HEADS * WIDTH
FEATURES = MODEL // 2
TOKEN, BEFORE, OUT, PLACE, CONSTANT, SEEN = 0, 16, 32, 48, 64, 65
"""Where features begin: the token, the one before it, logits, the place, the constant, what detectors saw."""
LARGE, SHARP, GAIN = 1000.0, 40.0, 8.0
START, P, Q, TARGET = 0, 1, 2, 3
DECOY = 0.004

TRUE = {
    "chain": {Unit(0, 3), Unit(1, 5)},
    "and": {Unit(0, 2), Unit(1, 6)},
    "or": {Unit(0, 1), Unit(1, 4)},
    "suppressor": {Unit(0, 6), Unit(1, 2)},
}
"""A head that looks back and one that goes on from there; two that are both needed; two either of which will do; one that helps and one
that hinders."""


class Builder:
    """Weights of a model, written feature by feature."""

    def __init__(self, seed: int = 0) -> None:
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=PLACES,
            n_embd=MODEL,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=16,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=START,
            eos_token_id=START,
        )
        self.model = GPT2LMHeadModel(config).eval().requires_grad_(requires_grad=False)
        for p in self.model.parameters():
            p.data.zero_()
        self.chance = torch.Generator().manual_seed(seed)
        body = self.model.transformer
        for token in range(VOCAB):
            self.write(body.wte.weight[token], TOKEN + token, 1.0)
            self.write(body.wte.weight[token], CONSTANT, LARGE)
            self.write(body.wpe.weight[token], PLACE + token, 1.0)
            self.read(self.model.lm_head.weight[token], OUT + token, GAIN)
        for norm in (body.ln_f, *(n for block in body.h for n in (block.ln_1, block.ln_2))):
            norm.weight.fill_(LARGE * math.sqrt(2 / MODEL))

    def write(self, row: Tensor, feature: int, value: float) -> None:
        """Let a row add a feature to the stream."""
        row[feature] += value
        row[feature + FEATURES] -= value

    def read(self, row: Tensor, feature: int, value: float) -> None:
        """Let a row read a feature from the stream."""
        row[feature] += value / 2
        row[feature + FEATURES] -= value / 2

    def head(self, unit: Unit) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the rows of q, k, v and o of a head, one for each of its dimensions, and its biases of q."""
        attention, at = self.model.transformer.h[unit.layer].attn, unit.index * WIDTH
        q, k, v = (attention.c_attn.weight.T[i * MODEL + at : i * MODEL + at + WIDTH] for i in range(3))
        return q, k, v, attention.c_proj.weight[at : at + WIDTH], attention.c_attn.bias[at : at + WIDTH]

    def detector(self, unit: Unit, token: int, feature: int, value: float = 1.0) -> None:
        """Let a head write a feature wherever it has seen a token."""
        _, k, v, o, bias = self.head(unit)
        bias[0] = math.sqrt(WIDTH)
        self.read(k[0], TOKEN + token, SHARP)
        self.read(k[0], TOKEN + START, SHARP / 2)
        self.read(v[0], TOKEN + token, 1.0)
        self.write(o[0], feature, value)

    def looking_back(self, unit: Unit) -> None:
        """Let a head write the token before."""
        q, k, v, o, _ = self.head(unit)
        for i in range(PLACES):
            if i + 1 < PLACES:
                self.read(q[i], PLACE + i + 1, SHARP * math.sqrt(WIDTH))
            self.read(k[i], PLACE + i, 1.0)
            self.read(v[i], TOKEN + i, 1.0)
            self.write(o[i], BEFORE + i, 1.0)

    def inducing(self, unit: Unit) -> None:
        """Let a head predict what followed this token before, if a head before it says what precedes each token."""
        q, k, v, o, _ = self.head(unit)
        for i in range(VOCAB):
            self.read(q[i], TOKEN + i, SHARP * math.sqrt(WIDTH))
            self.read(k[i], BEFORE + i, 1.0)
            self.read(v[i], TOKEN + i, 1.0)
            self.write(o[i], OUT + i, 1.0)

    def neuron(self, number: int, features: dict[int, float], bias: float, value: float) -> None:
        """Let a neuron of the last layer add to the logit of the target what it makes of features."""
        mlp = self.model.transformer.h[-1].mlp
        for feature, weight in features.items():
            self.read(mlp.c_fc.weight.T[number], feature, weight)
        mlp.c_fc.bias[number] = bias
        self.write(mlp.c_proj.weight[number], OUT + TARGET, value)

    def decoys(self, true: set[Unit]) -> None:
        """Let every other head do something that does not matter."""
        for unit in (Unit(layer, i) for layer in range(LAYERS) for i in range(HEADS)):
            if unit not in true:
                q, k, v, o, _ = self.head(unit)
                for i in range(WIDTH):
                    for row, spread in ((q[i], 0.5), (k[i], 0.5), (v[i], 0.5)):
                        for feature in range(VOCAB):
                            self.read(
                                row, TOKEN + feature, spread * float(torch.randn((), generator=self.chance))
                            )
                    for feature in range(VOCAB):
                        self.write(o[i], OUT + feature, DECOY * float(torch.randn((), generator=self.chance)))


def _chain(own: Builder) -> None:
    own.looking_back(Unit(0, 3))
    own.inducing(Unit(1, 5))


def _detected(own: Builder, *units: Unit) -> dict[int, float]:
    for i, (unit, token) in enumerate(zip(units, (P, Q), strict=True)):
        own.detector(unit, token, SEEN + i)
    return {SEEN: 1.0, SEEN + 1: 1.0}


def _and(own: Builder) -> None:
    own.neuron(0, _detected(own, Unit(0, 2), Unit(1, 6)), -1.0, 1.0)


def _or(own: Builder) -> None:
    seen = _detected(own, Unit(0, 1), Unit(1, 4))
    own.neuron(0, seen, 0.0, 1.0)
    own.neuron(1, seen, -1.0, -1.0)


def _suppressor(own: Builder) -> None:
    own.detector(Unit(0, 6), P, OUT + TARGET, 5 / GAIN)
    own.detector(Unit(1, 2), Q, OUT + TARGET, -3 / GAIN)


BUILT: dict[str, Callable[[Builder], None]] = {
    "chain": _chain,
    "and": _and,
    "or": _or,
    "suppressor": _suppressor,
}


def constructed(name: str) -> Decoder:
    """Return a model with a known circuit."""
    with torch.no_grad():
        own = Builder()
        BUILT[name](own)
        own.decoys(TRUE[name])
    return inspect_model(own.model, None, name=name)


def problems(name: str, count: int, seed: int = 0) -> Calibration:
    """Return problems of the behaviour: what followed a token before, or the target where P and Q are seen."""
    chance, examples = random.Random(f"{name}{seed}"), []
    for number in range(count):
        rest = chance.sample(range(4, VOCAB), 8)
        if name == "chain":
            x = chance.randrange(6)
            tokens = (START, *rest, rest[x], rest[x + 1])
        else:
            tokens = (START, *chance.sample([*rest, P, Q], 10), TARGET)
        examples.append(Example(tokens, len(tokens) - 1, name, f"{name}:{seed}:{number}"))
    return Calibration(tuple(examples), (0,) * count)
