"""Find the layers, attention heads and prunable weights of a model in memory.

There is no file per architecture: layers are found by structure, weights by `PATTERNS`, and every
assumption is checked against shapes. What is not understood is an error, never a silent omission.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from causalprune.core import Attention, Decoder, Layer, LeftOut, ModelError, Projection, Role
from causalprune.models.shards import raw_bytes


class Pattern(NamedTuple):
    """One row of `PATTERNS`: which roles the parameters whose path in a layer matches play.

    Several roles share one matrix either in blocks of rows (`blocks`) or cut per head into
    `[heads roles head_dim]` (`per head`). Such an order cannot be read off the shapes, so fused
    attention is accepted only for the model types it was checked for.
    """

    path: str
    roles: tuple[Role, ...]
    layout: Literal["blocks", "per head"] = "blocks"
    model_types: frozenset[str] | None = None


_ATTENTION = r"(?:self_attn|attn|attention|self_attention)\.(?:attention\.)?"
_MLP = r"(?:(?:mlp|feed_forward|ffn|block_sparse_moe|moe)\.)?"
_MLP += r"(?:(?P<group>experts|shared_experts?)\.(?:(?P<expert>\d+)\.)?)?"
_PER_HEAD = frozenset({"gpt_neox", "bloom", "persimmon"})
PATTERNS = (
    Pattern(_ATTENTION + r"q_proj", ("q",)),
    Pattern(_ATTENTION + r"k_proj", ("k",)),
    Pattern(_ATTENTION + r"v_proj", ("v",)),
    Pattern(_ATTENTION + r"(?:o_proj|out_proj|c_proj|dense)", ("o",)),
    Pattern(_ATTENTION + r"qkv_proj", ("q", "k", "v"), "blocks", frozenset({"phi3"})),
    Pattern(_ATTENTION + r"c_attn", ("q", "k", "v"), "blocks", frozenset({"gpt2"})),
    Pattern(_ATTENTION + r"query_key_value", ("q", "k", "v"), "per head", _PER_HEAD),
    Pattern(_MLP + r"(?:gate_proj|w1)", ("gate",)),
    Pattern(_MLP + r"(?:up_proj|w3|c_fc|fc1|dense_h_to_4h)", ("up",)),
    Pattern(_MLP + r"gate_up_proj", ("gate", "up")),
    Pattern(_MLP + r"(?:down_proj|w2|c_proj|fc2|dense_4h_to_h)", ("down",)),
)

LEFT_OUT = (
    (r"bias$", "bias"),
    (r"(?:norm\w*|(?:^|\.)ln_\w+)\.weight$", "norm"),
    (r"(?:^|\.)(?:gate|router|shared_expert_gate)\.(?:\w+\.)?weight$", "router"),
)

_ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")
_SHAPE_FIELDS = ["model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
_SHAPE_FIELDS += ["hidden_size", "intermediate_size", "vocab_size"]
Rows: TypeAlias = slice | Int[Tensor, "out"] | None
_Placed: TypeAlias = tuple[tuple[str, int], Projection]
_HEADS = ("Classification", "QuestionAnswering", "RewardModel")
_PRUNES = "causalprune prunes decoder-only language models with attention heads"


def inspect_model(
    model: PreTrainedModel, tokenizer: Any, *, name: str, revision: str | None = None
) -> Decoder:
    """Find the layers and prunable weights of a model in memory; reads every weight once (hash)."""
    for weight, parameter in model.named_parameters():
        if parameter.is_meta and not has_offloaded_params(model.get_submodule(weight.rpartition(".")[0])):
            raise ModelError(f"{weight} of {name!r} has no values: load it with its weights")
    decoder = outline(model, tokenizer, name=name, revision=revision)
    return replace(decoder, fingerprint=fingerprint(model))


def outline(model: PreTrainedModel, tokenizer: Any, *, name: str, revision: str | None = None) -> Decoder:
    """Find layers and prunable weights by names and shapes alone: the weights may be absent, and are not hashed."""
    check_config(model.config, name)
    for weight, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"{weight} of {name!r} is quantised ({parameter.dtype}): pass the original model"
            )
    path, modules = _decoder_list(model)
    config = model.config.get_text_config(decoder=True)
    layers = tuple(_layer(config, f"{path}.{i}", i, module) for i, module in enumerate(modules))
    left_out = _left_out(model, layers, path)
    for layer in layers:
        _check_layer(layer)
    return Decoder(model, tokenizer, name, revision, layers, left_out, fingerprint="")


def fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256 of the shape-defining configuration and of every weight, tied ones once."""

    def parts() -> Iterator[tuple[str, torch.dtype, Any]]:
        for name, parameter in sorted(_parameters(model)):
            yield name, parameter.dtype, [raw_bytes(_present(model, name, parameter))]

    return fingerprint_of(model, parts())


