"""Find the layers, attention heads and prunable weights of a model in memory.

There is no file per architecture: layers are found by structure, weights by the table in `roles`, and every
assumption is checked against shapes. What is not understood is an error, never a silent omission.
"""

import copy
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, get_args

import torch
from accelerate import init_empty_weights
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from causalprune.core import Decoder, Layer, LeftOut, ModelError, Projection, Role
from causalprune.models.mixing import check_mixer, mixers_of, setting
from causalprune.models.roles import BESIDE, LEFT_OUT, MIXED, TOWER, Pattern, arranged, matches
from causalprune.models.shards import raw_bytes

_ROLES: tuple[Role, ...] = get_args(Role)
_SHAPE_FIELDS = ["model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
_SHAPE_FIELDS += ["hidden_size", "intermediate_size", "vocab_size"]
_Placed: TypeAlias = tuple[tuple[str, int], Projection]
Whole: TypeAlias = Mapping[str, tuple[int, str]]
"""How many weights of a parameter that is pruned in part stay whole, and why."""
_HEADS = ("Classification", "QuestionAnswering", "RewardModel")
_OTHER = {"paligemma": "lets a prompt see what follows in it", "shieldgemma2": "is a classifier of images"}
"""Types that are something else than their classes say."""
_PRUNES = "causalprune prunes decoder-only language models"


def inspect_model(
    model: PreTrainedModel, tokenizer: Any, *, name: str, revision: str | None = None
) -> Decoder:
    """Find the layers and prunable weights of a model in memory; reads every weight once (hash)."""
    for weight, parameter in model.named_parameters():
        if parameter.is_meta and not has_offloaded_params(model.get_submodule(weight.rpartition(".")[0])):
            raise ModelError(f"{weight} of {name!r} has no values: load it with its weights")
    decoder = outline(model, tokenizer, name=name, revision=revision)
    return replace(decoder, fingerprint=fingerprint(model))


def unfilled(own: type[Any], config: Any, dtype: torch.dtype) -> Any:
    """Return a model of a class whose weights are yet to come; its other buffers have their values."""
    with init_empty_weights(include_buffers=False):
        return own._from_config(config, dtype=dtype)  # noqa: SLF001 (transformers has no other for a class)


def reshaped(decoder: Decoder, model: Any, weights: Mapping[str, Tensor]) -> Decoder:
    """Return an `unfilled` model with these weights as a decoder like the one that it comes from, which is left as it is."""
    own = {weight.untyped_storage().data_ptr() for weight in decoder.model.state_dict().values()}
    copied = {
        name: weight.clone() if weight.untyped_storage().data_ptr() in own else weight
        for name, weight in weights.items()
    }
    model.load_state_dict(copied, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(decoder.model.generation_config)
    model = model.to(decoder.device).eval().requires_grad_(requires_grad=False)
    made = inspect_model(model, decoder.tokenizer, name=decoder.name, revision=decoder.revision)
    return replace(made, source=decoder.source and replace(decoder.source, reshaped=True))


def outline(model: PreTrainedModel, tokenizer: Any, *, name: str, revision: str | None = None) -> Decoder:
    """Find layers and prunable weights by names and shapes alone: the weights may be absent, and are not hashed."""
    check_config(model.config, name)
    for weight, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"{weight} of {name!r} is quantised ({parameter.dtype}): pass the original model"
            )
    if type(model).__name__.endswith(_HEADS):
        raise ModelError(
            f"{name!r} is a {type(model).__name__}, whose head predicts no next tokens; {_PRUNES}"
        )
    path, modules = _decoder_list(model)
    if "shared" in (getattr(model.config.get_text_config(decoder=True), "indexer_types", None) or ()):
        raise ModelError(
            f"{name!r}: layers that share the choices of an indexer with others are not understood"
        )
    config = model.config.get_text_config(decoder=True)
    found = [_layer(config, f"{path}.{i}", i, module) for i, module in enumerate(modules)]
    layers = _each_once(layer for layer, _ in found)
    left_out = _left_out(
        model, layers, path, dict(itertools.chain.from_iterable(own.items() for _, own in found))
    )
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
    digest = hashlib.sha256(repr([(f, setting(config, f)) for f in _SHAPE_FIELDS]).encode())
    for name, dtype, pieces in parts:
        digest.update(f"{name} {dtype} {tuple(model.get_parameter(name).shape)}\n".encode())
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def dtype_in_memory(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a tensor of a model has which is loaded in another: some stay in float32, as routers of mixtures.

    So does what the model's class gives a dtype of its own, unlike that of the `model` as it was built.
    """
    narrow = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
    kept = [own for which in narrow.get(dtype, ()) for own in getattr(model, which, None) or ()]
    wide = any(re.search(re.escape(own).replace(r"\*", ".*"), name) for own in kept)
    owner, _, leaf = name.rpartition(".")
    written = getattr(model.get_submodule(owner), leaf).dtype
    return torch.float32 if wide else dtype if written == model.dtype else written


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


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Raise `ModelError` for a model that is not a decoder with attention heads."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name!r} ({config.model_type}) is an encoder-decoder model; {_PRUNES}")
    if other := [own for own in config.architectures or () if own.endswith(_HEADS)]:
        raise ModelError(f"{name!r} is a {other[0]}, whose head predicts no next tokens; {_PRUNES}")
    text = config.get_text_config(decoder=True)
    if why := _OTHER.get(config.model_type):
        raise ModelError(f"{name!r} ({config.model_type}) {why}; {_PRUNES}")
    if getattr(text, "cross_attention_layers", None):
        raise ModelError(f"{name!r} ({config.model_type}) is a decoder with cross-attention; {_PRUNES}")
    if getattr(text, "prompt_length", None):
        raise ModelError(f"{name!r} ({config.model_type}) puts tokens of its own before a text; {_PRUNES}")
    if type(text) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", False):
        raise ModelError(f"{name!r} ({config.model_type}) is an encoder (masked language model); {_PRUNES}")
    if not getattr(text, "num_hidden_layers", None):
        raise ModelError(f"{name!r} ({config.model_type}) has no num_hidden_layers; {_PRUNES}")


def _match(parameter_name: str) -> tuple[Pattern, re.Match[str]] | None:
    """Return the row of the table for a matrix of a feed-forward."""
    return next(((p, hit) for p, hit in matches(parameter_name) if "mixer" not in hit.groupdict()), None)


def _understood(layer: nn.Module) -> bool:
    """Tell whether something in a layer is known to send to the residual stream."""
    return any(p.roles[-1] in ("o", "down") for name, _ in layer.named_parameters() for p, _ in matches(name))


def _decoder_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the only outermost `ModuleList` of `num_hidden_layers` modules with known parts, outside towers of images or sounds."""
    text = model.config.get_text_config(decoder=True)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    right = {n: m for n, m in lists.items() if len(m) == text.num_hidden_layers}
    found = {n: m for n, m in right.items() if all(_understood(e) for e in m) and not TOWER.search(n)}
    found = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    if len(found) == 1:
        return found.popitem()
    wanted = f"{text.num_hidden_layers} decoder layers"
    if found:
        raise ModelError(f"ambiguous: {', '.join(found)} each hold {wanted}")
    seen = ", ".join(f"{n} ({len(m)})" for n, m in list(lists.items())[:8]) or "none"
    weights = ", ".join(n for m in right.values() for n, _ in m[0].named_parameters())[:400] or "none"
    wanted += ", each with a known output projection"
    raise ModelError(f"{type(model).__name__} has no list of {wanted}; lists: {seen}; weights: {weights}")


def _layer(config: PreTrainedConfig, path: str, index: int, module: nn.Module) -> tuple[Layer, Whole]:
    """Return a layer with its projections in the fixed order, and what of its parameters stays whole in part."""
    mixed = mixers_of(config, path, index, module)
    found: list[_Placed] = [(("", 0), p) for p in mixed.projections]
    for name, parameter in module.named_parameters():
        if (hit := _match(name)) is not None:
            owner = module.get_submodule(name.rpartition(".")[0])
            stored = Projection("", index, hit[0].roles[0], f"{path}.{name}", parameter, owner)
            found += _views(*hit, stored)
    found.sort(key=lambda placed: (placed[0], *_order(placed[1])))
    routed = [p.parameter_name for (group, _), p in found if group == "experts"]
    experts = routed[0].removeprefix(f"{path}.").partition("experts.")[0] + "experts" if routed else None
    n_experts = len({place for place, _ in found if place[0] == "experts"})
    pool, mixture = tuple(p for _, p in found), module.get_submodule(experts) if experts else None
    return Layer(index, path, module, tuple(mixed.mixers), pool, mixture, n_experts), mixed.whole


def _each_once(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Return layers in which a parameter that several share is in the first alone, with the modules of the others."""
    uses: dict[int, list[nn.Module]] = {}
    kept = []
    for layer in layers:
        own = tuple(p for p in layer.projections if id(p.parameter) not in uses)
        for p in {id(p.parameter): p for p in layer.projections}.values():
            uses.setdefault(id(p.parameter), []).append(p.module)
        outputs = [p.module for p in own if p.role == "o"]
        mixers = tuple(mixer for mixer in layer.mixers if mixer.output in outputs)
        kept.append(replace(layer, projections=own, mixers=mixers))
    if all(len(modules) == 1 for modules in uses.values()):
        return tuple(kept)
    found = []
    for layer in kept:
        pool = tuple(replace(p, uses=tuple(uses[id(p.parameter)][1:])) for p in layer.projections)
        found.append(replace(layer, projections=pool))
    return tuple(found)


def _order(p: Projection) -> tuple[bool, bool, int]:
    """Return what projections of a place are sorted by: attention, other mixers, feed-forward."""
    return p.role in ("gate", "up", "down"), p.place == "mixers", _ROLES.index(p.role)


INTERLEAVED = ("GptOssExperts",)
"""Experts whose gate and up projections take turns, which early releases of transformers 5 do not mark."""


def _views(pattern: Pattern, match: re.Match[str], stored: Projection) -> Iterator[_Placed]:
    """Yield the projections that share one stored parameter: its roles, for each expert of a stack."""
    group, expert = (match.groupdict().get(key) or "" for key in ("group", "expert"))
    group = "shared" if group.startswith("shared") else group
    name, module, shape = stored.parameter_name, stored.module, stored.parameter.shape
    stacked = group == "experts" and not expert
    if len(shape) != 2 + stacked or not (stacked or isinstance(module, nn.Linear | Conv1D)):
        raise ModelError(f"{name} of shape {list(shape)} in a {type(module).__name__} is not known")
    transposed = _transposed(module) if stacked else isinstance(module, Conv1D)
    n_rows = shape[-1 if transposed else -2]
    # transformers' `use_experts_implementation` marks stacks that are interleaved
    plain = len(pattern.roles) == 1 or getattr(
        module, "is_concatenated", type(module).__name__ not in INTERLEAVED
    )
    sizes, times = ([n_rows // len(pattern.roles)], 1) if plain else ([1], n_rows // 2)
    rows = arranged(pattern.roles, sizes * len(pattern.roles), times)
    for e in range(shape[0]) if stacked else [int(expert or 0)]:
        place = {"": "", "experts": f"experts.{e}."}.get(group, f"{group}.")
        for role in pattern.roles:
            own, number = rows[role] if len(pattern.roles) > 1 else None, e if stacked else None
            view = f"layers.{stored.layer}.{place}{role}", stored.layer, role, name, stored.parameter, module
            yield (group, e), Projection(*view, transposed, own, number)


def _transposed(experts: Any) -> bool:
    """Tell whether stacked experts are stored as `[in out]`: as they are marked, or by which widths they share."""
    if hasattr(experts, "is_transposed") or not hasattr(experts, "gate_up_proj"):
        return bool(getattr(experts, "is_transposed", False))
    inner, outer = experts.gate_up_proj.shape[-2:], experts.down_proj.shape[-2:]
    return bool(inner[1] == 2 * outer[0] and inner[0] == outer[1])


def _check_layer(layer: Layer) -> None:
    """Check that mixers and every MLP or expert are complete and of consistent shapes."""
    parts = dict[str, dict[Role, Projection]]()
    for projection in layer.projections:
        place, part = projection.name.rpartition(".")[0], "attention"
        if projection.role in ("gate", "up", "down") or place.endswith(".mixer"):
            part = place
        other = parts.setdefault(part, {}).setdefault(projection.role, projection)
        if other is not projection:
            raise ModelError(
                f"{projection.parameter_name} and {other.parameter_name} are both {other.role!r}"
            )
    width = next((p.shape[0] for p in layer.projections if p.role in ("o", "down")), 0)
    for mixer in layer.mixers:
        part = "attention" if mixer.place == "heads" else f"layers.{layer.index}.mixer"
        check_mixer(mixer, parts.pop(part), layer.name, width)
    for part, roles in parts.items():
        if set(roles) - {"gate"} != {"up", "down"}:
            raise ModelError(f"{layer.name}: {part} is not (gate), up, down but {[*roles]}")
        model, inner = roles["up"].shape[1], roles["down"].shape[1]
        shapes: dict[Role, tuple[int, int]] = {
            "gate": (inner, model),
            "up": (inner, model),
            "down": (width, inner),
        }
        for role, projection in roles.items():
            if projection.shape != shapes[role]:
                name, wanted = projection.parameter_name, shapes[role]
                raise ModelError(f"{name}, as {role}, is {projection.shape} [out in] instead of {wanted}")
    if not layer.projections:
        raise ModelError(f"{layer.name} has nothing that causalprune knows")


def _left_out(model: Any, layers: tuple[Layer, ...], path: str, whole: Whole) -> tuple[LeftOut, ...]:
    """Return every parameter outside the pool with its reason; a matrix without one is an error."""
    pool: Counter[str] = Counter()
    for projection in (p for layer in layers for p in layer.projections):
        pool[projection.parameter_name] += projection.size
    routed = tuple(f"{layer.name}." for layer in layers if layer.n_experts)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    reasons = {id(p): "output head" for p in (head.parameters() if head is not None else ())}
    reasons |= {id(p): "embedding" for p in embedding.parameters()}
    left_out = []
    names = {id(module): name for name, module in model.named_modules()}
    mixers = [f"{names[id(mixer.module)]}." for layer in layers for mixer in layer.mixers]
    for name, parameter in _parameters(model):
        if pool[name] == parameter.numel():
            continue
        if pool[name]:
            size, why = whole.get(name, (0, ""))
            if pool[name] + size != parameter.numel():
                raise ModelError(f"{name}: {pool[name]} of its {parameter.numel()} weights understood")
            left_out.append(LeftOut(name, size, why))
            continue
        reason = reasons.get(id(parameter)) or next((r for p, r in LEFT_OUT if re.search(p, name)), None)
        reason = reason or _stays_whole(name, mixers)
        reason = None if reason == "router" and not name.startswith(routed) else reason
        if reason is None and not name.startswith(f"{path}."):
            reason = "embedding" if re.search(r"embed|wpe", name) else "outside the decoder layers"
        if reason is None and parameter.ndim > 1:
            raise ModelError(f"{name} {list(parameter.shape)} is known neither to be pruned nor to be left")
        left_out.append(LeftOut(name, parameter.numel(), reason or "vector"))
    return tuple(left_out)


def _stays_whole(name: str, mixers: list[str]) -> str | None:
    """Return why a matrix in a layer is left alone, None where that is not known."""
    place = next((own for own in mixers if name.startswith(own)), None)
    if place is not None:
        inner = name.removeprefix(place)
        return next((reason for pattern, reason in MIXED if re.search(pattern, inner)), None)
    return next((reason for pattern, reason in BESIDE if re.search(pattern, name)), None)
