"""Which weights are a unit's own: its columns of the output projection, and its rows where no other unit sees what they compute."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from causalprune.core import Decoder, Projection
from causalprune.interventions import Site, gated_modules, sites

_Gone: TypeAlias = Mapping[Site, Bool[Tensor, "part"]]
_KNOWN: "WeakKeyDictionary[nn.Module, frozenset[Site]]" = WeakKeyDictionary()
TOKENS, SAME = 32, 1e-4
"""Tokens of a trial, and how far apart what is sent may be, as a share: where nobody looks, the bits are the same."""


def owned(p: Projection, units: Bool[Tensor, "part"]) -> Bool[Tensor, "#out #in"]:
    """Return which weights of a projection belong to units of its site, broadcastable."""
    if p.place in ("heads", "mixers"):
        blocks = units.view(p.blocks or 1, -1).all(1)  # those that share a block all have to go
        features = blocks.repeat_interleave(p.shape[p.role == "o"] // len(blocks))
        return features[None] if p.role == "o" else features[:, None]
    if p.place == "experts":
        return units[int(p.name.split(".")[3])].view(1, 1)
    return units[None] if p.role == "down" else units[:, None]


def private(decoder: Decoder) -> frozenset[Site]:
    """Return the sites where units send the same whatever the rows of others compute.

    Not so under a norm over all of them, in state spaces, or where activations are cut off by their spread. It is tried, in four
    forward passes over a few tokens, once for a model.
    """
    if decoder.model not in _KNOWN:
        _KNOWN[decoder.model] = _tried(decoder)
    return _KNOWN[decoder.model]


def _tried(decoder: Decoder) -> frozenset[Site]:
    """Leave out the outputs of some units' rows, and look whether the others send what they did, layer by layer."""
    places = [site for site in sites(decoder) if site.place != "experts"]
    sites_of = {module: site for site in places for module in gated_modules(decoder, site)}
    sent: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in sites_of}
    seen = set[Site]()

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sent[module].append((args[0].clone(), output.clone()))  # some models add in place

    _run(decoder, {module: [keep] for module in sites_of})
    for gone in _trials(decoder, places):
        calls = Counter[nn.Module]()

        def compare(
            module: nn.Module,
            args: tuple[Tensor, ...],
            output: Tensor,
            gone: _Gone = gone,
            calls: Counter[nn.Module] = calls,
        ) -> Tensor:
            before, given = sent[module][calls[module]]
            calls[module] += 1
            away = gone[sites_of[module]]
            stays = ~away.repeat_interleave(before.shape[-1] // len(away)).to(before.device)
            apart, size = ((own[..., stays].float().norm()) for own in (args[0] - before, before))
            if not apart <= SAME * size:
                seen.add(sites_of[module])
            return given.clone()  # so that later layers get what they got

        hooks: dict[nn.Module, list[Any]] = {module: [compare] for module in sites_of}
        for p in decoder.projections:
            if p.place != "experts" and p.role not in ("o", "down"):
                for module in (p.module, *p.uses):
                    hooks.setdefault(module, []).append(_silenced(p, gone[Site(p.layer, p.place)]))
        _run(decoder, hooks)
    return frozenset(places) - seen


def _run(decoder: Decoder, hooks: Mapping[nn.Module, list[Any]]) -> None:
    """Run the model on tokens from the first half of its vocabulary, with hooks on modules."""
    vocabulary = len(decoder.model.get_input_embeddings().weight)
    tokens = torch.arange(TOKENS)[None] * max(vocabulary // (2 * TOKENS), 1) % vocabulary
    with ExitStack() as stack, torch.inference_mode():
        for module, own in hooks.items():
            for hook in own:
                stack.callback(module.register_forward_hook(hook).remove)
        decoder.model(input_ids=tokens.to(decoder.device), use_cache=False)


def _silenced(p: Projection, units: Bool[Tensor, "part"]) -> Any:
    """Return a hook that sets the outputs of units' rows to zero."""
    every = torch.arange(p.parameter.shape[-1 if p.transposed else -2])
    rows = (every if p.rows is None else every[p.rows])[owned(p, units)[:, 0]]

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.index_fill(-1, rows.to(output.device), 0)

    return hook


def _trials(decoder: Decoder, places: list[Site]) -> Iterator[_Gone]:
    """Yield choices of units, some of which part any two: every other one, every other group that shares keys, the first half."""
    sizes, groups = sites(decoder), dict.fromkeys(places, 1)
    for layer in decoder.layers:
        for own in layer.mixers:
            groups[Site(layer.index, own.place)] = own.n_heads // own.n_kv_heads
    numbers = {site: torch.arange(sizes[site]) for site in places}
    yield {site: own % 2 == 0 for site, own in numbers.items()}
    yield {site: own // groups[site] % 2 == 1 for site, own in numbers.items()}
    yield {site: own < sizes[site] // 2 for site, own in numbers.items()}
