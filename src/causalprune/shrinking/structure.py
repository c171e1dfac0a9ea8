"""Physical removal of units: a smaller model of the same architecture, which `from_pretrained` loads unchanged.

Every layer loses equally many, because a standard configuration has one width for all of them.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Int
from torch import Tensor, nn

from causalprune.checkpoints import was_pruned
from causalprune.core import (
    CausalPruneError,
    Decoder,
    Layer,
    Masks,
    ModelError,
    OptionError,
    Projection,
)
from causalprune.models import LEFT_OUT, reshaped, setting, unfilled

Indices: TypeAlias = Mapping[int, Int[Tensor, "_"]]
"""What stays of every layer, in ascending order, by the number of the layer."""

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")
_NUMBERS = ("moe_layers", "attn_layer_indices")
"""Lists of numbers of layers, besides those that end in `_only_layers`."""
_FIRST = ("first_k_dense_replace", "num_dense_layers")
"""How many of the first layers are dense."""
_UNFIT = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)
"""What configurations and modules raise where sizes do not fit each other."""
_ROUTER = next(pattern for pattern, reason in LEFT_OUT if reason == "router")


@dataclass(frozen=True)
class Kept:
    """What stays: neurons of dense MLPs, KV groups with their query heads, and experts by layer, and whole layers.

    What is not named stays whole.
    """

    neurons: Indices = field(default_factory=dict)
    kv_groups: Indices = field(default_factory=dict)
    experts: Indices = field(default_factory=dict)
    layers: tuple[int, ...] | None = None


def smaller(decoder: Decoder, kept: Kept) -> Decoder:
    """Return a new decoder that has only what is kept, with copies of its weights; the old one is left as it is.

    Raises:
        OptionError: layers would keep different numbers of units.
        ModelError: the architecture ties the size of what would go to something that stays.
    """
    model = _empty(decoder, kept)
    wanted, found = model.state_dict(), dict(_cut(decoder, kept, decoder.model.state_dict()))
    _check_shapes(model.config, wanted, found)
    made = reshaped(decoder, model, {name: found[name] for name in wanted})
    _check_runs(made.model)
    return made


def _empty(decoder: Decoder, kept: Kept) -> Any:
    """Return a model with room for what is kept."""
    config = _configured(decoder, kept)
    try:
        return unfilled(type(decoder.model), config, decoder.model.dtype)
    except _UNFIT as cause:
        raise ModelError(f"a smaller {config.model_type} cannot be: {cause}") from cause


def parameters_of(decoder: Decoder, kept: Kept) -> int:
    """Return the parameters that a model with only what is kept has, without making it; raises what `smaller` does."""
    model = _empty(decoder, kept)
    model.tie_weights()
    state = {name: weight.to("meta") for name, weight in decoder.model.state_dict().items()}
    _check_shapes(model.config, model.state_dict(), dict(_cut(decoder, kept, state)))
    return sum(p.numel() for p in model.parameters())


def _check_shapes(config: Any, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` where the model that a configuration states does not have the weights that are left."""
    for name, weight in wanted.items():
        if name not in found or found[name].shape != weight.shape:
            have = list(found[name].shape) if name in found else "nothing"
            raise ModelError(
                f"a smaller {config.model_type} wants {name} as {list(weight.shape)}, and {have} is left: "
                "this architecture cannot lose such units"
            )


def _check_runs(model: Any) -> None:
    """Run one token: some shapes, such as those of norms over all heads, do not follow the configuration."""
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except _UNFIT as cause:
        raise ModelError(
            f"a smaller {model.config.model_type} does not run ({type(cause).__name__}: {cause}): this architecture cannot lose such units"
        ) from cause


def column_keep(decoder: Decoder, kept: Kept) -> Masks:
    """Return the keep mask `[out in]` of every projection that has the same effect: zero columns where units go.

    What was pruned before stays zero. Experts are left as they are: without them, others are chosen in their place.
    """
    masks = Masks()
    stays, zeros_stay = (
        set(range(len(decoder.layers)) if kept.layers is None else kept.layers),
        was_pruned(decoder),
    )
    for layer in decoder.layers:
        for p in layer.projections:
            keep = torch.ones(p.shape, dtype=torch.bool, device=p.device)
            columns = _columns(layer, p, kept)
            if columns is not None:
                keep[:] = False
                keep[:, columns] = True
            if layer.index not in stays and p.role in ("o", "down"):
                keep[:] = False
            if zeros_stay(p):
                keep &= p.read() != 0
            masks.add(p.name, keep)
    return masks


def _configured(decoder: Decoder, kept: Kept) -> Any:
    """Return the configuration of the smaller model, as it will be loaded."""
    try:
        return _stated(decoder, kept)
    except CausalPruneError:
        raise
    except _UNFIT as cause:
        said = " ".join(str(cause).split())
        raise ModelError(
            f"a smaller {decoder.model.config.model_type} cannot be configured: {said}"
        ) from cause


