"""What can be removed from a model, and which gates close to remove it."""

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalprune.core import Decoder, Layer, ModelError, OptionError, Place, Unit, UnitKind, unknown

NAMES: dict[str, UnitKind] = {
    "heads": "head",
    "mixers": "mixer",
    "kv_groups": "kv_group",
    "attention": "attention",
    "mlp": "mlp",
    "neurons": "neurons",
    "experts": "expert",
    "layers": "layer",
}
"""Names of kinds of units on the command line; `neurons:64` gives the size of a group."""

GROUP_SIZE = 64


@dataclass(frozen=True)
class Site:
    """One place of a layer where a gate acts."""

    layer: int
    place: Place


Parts: TypeAlias = Mapping[Site, Int[Tensor, "_"]]
"""The parts at each site that a unit consists of, by index."""
Gates: TypeAlias = Mapping[Site, Float[Tensor, "batch part"]]
"""A factor for each part at each site, in each row of a batch: 0 removes it, 1 leaves it as it is."""


def sites(decoder: Decoder) -> dict[Site, int]:
    """Return every site of the model and its number of parts."""
    return {
        Site(layer.index, place): size
        for layer in decoder.layers
        for place in get_args(Place)
        if (size := _size(layer, place))
    }


def _size(layer: Layer, place: Place) -> int:
    if place in ("heads", "mixers"):
        mixer = layer.mixer(place)
        return mixer.n_heads if mixer else 0
    if place == "experts":
        return layer.n_experts
    down = _down(layer, place)
    return down[1] if down else 0


def _down(layer: Layer, place: Place) -> tuple[nn.Module, int] | None:
    name = f"layers.{layer.index}.{'shared.' if place == 'shared' else ''}down"
    return next(((p.module, p.shape[1]) for p in layer.projections if p.name == name), None)


def gated_modules(decoder: Decoder, site: Site) -> list[nn.Module]:
    """Return the module whose input carries the parts of a site, with those of later layers that share its weights."""
    first = gated_module(decoder, site)
    own = (p for p in decoder.layers[site.layer].projections if p.module is first and p.role in ("o", "down"))
    return [first, *(module for p in itertools.islice(own, 1) for module in p.uses)]


def sees_all(experts: nn.Module) -> bool:
    """Tell whether experts get every token, set to zero where it is not routed to them (Llama 4), rather than a choice."""
    given = [own.kind for own in inspect.signature(experts.forward).parameters.values()]
    return given == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def gated_module(decoder: Decoder, site: Site) -> nn.Module:
    """Return the module whose input carries the parts of a site; for experts, what calls them."""
    layer = decoder.layers[site.layer]
    if (mixer := layer.mixer(site.place)) is not None:
        return mixer.output
    if site.place == "experts":
        if layer.experts is None or isinstance(layer.experts, nn.ModuleList):
            raise ModelError(f"{layer.name}: experts that are modules of their own cannot be masked")
        return layer.experts
    down = _down(layer, site.place)
    if down is None:
        raise ModelError(f"{layer.name} has no {site.place!r} projection to mask")
    return down[0]


def list_units(
    decoder: Decoder,
    names: Sequence[str],
    neuron_effects: Mapping[int, Float[Tensor, "neuron"]] | None = None,
) -> dict[Unit, Parts]:
    """Return the units of the kinds named, layer by layer, with the parts that removing each closes.

    `neurons:64` cuts each dense MLP into groups of 64 by index, `neurons:64:effect` into groups of similar
    `neuron_effects` (by layer), which it needs.

    Raises:
        OptionError: an unknown name, a kind named twice, or a kind that this model does not have.
    """
    wanted = [_parsed(name) for name in names]
    kinds = [kind for kind, *_ in wanted]
    if not kinds or len(set(kinds)) < len(kinds):
        raise OptionError(f"units must name at least one kind, each once, not {list(names)}")
    every = sites(decoder)
    found: dict[Unit, Parts] = {}
    for layer in decoder.layers:
        own = {site: torch.arange(n) for site, n in every.items() if site.layer == layer.index}
        for kind, size, similar in wanted:
            order = neuron_effects[layer.index].argsort() if similar and neuron_effects else None
            for i, parts in enumerate(_parts(layer, kind, size, own, order)):
                found[Unit(layer.index, i, kind)] = parts
    for kind in kinds:
        if not any(unit.kind == kind for unit in found):
            raise OptionError(f"{decoder.name} has no units of kind {kind!r}: leave them out")
    return found


def grouped_by_effect(names: Sequence[str]) -> bool:
    """Tell whether neurons are to be grouped by their effects."""
    return any(_parsed(name)[2] for name in names)


def _parsed(name: str) -> tuple[UnitKind, int, bool]:
    match = re.fullmatch(r"(\w+?)(?::([1-9]\d*))?(:effect)?", name)
    head = match[1] if match else name
    if head not in NAMES:
        raise unknown("kind of units", name, NAMES)
    if match is None or ((match[2] or match[3]) and head != "neurons"):
        raise OptionError(
            f"units {name!r}: a size belongs to neurons only, as in neurons:{GROUP_SIZE} or neurons:{GROUP_SIZE}:effect"
        )
    return NAMES[head], int(match[2] or GROUP_SIZE), bool(match[3])


def _parts(
    layer: Layer, kind: UnitKind, size: int, own: Mapping[Site, Tensor], order: Tensor | None
) -> list[Parts]:
    def all_of(*places: Place) -> dict[Site, Tensor]:
        return {site: parts for site, parts in own.items() if site.place in places}

    def split(place: Place, size: int) -> list[Parts]:
        site = Site(layer.index, place)
        parts = own.get(site, torch.arange(0))
        parts = parts if place != "mlp" or order is None else parts[order.to(parts.device)]
        return [{site: part.sort().values} for part in parts.split(size) if len(part)]

    attention = layer.mixer("heads")
    shared = attention.n_heads // attention.n_kv_heads if attention else 1
    whole, mlp = all_of("heads"), all_of("mlp", "shared", "experts")
    found: dict[UnitKind, list[Parts]] = {
        "head": split("heads", 1),
        "mixer": split("mixers", 1),
        "kv_group": split("heads", shared),
        "attention": [whole] if whole else [],
        "mlp": [mlp] if mlp else [],
        "neurons": split("mlp", size),
        "expert": split("experts", 1),
        "layer": [dict(own)],
    }
    return found[kind]


def closing(parts: Sequence[Parts], every: Mapping[Site, int]) -> dict[Site, Float[Tensor, "batch part"]]:
    """Return gates with one row per entry of `parts`, closed where that entry says, open elsewhere."""
    gates: dict[Site, Tensor] = {}
    for row, closed in enumerate(parts):
        for site, index in closed.items():
            if site not in gates:
                gates[site] = torch.ones(len(parts), every[site])
            gates[site][row, index] = 0
    return gates
