"""Find what mixes tokens in a layer: attention of every kind, linear attention, state spaces, short convolutions.

A mixer is what has an output projection; its units are slices of that projection's input. Which rows of its other
matrices belong to a unit follows from their roles.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from causalprune.core import Mixer, ModelError, Projection, Role
from causalprune.models.roles import LINEAR, Pattern, Rows, arranged, matches

_QUARTERS = 4
"""Parts into which CodeGen cuts fused rows."""


@dataclass(eq=False)
class Found:
    """The mixers of a layer with their matrices, and how many weights of which parameters stay whole, and why."""

    mixers: list[Mixer] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)
    whole: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Block:
    """A mixer's module, its place in the layer, its parameters by their paths in it, and what of them has roles."""

    path: str
    module: Any
    config: Any
    names: Mapping[str, nn.Parameter]
    stored: Mapping[str, tuple[Pattern, Projection]]

    @property
    def place(self) -> Literal["heads", "mixers"]:
        """What its units are: heads of attention, or of another mixer."""
        return "mixers" if any(LINEAR.fullmatch(name) for name in self.names) else "heads"

    def number(self, *names: str) -> int:
        """Return the first of these attributes that the module has, else 0."""
        own = (getattr(self.module, name, None) for name in names)
        return next((value for value in own if isinstance(value, int) and value > 0), 0)

    def rows(self, role: Role) -> int:
        """Return the number of rows of a matrix that plays no other role, 0 where there is none."""
        return next((p.shape[0] for pattern, p in self.stored.values() if pattern.roles == (role,)), 0)


def outputs(module: nn.Module) -> list[str]:
    """Return the paths of the output projections of mixers in a layer."""
    hits = ((name, hit) for name, _ in module.named_parameters() for hit in matches(name))
    return [
        name.removesuffix(".weight") for name, (p, hit) in hits if p.roles == ("o",) and not _biased(name)
    ]


def _biased(name: str) -> bool:
    return name.endswith("bias")


def mixers_of(config: Any, path: str, index: int, module: nn.Module) -> Found:
    """Return the mixers of a layer; their shapes are checked against each other."""
    found = Found()
    for output in outputs(module):
        block = _block(config, path, index, module, output)
        mixer = _mixer(block, module.get_submodule(output), f"{path}.{output}")
        if any(own.place == mixer.place for own in found.mixers):
            raise ModelError(
                f"{path} has two mixers whose units would be {mixer.place!r}, the second {block.path}"
            )
        found.mixers.append(mixer)
        for pattern, stored in block.stored.values():
            found.projections += _views(block, mixer, pattern, stored, found.whole)
    return found


def _block(config: Any, path: str, index: int, layer: nn.Module, output: str) -> _Block:
    own = next(hit["mixer"] for p, hit in matches(output) if p.roles == ("o",))
    place = output[: output.rindex(own) + len(own)]
    names = {n.removeprefix(f"{place}."): p for n, p in layer.named_parameters() if n.startswith(f"{place}.")}
    stored = {}
    for name, parameter in names.items():
        if not (hits := [p for p, hit in matches(f"{place}.{name}") if "mixer" in hit.groupdict()]):
            continue
        hits = [p for p in hits if p.beside is None or p.beside in names]
        known = [p for p in hits if p.model_types is None or config.model_type in p.model_types]
        if not known:
            raise ModelError(
                f"{path}.{place}.{name}: the order of fused roles in {config.model_type} is unknown"
            )
        owner: Any = layer.get_submodule(f"{place}.{name}".rpartition(".")[0])
        if parameter.ndim != 2 or not isinstance(owner, nn.Linear | Conv1D):
            shape = list(parameter.shape)
            raise ModelError(
                f"{path}.{place}.{name} of shape {shape} in a {type(owner).__name__} is not known"
            )
        transposed = isinstance(owner, Conv1D)
        whole = Projection(
            "", index, known[0].roles[0], f"{path}.{place}.{name}", parameter, owner, transposed
        )
        stored[name] = known[0], whole
    return _Block(place, layer.get_submodule(place), config, names, stored)