def _stated(decoder: Decoder, kept: Kept) -> Any:
    whole = copy.deepcopy(decoder.model.config)
    config = whole.get_text_config(decoder=True)
    if kept.neurons:
        _narrower(config, _common(kept.neurons, "neurons"))
    if kept.kv_groups:
        groups = _common(kept.kv_groups, "KV groups")
        attention = decoder.layers[min(kept.kv_groups)].attention
        if all(
            p.role != "kv_b" for p in decoder.projections
        ):  # heads of latent attention have several widths
            _state(config, "head_dim", attention.head_dim)
        config.num_attention_heads = groups * (attention.n_heads // attention.n_kv_heads)
        config.num_key_value_heads = groups
    if kept.experts:
        left = _common(kept.experts, "experts")
        needed = next(filter(None, (getattr(config, name, None) for name in _CHOSEN)), 1)
        if left < needed:
            raise OptionError(f"every token needs {needed} experts: keep at least as many")
        for name in _EXPERTS:
            if hasattr(config, name):
                setattr(config, name, left)
    if kept.layers is not None:
        if any(p.uses for p in decoder.projections):
            raise ModelError(f"layers of {config.model_type} share weights: none of them can go")
        _fewer_layers(whole, config, kept.layers)
    _validate(whole)
    _validate(config)
    again = type(whole).from_dict(whole.to_dict())  # as it will be loaded: not every field comes back
    again._attn_implementation = whole._attn_implementation  # noqa: SLF001
    return again


def _narrower(config: Any, width: int) -> None:
    """State another width of the MLPs."""
    if any(getattr(config, "activation_sparsity_pattern", None) or ()):
        raise ModelError(
            f"neurons of {config.model_type} are cut off by the mean and spread of all: none can go"
        )
    names = [name for name in _WIDTHS if getattr(config, name, None) or name in config.to_dict()]
    if not names:
        raise ModelError(f"{config.model_type} does not state the width of its MLP as one of {_WIDTHS}")
    if getattr(
        config, "block_auto_adjust_ff_dim", False
    ):  # LFM2: else another width is made of what is stated
        config.block_auto_adjust_ff_dim = False
    for name in names:
        own = getattr(config, name)
        setattr(config, name, [width] * len(own) if isinstance(own, list) else width)


def _state(config: Any, name: str, value: int) -> None:
    """Set a field of a configuration, unless what it computes for it is the same."""
    if setting(config, name, varied=value) != value:
        try:
            setattr(config, name, value)
        except AttributeError as cause:
            raise ModelError(
                f"{config.model_type} cannot state {name}: it follows from other sizes"
            ) from cause


def _validate(config: Any) -> None:
    """Ask for what saving and loading will ask for; not every configuration has such a check."""
    try:
        getattr(config, "validate", lambda: None)()
    except (ValueError, StrictDataclassError) as cause:
        said, other = " ".join(str(cause).split()), ""
        if config.model_type == "llama":
            other = ", or take it as a Mistral, whose heads need not divide its width (--as-mistral)"
        raise ModelError(
            f"a smaller {config.model_type} would not load ({said}): ask for another share{other}"
        ) from cause


def silence(decoder: Decoder, kept: Kept) -> None:
    """Set to zero, in place, what layers that go add to the residual stream without a weight: their output biases."""
    state = decoder.model.state_dict()
    for layer in decoder.layers:
        if kept.layers is not None and layer.index not in kept.layers:
            for p in layer.projections:
                if p.role in ("o", "down") and (name := _bias(p)) in state:
                    state[name].zero_()


def _bias(p: Projection) -> str:
    """Return the name that the bias of a projection has, if there is one."""
    return p.parameter_name.removesuffix("weight") + "bias"


def _fewer_layers(whole: Any, config: Any, layers: tuple[int, ...]) -> None:
    """State fewer layers, with what the configuration says of each of them in lists."""
    n = config.num_hidden_layers
    by_number = config.model_type in ("diffllama", "beam") or getattr(
        config, "scale_attn_by_inverse_layer_idx", False
    )
    deep = len(getattr(getattr(whole, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if layers[:deep] != tuple(range(deep)):
        raise ModelError(
            f"the first {deep} layers of {whole.model_type} get features of images by their numbers: none of them can go"
        )
    if by_number and layers != tuple(range(len(layers))):
        raise ModelError(f"layers of {config.model_type} compute by their numbers: none can go but the last")
    if getattr(config, "scale_depth", None):  # MiniCPM divides it by the root of the number of layers
        config.scale_depth *= math.sqrt(len(layers) / n)
    for name, value in config.to_dict().items():
        if name.endswith("_only_layers") or name in _NUMBERS:
            setattr(config, name, [layers.index(i) for i in value or [] if i in layers])
        elif name in _FIRST and value:
            setattr(config, name, sum(i < value for i in layers))
        elif name == "per_layer_config" and value:
            own = {layers.index(int(i)): each for i, each in value.items() if int(i) in layers}
            setattr(config, name, own)
        elif isinstance(value, list) and len(value) == n:
            setattr(config, name, [value[i] for i in layers])
    config.num_hidden_layers = len(layers)


def _common(indices: Indices, what: str) -> int:
    sizes = {len(index) for index in indices.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise OptionError(f"every layer must keep the same number of {what}, at least one: {sorted(sizes)}")
    return sizes.pop()


def _cut(decoder: Decoder, kept: Kept, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the smaller model, by their names there, from those of the whole one."""
    layers = kept.layers or tuple(range(len(decoder.layers)))
    inside = {layer.index: f"{layer.name}." for layer in decoder.layers}
    for name, weight in state.items():
        if not name.startswith(tuple(inside.values())):
            yield name, weight
    for new, old in enumerate(layers):
        layer = decoder.layers[old]
        path, picks = inside[old].removesuffix(f"{old}."), _picks(layer, kept, state)
        for name, weight in state.items():
            if not name.startswith(inside[old]):
                continue
            own = weight
            for dim, index in picks.get(name, {}).items():
                own = own.index_select(dim, index.to(own.device))
            yield f"{path}{new}.{name.removeprefix(inside[old])}", own


def _picks(layer: Layer, kept: Kept, state: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Return which indices stay, by dimension, of every stored tensor of a layer that loses some."""
    rows: dict[str, list[Tensor]] = {}
    picks: dict[str, dict[int, Tensor]] = {}
    cut = {p.parameter_name for p in layer.projections if _rows(layer, p, kept) is not None}
    for p in layer.projections:
        offset = 0 if p.expert is None else 1
        out, into = (offset + 1, offset) if p.transposed else (offset, offset + 1)
        stays = _rows(layer, p, kept)
        if p.expert is None and p.parameter_name in cut:
            every = torch.arange(p.parameter.shape[out])
            own = every if p.rows is None else every[p.rows]
            rows.setdefault(p.parameter_name, []).append(own if stays is None else own[stays])
            index = torch.cat(rows[p.parameter_name]).sort().values
            picks.setdefault(p.parameter_name, {})[out] = index
            picks[_bias(p)] = {0: index}
        if (columns := _columns(layer, p, kept)) is not None:
            picks.setdefault(p.parameter_name, {})[into] = columns
    if (experts := kept.experts.get(layer.index)) is not None:
        for name, dim in _by_expert(layer, state):
            picks.setdefault(name, {})[dim] = experts
    return picks


def _by_expert(layer: Layer, state: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Yield the names of the tensors of a layer that count experts, and by which dimension: biases beside a router by the last."""
    if layer.experts is None or isinstance(layer.experts, nn.ModuleList):
        raise ModelError(f"{layer.name} has no experts in one stack that could be removed")
    inside = {
        name: name.removeprefix(f"{layer.name}.") for name in state if name.startswith(f"{layer.name}.")
    }
    routers = tuple(inner.removesuffix("weight") for inner in inside.values() if re.search(_ROUTER, inner))
    home = next(name for name, own in layer.module.named_modules() if own is layer.experts).rpartition(".")[0]
    beside = f"{home}." if home else "router."
    for name, inner in inside.items():
        own, weight = ".experts." in f".{inner}" or inner.startswith(routers), state[name]
        if own and weight.ndim and weight.shape[0] == layer.n_experts:
            yield name, 0
        elif inner.startswith(beside) and "shared" not in inner and weight.numel() == layer.n_experts:
            yield name, weight.ndim - 1


def _features(index: Tensor, width: int) -> Tensor:
    return (index[:, None] * width + torch.arange(width)).flatten()


def _rows(layer: Layer, p: Projection, kept: Kept) -> Tensor | None:
    """Return the outputs of a projection that stay, None for all."""
    groups = kept.kv_groups.get(layer.index)
    if p.blocks and p.role != "o" and p.place != "mixers":
        return None if groups is None else _owned(layer, p, groups, p.shape[0])
    return kept.neurons.get(layer.index) if p.role in ("gate", "up") and _dense(p) else None


def _columns(layer: Layer, p: Projection, kept: Kept) -> Tensor | None:
    """Return the inputs of a projection that stay, None for all."""
    if p.role == "o" and p.place != "mixers":
        groups = kept.kv_groups.get(layer.index)
        return None if groups is None else _owned(layer, p, groups, p.shape[1])
    return kept.neurons.get(layer.index) if p.role == "down" and _dense(p) else None


def _owned(layer: Layer, p: Projection, groups: Tensor, size: int) -> Tensor:
    """Return which of so many rows or columns belong to groups of heads."""
    return _features(_features(groups, p.blocks // layer.attention.n_kv_heads), size // p.blocks)


def _dense(p: Projection) -> bool:
    return p.name.count(".") == 2  # not `layers.0.experts.3.down`, nor `layers.0.shared.down`