def _parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Return parameters by name, tied ones once: two names of an offloaded one are two objects."""
    tied, named = getattr(model, "all_tied_weights_keys", None) or {}, dict(model.named_parameters())
    return [(name, p) for name, p in named.items() if not (p.is_meta and tied.get(name) in named)]


def _present(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> Tensor:
    """Return a parameter, fetched by accelerate where it is offloaded."""
    if not parameter.is_meta:
        return parameter
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    with align_module_device(owner, torch.device("cpu")):
        return owner.get_parameter(leaf).data


def fingerprint_of(model: PreTrainedModel, parts: Iterable[tuple[str, torch.dtype, Iterable[Any]]]) -> str:
    """Return the fingerprint of weights that are given by name, in sorted order, with dtype and bytes in pieces."""
    config = model.config.get_text_config(decoder=True)
    digest = hashlib.sha256(repr([(f, getattr(config, f, None)) for f in _SHAPE_FIELDS]).encode())
    for name, dtype, pieces in parts:
        digest.update(f"{name} {dtype} {tuple(model.get_parameter(name).shape)}\n".encode())
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def frame_fingerprint(decoder: Decoder) -> str:
    """Return the SHA-256 of all weights outside the layers, which pruning leaves alone: embedding, final norm, head."""
    path, digest = decoder.layers[0].name.rpartition(".")[0], hashlib.sha256()
    for name, parameter in sorted(_parameters(decoder.model)):
        if not name.startswith(f"{path}."):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            digest.update(raw_bytes(_present(decoder.model, name, parameter)))
    return digest.hexdigest()


def expert_weight(path: str) -> tuple[int, Role] | None:
    """Tell which expert's matrix in which role a path in a layer such as `mlp.experts.3.w1.weight` is, if any."""
    if (hit := _match(path)) is None or len(hit[0].roles) > 1 or not hit[1].groupdict().get("expert"):
        return None
    return int(hit[1]["expert"]), hit[0].roles[0]


def summary(decoder: Decoder) -> dict[str, Any]:
    """Return what a user wants to know of a model before pruning it: shapes, counts, what stays."""
    parameters = list(decoder.model.parameters())
    by_role = {role: sum(p.size for p in decoder.projections if p.role == role) for role in _ROLES}
    reasons: dict[str, dict[str, int]] = {}
    for left in decoder.left_out:
        entry = reasons.setdefault(left.reason, {"parameters": 0, "weights": 0})
        entry["parameters"] += 1
        entry["weights"] += left.size
    widths = {p.name.split(".")[2]: p.shape[1] for p in decoder.projections if p.role == "down"}
    attention, head = decoder.layers[0].attention, decoder.model.get_output_embeddings()
    return {
        "name": decoder.name,
        "model_type": decoder.model.config.model_type,
        "layers": len(decoder.layers),
        "heads": attention.n_heads,
        "kv_heads": attention.n_kv_heads,
        "head_width": attention.head_dim,
        "mlp_width": widths.get("down"),
        "experts": max(layer.n_experts for layer in decoder.layers),
        "expert_width": widths.get("experts"),
        "shared_expert_width": widths.get("shared"),
        "total_parameters": sum(p.numel() for p in parameters),
        "prunable_weights": sum(by_role.values()),
        "prunable_by_role": {role: size for role, size in by_role.items() if size},
        "left_out": reasons,
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "device": str(decoder.device),
        "tied_embeddings": head is not None and head.weight is decoder.model.get_input_embeddings().weight,
        "fingerprint": decoder.fingerprint,
    }


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Raise `ModelError` for a model that is not a decoder with attention heads."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name!r} ({config.model_type}) is an encoder-decoder model; {_PRUNES}")
    if other := [own for own in config.architectures or () if own.endswith(_HEADS)]:
        raise ModelError(f"{name!r} is a {other[0]}, whose head predicts no next tokens; {_PRUNES}")
    text = config.get_text_config(decoder=True)
    if type(text) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False):
        raise ModelError(f"{name!r} ({config.model_type}) is an encoder (masked language model); {_PRUNES}")
    for field in ("num_hidden_layers", "num_attention_heads"):
        if not getattr(text, field, None):
            raise ModelError(f"{name!r} ({config.model_type}) has no {field}; {_PRUNES}")


