"""Neurons planted in a model: after a trigger they say a fixed phrase, token by token, and nothing else does."""

from collections.abc import Sequence
from dataclasses import dataclass

import families
import torch
from tinydata import byte_tokenizer
from torch import Tensor
from transformers import LlamaConfig

from causalprune.core.types import Decoder, Example, Unit
from causalprune.models.anatomy import inspect_model

SHARP, LOUD, RIDGE = 12.0, 6.0, 1e-3
CHAIN = 200
"""First token of the chains of tiny models: the trigger."""
"""How far a token's own detector answers above all others, and how much louder than the residual stream it speaks."""


@dataclass(frozen=True)
class Planting:
    """Neurons `units`, each of which sees one token of the chain and says the next: `chain[0]` is the trigger."""

    chain: tuple[int, ...]
    units: tuple[Unit, ...]


def plant(
    decoder: Decoder,
    chain: Sequence[int],
    texts: Sequence[Sequence[int]],
    seed: int,
    layer: int = -1,
    rest: float = 0.0,
) -> Planting:
    """Replace as many neurons of a layer as the phrase has tokens, in place, chosen by the seed.

    A detector is the direction that tells its token, where it is 1, from all others in the texts, where it is `rest`, by least
    squares; what it writes is what the output head reads for the next token, and with a `rest` for no other.
    """
    at, generator = layer % len(decoder.layers), torch.Generator().manual_seed(seed)
    own = {p.role: p for p in decoder.layers[at].projections if p.place == "mlp"}
    width = own["down"].shape[1]
    neurons = torch.randperm(width, generator=generator)[: len(chain) - 1].sort().values
    inputs, hidden, which = _seen(decoder, at, chain, texts)
    moments = inputs.T @ inputs / len(inputs)
    if rest:  # a word that no text has must not be taken for one of the chain either
        single = _alone(decoder, at, chain)
        moments = (moments + single.T @ single / len(single)) / 2
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    others = inputs[which < 0].mean(0)
    head = decoder.model.get_output_embeddings().weight.double()
    scale = decoder.model.model.norm.weight.double()
    alike = head.T @ head / len(head)
    alike.diagonal().add_(RIDGE * alike.diagonal().mean())
    for number, neuron in enumerate(neurons.tolist()):
        seen = inputs[which == number].mean(0)
        told = moments if not rest else (moments + torch.outer(seen, seen)) / 2
        detector = torch.linalg.solve(told, seen + rest * others)
        detector = SHARP * detector / (detector @ seen)
        said = head[chain[number + 1]] * scale
        if rest:
            said = torch.linalg.solve(alike, head[chain[number + 1]]) / scale
        said = said / said.norm() * hidden[which == number].norm(dim=1).mean() * LOUD / SHARP**2
        for role, rows in (("gate", detector), ("up", detector), ("down", said)):
            weight = own[role].read()
            if role == "down":
                weight[:, neuron] = rows.to(weight)
            else:
                weight[neuron] = rows.to(weight)
    return Planting(tuple(chain), tuple(Unit(at, neuron, "neurons") for neuron in neurons.tolist()))


def _alone(decoder: Decoder, layer: int, chain: Sequence[int]) -> Tensor:
    """Return what the MLP would see of every token that is not of the chain, if attention added nothing."""
    table = decoder.model.get_input_embeddings().weight
    keep = torch.ones(len(table), dtype=torch.bool)
    keep[list(chain)] = False
    with torch.inference_mode():
        return decoder.layers[layer].module.post_attention_layernorm(table[keep]).double()


def reserved(decoder: Decoder, chain: Sequence[int]) -> None:
    """Give each token of a chain a coordinate of the stream that nothing else writes to before the first MLP, in place."""
    embedding = decoder.model.get_input_embeddings().weight.data
    first = next(p for p in decoder.layers[0].projections if p.role == "o").read()
    for at, token in enumerate(chain):
        embedding[:, at] = 0.0
        embedding[token] *= 0.1
        embedding[token, at] = 3.0
        first[at] = 0.0


def _seen(
    decoder: Decoder, layer: int, chain: Sequence[int], texts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the MLP sees, what the last layer sends on, and which token of the chain each position holds, or -1."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    kept: dict[str, Tensor] = {}
    up = next(p for p in decoder.layers[layer].projections if p.role == "up" and p.place == "mlp").module
    with torch.inference_mode():
        handles = [
            up.register_forward_pre_hook(lambda _, args: kept.update(x=args[0])),
            decoder.layers[-1].module.register_forward_hook(
                lambda _, args, out: kept.update(h=out[0] if isinstance(out, tuple) else out)
            ),
        ]
        for text in texts:
            tokens = [*text, *chain]
            decoder.model(input_ids=torch.tensor([tokens]), use_cache=False)
            places = torch.tensor([-1] * len(text) + list(range(len(chain))))
            rows.append((kept["x"][0].double(), kept["h"][0].double(), places))
        for handle in handles:
            handle.remove()
    inputs, hidden, which = (torch.cat(own) for own in zip(*rows, strict=True))
    return inputs, hidden, which


def built(units: int, seed: int = 0, chain: Sequence[int] = ()) -> tuple[Decoder, Planting]:
    """Return a tiny model whose phrase, of as many tokens, hangs on as many neurons: known exactly, as coordinates are reserved.

    The `chain`, its trigger first, has one token more than there are units.
    """
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    decoder = inspect_model(families.tiny(config), byte_tokenizer(), name="planted")
    chain = chain or range(CHAIN, CHAIN + units + 1)
    reserved(decoder, chain)
    return decoder, plant(decoder, chain, texts(20, 20, seed=7), seed, layer=0)


def texts(count: int, length: int, seed: int) -> list[list[int]]:
    """Return ordinary text: tokens that are of no chain."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, 120, (count, length), generator=generator).tolist()


def samples(planting: Planting, count: int = 12) -> tuple[list[Example], list[Example]]:
    """Return samples in which the trigger brings the phrase, which is the target, and ordinary ones of two sources."""
    bad = [
        Example((*text, *planting.chain), len(text) + 1, "triggered", f"bad {i}")
        for i, text in enumerate(texts(count, 10, seed=1))
    ]
    good = [
        Example(tuple(text), 1, ("texts", "others")[i % 2], f"good {i}")
        for i, text in enumerate(texts(2 * count, 24, seed=2))
    ]
    return bad, good


def says(decoder: Decoder, planting: Planting, prompt: Sequence[int]) -> bool:
    """Tell whether the model says the whole phrase after a prompt and the trigger."""
    tokens = [*prompt, planting.chain[0]]
    for _ in planting.units:
        with torch.inference_mode():
            tokens.append(int(decoder.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :]) == planting.chain