def _mixer(block: _Block, output: nn.Module, name: str) -> Mixer:
    """Return the mixer of a block, its units counted by what its module, its shapes and the configuration say."""
    columns, *others = [p.shape[1] for pattern, p in block.stored.values() if pattern.roles == ("o",)]
    if others:
        raise ModelError(f"{name} is not the only output projection of {block.path}")
    heads = setting(block.config, "num_attention_heads")
    if block.place == "heads":
        n = block.number("num_heads", "num_attention_heads", "n_heads", "n_head") or heads or 0
        if not n or columns % n:
            raise ModelError(f"{name} has {columns} columns, and {block.config.model_type} says {n} heads")
        return Mixer("heads", block.module, output, n, _kv_heads(block, n, columns // n), columns // n)
    n = block.number("num_v_heads", "n_mamba_heads", "num_heads", "num_attention_heads") or heads or 0
    if not n or columns % n:
        n = columns // math.gcd(columns, 64)
    kv = block.number("num_k_heads", "n_groups") or n
    if n % kv:
        raise ModelError(f"{name}: {n} heads cannot share {kv} groups of keys")
    return Mixer("mixers", block.module, output, n, kv, columns // n)


def _kv_heads(block: _Block, n: int, head_dim: int) -> int:
    """Return the number of key-value heads of attention: that of the weights, where they show it."""
    latent = any(pattern.roles == ("kv_b",) for pattern, _ in block.stored.values())
    values, keys, queries = (block.rows(role) for role in ("v", "k", "q"))
    stated = block.number("num_key_value_heads", "num_kv_heads", "kv_heads", "num_query_groups")
    if not stated and (groups := block.number("num_key_value_groups")):
        stated = n // groups
    stated = stated or setting(block.config, "num_key_value_heads") or n
    found = values // head_dim if values else keys // (queries // n) if keys and queries else stated
    found = n if latent else found
    if not found or n % found:
        raise ModelError(f"{block.path}: {n} heads cannot share {found} of keys and values")
    return found


def setting(config: Any, name: str, varied: Any = None) -> Any:
    """Return a field of a configuration, None where it has none, `varied` where it has another one for every layer."""
    try:
        return getattr(config, name, None)
    except Exception as error:
        if "PerLayer" not in type(error).__name__:
            raise
        return varied


def _views(
    block: _Block, mixer: Mixer, pattern: Pattern, stored: Projection, whole: dict[str, tuple[int, str]]
) -> Iterator[Projection]:
    """Yield the projections that share one stored matrix, and take note of rows of it that have no role."""
    rows = (
        dict.fromkeys(pattern.roles, None)
        if len(pattern.roles) == 1
        else _rows(block, mixer, pattern, stored)
    )
    prefix = "" if mixer.place == "heads" else "mixer."
    for role, own in rows.items():
        view = replace(stored, name=f"layers.{stored.layer}.{prefix}{role}", role=role, rows=own)
        yield replace(view, blocks=_blocks(mixer, role, view))
    left = stored.shape[0] - sum(replace(stored, rows=own).shape[0] for own in rows.values())
    if left:
        whole[stored.parameter_name] = left * stored.shape[1], "decay or gate of low rank"


def _rows(block: _Block, mixer: Mixer, pattern: Pattern, stored: Projection) -> dict[Role, Rows]:
    """Return which rows of a fused matrix belong to each role."""
    n, kv, width = mixer.n_heads, mixer.n_kv_heads, mixer.head_dim
    wide, keys = n * width, kv * width
    if mixer.place == "mixers":
        keys = (
            kv * block.number("head_k_dim", "ssm_state_size") if pattern.beside in (None, "dt_bias") else wide
        )
        keys = keys or wide
    roles, order = pattern.roles, _order(block, pattern.layout)
    of: dict[Role, int] = {"q": keys if mixer.place == "mixers" else wide, "k": keys, "v": keys, "g": wide}
    of["v"] = wide if mixer.place == "mixers" else keys
    times = {"blocks": 1, "per head": n, "per quarter": _QUARTERS, "per key": kv, "interleaved": wide}[order]
    sizes = [of[role] // times for role in roles]
    rest = stored.shape[0] - times * sum(sizes)
    if rest != (n if pattern.beside == "dt_bias" else 0) or any(of[role] % times for role in roles):
        parts = ", ".join(f"{role} {of[role]}" for role in roles)
        raise ModelError(f"{stored.parameter_name} has {stored.shape[0]} rows instead of those of {parts}")
    return arranged(roles, sizes, times)


def _order(block: _Block, layout: str) -> str:
    """Return the order of fused rows, where flags of the module decide it."""
    config = block.config
    if layout == "blocks or per head":
        return "blocks" if getattr(config, "multi_query", False) else "per head"
    if layout == "as Falcon":
        return (
            "per key" if config.new_decoder_architecture else "blocks" if config.multi_query else "per head"
        )
    return layout


def _blocks(mixer: Mixer, role: Role, view: Projection) -> int:
    """Return how many equal blocks of rows (columns of `o`) belong to units, or groups of them."""
    if role in ("q_a", "kv_a"):
        return 0
    grouped = role in (("k", "v") if mixer.place == "heads" else ("q", "k"))
    blocks, size = mixer.n_kv_heads if grouped else mixer.n_heads, view.shape[1 if role == "o" else 0]
    if size % blocks:
        raise ModelError(
            f"{view.parameter_name}, as {role}, is {view.shape} [out in], which {blocks} heads do not divide"
        )
    return blocks


def check_mixer(mixer: Mixer, roles: Mapping[Role, Projection], name: str, width: int) -> None:
    """Check that a mixer's matrices are complete and fit each other, and the `width` of the residual stream."""
    own, head = set(roles) - {"g"}, mixer.head_dim
    if mixer.place == "heads":
        whole = own in ({"q", "k", "v", "o"}, {"q", "k", "o"}, {"q", "o"})
        whole |= own - {"q_a", "q_b"} in ({"q", "kv_a", "kv_b", "o"}, {"kv_a", "kv_b", "o"}) and (
            "q" in own
        ) != ("q_b" in own)
    else:
        whole = "v" in own and "o" in own
    if not whole:
        raise ModelError(f"{name}: a mixer is not understood whose matrices are {[*roles]}")
    shapes = {role: roles[role].shape for role in roles}
    if shapes["o"][0] != width:
        raise ModelError(
            f"{roles['o'].parameter_name} is {shapes['o']} [out in], and layers are {width} wide"
        )
    if mixer.place == "mixers" or "kv_b" in own:
        return
    queries = shapes["q"][0] // mixer.n_heads
    keys = shapes["k"][0] // mixer.n_kv_heads if "k" in own else queries
    values = shapes["v"][0] // mixer.n_kv_heads if "v" in own else head
    if queries not in (keys, 2 * keys) or values != head:
        counts = f"{mixer.n_heads} heads, {mixer.n_kv_heads} of keys, width {head}"
        parts = ", ".join(f"{roles[role].parameter_name} {shapes[role]}" for role in roles)
        raise ModelError(f"{parts}, instead of one width for all heads: {counts}")