def _match(parameter_name: str) -> tuple[Pattern, re.Match[str]] | None:
    path = parameter_name.removesuffix(".weight")
    return next(((p, match) for p in PATTERNS if (match := re.fullmatch(p.path, path))), None)


def _output_name(layer: nn.Module) -> str:
    """Return the path of the attention output projection in a layer, empty where there is none."""
    names = (n for n, _ in layer.named_parameters() if (hit := _match(n)) and "o" in hit[0].roles)
    return next(names, "").removesuffix(".weight")


def _decoder_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the only outermost `ModuleList` of `num_hidden_layers` modules with attention."""
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    right = {n: m for n, m in lists.items() if len(m) == n_layers}
    found = {n: m for n, m in right.items() if all(_output_name(e) for e in m)}
    found = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    if len(found) == 1:
        return found.popitem()
    if found:
        raise ModelError(f"ambiguous: {', '.join(found)} each hold {n_layers} layers with attention")
    seen = ", ".join(f"{n} ({len(m)})" for n, m in list(lists.items())[:8]) or "none"
    weights = ", ".join(n for m in right.values() for n, _ in m[0].named_parameters())[:400] or "none"
    wanted = f"{n_layers} decoder layers, each with known attention"
    raise ModelError(f"{type(model).__name__} has no list of {wanted}; lists: {seen}; weights: {weights}")


def _layer(config: PreTrainedConfig, path: str, index: int, module: nn.Module) -> Layer:
    """Return a layer with its projections in the fixed order; their shapes are checked later."""
    output_name, n_heads = _output_name(module), int(config.num_attention_heads)
    output: Any = module.get_submodule(output_name)
    head_dim = output.weight.shape[0 if isinstance(output, Conv1D) else 1] // n_heads
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    block = module.get_submodule(output_name.rpartition(".")[0])
    attention = Attention(block, output, n_heads, n_kv_heads, head_dim)
    found: list[_Placed] = []
    for name, parameter in module.named_parameters():
        if (hit := _match(name)) is None:
            continue
        pattern, match = hit
        if pattern.model_types and config.model_type not in pattern.model_types:
            raise ModelError(f"{path}.{name}: the order of fused roles in {config.model_type} is unknown")
        owner = module.get_submodule(name.rpartition(".")[0])
        stored = Projection("", index, pattern.roles[0], f"{path}.{name}", parameter, owner)
        found += _views(pattern, match, attention, stored)
    found.sort(key=lambda placed: (placed[0], _ROLES.index(placed[1].role)))
    routed = [p.parameter_name for (group, _), p in found if group == "experts"]
    experts = routed[0].removeprefix(f"{path}.").partition("experts.")[0] + "experts" if routed else None
    n_experts = len({place for place, _ in found if place[0] == "experts"})
    pool, mixture = tuple(p for _, p in found), module.get_submodule(experts) if experts else None
    return Layer(index, path, module, attention, pool, mixture, n_experts)


def _views(
    pattern: Pattern, match: re.Match[str], attention: Attention, stored: Projection
) -> Iterator[_Placed]:
    """Yield the projections that share one stored parameter: its roles, for each expert of a stack."""
    group, expert = (match.groupdict().get(key) or "" for key in ("group", "expert"))
    group = "shared" if group.startswith("shared") else group
    name, module, shape = stored.parameter_name, stored.module, stored.parameter.shape
    stacked = group == "experts" and not expert
    if len(shape) != 2 + stacked or not (stacked or isinstance(module, nn.Linear | Conv1D)):
        raise ModelError(f"{name} of shape {list(shape)} in a {type(module).__name__} is not known")
    # transformers' `use_experts_implementation` marks stacks that are `[in out]` or interleaved
    transposed = bool(getattr(module, "is_transposed", False)) if stacked else isinstance(module, Conv1D)
    layout = pattern.layout if getattr(module, "is_concatenated", True) else "interleaved"
    rows = _rows(pattern.roles, layout, attention, shape[-1 if transposed else -2])
    for e in range(shape[0]) if stacked else [int(expert or 0)]:
        place = {"": "", "experts": f"experts.{e}."}.get(group, f"{group}.")
        for role in pattern.roles:
            view = replace(stored, name=f"layers.{stored.layer}.{place}{role}", role=role, rows=rows[role])
            yield (group, e), replace(view, transposed=transposed, expert=e if stacked else None)


def _rows(roles: tuple[Role, ...], layout: str, attention: Attention, n_rows: int) -> dict[Role, Rows]:
    """Return which rows of the stored matrix belong to each role; their shapes are checked later."""
    if len(roles) == 1:
        return {roles[0]: None}
    n, width, kv = attention.n_heads, attention.head_dim, attention.n_kv_heads * attention.head_dim
    if layout == "per head":
        index = torch.arange(n * len(roles) * width).view(n, len(roles), width)
        return {role: index[:, i].flatten() for i, role in enumerate(roles)}
    if layout == "interleaved":
        return {role: slice(i, n_rows, len(roles)) for i, role in enumerate(roles)}
    sizes = (n * width, kv, kv) if "q" in roles else (n_rows // 2, n_rows // 2)
    ends = itertools.accumulate(sizes)
    return {role: slice(end - size, end) for role, size, end in zip(roles, sizes, ends, strict=True)}


def _check_layer(layer: Layer) -> None:
    """Check that q, k, v, o and every MLP or expert are complete and of consistent shapes."""
    attention, parts = layer.attention, dict[str, dict[Role, Projection]]()
    for projection in layer.projections:
        part = "attention" if projection.role in "qkvo" else projection.name.rpartition(".")[0]
        other = parts.setdefault(part, {}).setdefault(projection.role, projection)
        if other is not projection:
            raise ModelError(
                f"{projection.parameter_name} and {other.parameter_name} are both {other.role!r}"
            )
    wide, narrow = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    model = parts["attention"]["o"].shape[0]
    for part, roles in parts.items():
        if set(roles) - {"gate"} not in ({"q", "k", "v", "o"}, {"up", "down"}):
            raise ModelError(f"{layer.name}: {part} is not q, k, v, o or (gate), up, down but {[*roles]}")
        inner = roles["down"].shape[1] if "down" in roles else 0
        shapes = {"q": (wide, model), "k": (narrow, model), "v": (narrow, model), "o": (model, wide)}
        shapes |= {"gate": (inner, model), "up": (inner, model), "down": (model, inner)}
        for role, projection in roles.items():
            if projection.shape != shapes[role]:
                name, n, n_kv = projection.parameter_name, attention.n_heads, attention.n_kv_heads
                mismatch = f"{name}, as {role}, is {projection.shape} [out in] instead of {shapes[role]}"
                raise ModelError(f"{mismatch}: {n} heads, {n_kv} of keys, width {attention.head_dim}")
    if len(parts) == 1:
        raise ModelError(f"{layer.name} has attention, but no MLP or experts that causalprune knows")


def _left_out(model: Any, layers: tuple[Layer, ...], path: str) -> tuple[LeftOut, ...]:
    """Return every parameter outside the pool with its reason; a matrix without one is an error."""
    pool: Counter[str] = Counter()
    for projection in (p for layer in layers for p in layer.projections):
        pool[projection.parameter_name] += projection.size
    routed = tuple(f"{layer.name}." for layer in layers if layer.n_experts)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    reasons = {id(p): "output head" for p in (head.parameters() if head is not None else ())}
    reasons |= {id(p): "embedding" for p in embedding.parameters()}
    left_out = []
    for name, parameter in _parameters(model):
        if pool[name] == parameter.numel():
            continue
        if pool[name]:
            raise ModelError(f"{name}: {pool[name]} of its {parameter.numel()} weights understood")
        reason = reasons.get(id(parameter)) or next((r for p, r in LEFT_OUT if re.search(p, name)), None)
        reason = None if reason == "router" and not name.startswith(routed) else reason
        if reason is None and not name.startswith(f"{path}."):
            reason = "embedding" if re.search(r"embed|wpe", name) else "outside the decoder layers"
        if reason is None and parameter.ndim > 1:
            raise ModelError(f"{name} {list(parameter.shape)} is known neither to be pruned nor to be left")
        left_out.append(LeftOut(name, parameter.numel(), reason or "vector"))
    return tuple(left_out)
