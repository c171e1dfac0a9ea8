"""What a user wants to know of a model before pruning it; its weights may be absent."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

from causalprune.core import Decoder, Layer, Mixer, Role

_UNITS = {"heads": "heads", "mixers": "heads or groups of channels of another mixer"}


def summary(decoder: Decoder) -> dict[str, Any]:
    """Return shapes, counts, what is prunable, what stays whole and why, and about what pruning takes.

    Where the model has no weights, it says nothing of fingerprint and device.
    """
    parameters = list(decoder.model.parameters())
    by_role = dict.fromkeys(get_args(Role), 0)
    for p in decoder.projections:
        by_role[p.role] += p.size
    reasons: dict[str, dict[str, int]] = {}
    for left in decoder.left_out:
        entry = reasons.setdefault(left.reason, {"parameters": 0, "weights": 0})
        entry["parameters"] += 1
        entry["weights"] += left.size
    widths = {p.name.split(".")[2]: p.shape[1] for p in decoder.projections if p.role == "down"}
    first = {m.place: m for layer in reversed(decoder.layers) for m in layer.mixers}
    attention, other, head = first.get("heads"), first.get("mixers"), decoder.model.get_output_embeddings()
    weights = (
        {"device": str(decoder.device), "fingerprint": decoder.fingerprint} if decoder.fingerprint else {}
    )
    return {
        "name": decoder.name,
        "model_type": decoder.model.config.model_type,
        "layers": len(decoder.layers),
        "heads": attention and attention.n_heads,
        "kv_heads": attention and attention.n_kv_heads,
        "head_width": attention and attention.head_dim,
        **({"mixers": other.n_heads, "mixer_width": other.head_dim} if other else {}),
        "mlp_width": widths.get("down"),
        "experts": max(layer.n_experts for layer in decoder.layers),
        "expert_width": widths.get("experts"),
        "shared_expert_width": widths.get("shared"),
        "layer_types": dict(Counter(_kind(layer) for layer in decoder.layers)),
        "total_parameters": sum(p.numel() for p in parameters),
        "prunable_weights": sum(by_role.values()),
        "prunable_by_role": {role: size for role, size in by_role.items() if size},
        "left_out": reasons,
        "pruning_gb": _needs(decoder),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "tied_embeddings": head is not None and head.weight is decoder.model.get_input_embeddings().weight,
        **weights,
    }


def _kind(layer: Layer) -> str:
    """Return in words what a layer consists of."""
    widths = {p.name.split(".")[2]: p.shape[1] for p in layer.projections if p.role == "down"}
    parts = [_mixer(mixer) for mixer in layer.mixers]
    parts += [f"MLP of {widths['down']}"] if "down" in widths else []
    parts += [f"{layer.n_experts} experts of {widths['experts']}"] if "experts" in widths else []
    parts += [f"shared expert of {widths['shared']}"] if "shared" in widths else []
    return ", ".join(parts) or "nothing but norms"


def _mixer(mixer: Mixer) -> str:
    groups = f", {mixer.n_kv_heads} of keys" if mixer.n_kv_heads != mixer.n_heads else ""
    return f"{mixer.n_heads} {_UNITS[mixer.place]} of {mixer.head_dim}{groups}"


def _needs(decoder: Decoder) -> Mapping[str, Mapping[str, float]]:
    """Return about how many GB a method takes, activations apart: in memory, streamed, and on disk for what comes out."""
    parameters = list(decoder.model.parameters())
    width = parameters[0].element_size()
    every = sum(p.numel() for p in parameters) * width
    pool = sum(p.size for p in decoder.projections)
    layers = [sum(p.numel() for p in layer.module.parameters()) * width for layer in decoder.layers]
    frame = every - sum(layers)
    moments = max(4 * sum(n * n for n in _inputs(layer)) for layer in decoder.layers)
    biggest = max(p.size for p in decoder.projections)
    solving = moments + 12 * biggest
    found = {
        "magnitude": (every + pool, 3 * biggest * width),
        "wanda": (every + pool, frame + max(layers)),
        "sparsegpt": (every + pool + solving, frame + max(layers) + solving),
        "causal": (every + pool + solving + pool * width, None),
    }
    rounded = {
        name: {
            "memory": memory / 1e9,
            **({} if stream is None else {"streamed": stream / 1e9}),
            "disk": (every + pool / 8) / 1e9,
        }
        for name, (memory, stream) in found.items()
    }
    return {name: {key: round(value, 3) for key, value in own.items()} for name, own in rounded.items()}


def _inputs(layer: Layer) -> list[int]:
    """Return the widths of the inputs whose second moments are gathered, one for all matrices that read the same."""
    readers = {"q": "in", "k": "in", "v": "in", "g": "in", "q_a": "in", "kv_a": "in", "gate": "up"}
    return list(
        {
            (p.name.rpartition(".")[0], readers.get(p.role, p.role)): p.shape[1] for p in layer.projections
        }.values()
    )
