"""Llamas whose layers have widths of their own, as llama.cpp runs them: under its architecture `deci`.

No class of transformers holds such a model. What is zero as a whole is left out: it adds nothing to any sum, so that the same
is computed. A neuron is dead where its rows of gate or up, or its column of down, are all zero; the heads that share keys
and values where what they send is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from causalprune.core import ModelError
from causalprune.shipping.files import (
    LAYERS,
    Importance,
    complete_file,
    copy_fields,
    field,
    read_rows,
    shape_of,
)

STEP = 32
"""Neurons are kept by so many, dead ones too where they fill the last step: quantised rows need it."""
DECI = "deci"
_COUNTS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
_MLP = ("ffn_gate", "ffn_up", "ffn_down", "ffn_norm")
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm")


@dataclass(frozen=True)
class Layer:
    """What stays of a layer: indices of its neurons, and of what its query heads and its KV heads send."""

    neurons: Int[ndarray, "_"]
    queries: Int[ndarray, "_"]
    keys: Int[ndarray, "_"]
    heads: tuple[int, int]

    def index(self, name: str) -> tuple[int, Int[ndarray, "_"]] | None:
        """Return along which axis of a tensor of the layer what stays; None for one that stays as it is."""
        rows = {
            "ffn_gate": self.neurons,
            "ffn_up": self.neurons,
            "attn_q": self.queries,
            "attn_k": self.keys,
            "attn_v": self.keys,
        }
        columns = {"ffn_down": self.neurons, "attn_output": self.queries}
        part, end = name.split(".")[2:]
        if part in columns and end == "weight":
            return 1, columns[part]
        return (0, rows[part]) if part in rows else None

    def gone(self, name: str) -> bool:
        """Tell whether nothing of a tensor stays."""
        return not self.heads[0] and name.split(".")[2] in _ATTENTION


def compacted(reader: Any, target: Path) -> dict[int, Layer]:
    """Write a Llama of unquantised weights without what is dead in it, and return what stayed, by layer.

    Raises:
        ModelError: it is no Llama, or nothing in it is dead.
    """
    from gguf import GGUFValueType, GGUFWriter  # noqa: PLC0415  an extra

    own = str(field(reader, "general.architecture"))
    if own != "llama" or field(reader, "llama.expert_count"):
        raise ModelError(
            f"llama.cpp runs layers of different widths in dense Llamas alone, not in {own}: leave out --uneven"
        )
    tensors = {t.name: t for t in reader.tensors}
    heads = int(field(reader, "llama.attention.head_count"))
    groups = int(field(reader, "llama.attention.head_count_kv"))
    width = int(
        field(reader, "llama.attention.key_length") or field(reader, "llama.embedding_length") // heads
    )
    kept = {
        i: _kept(tensors, i, heads, groups, width) for i in range(int(field(reader, "llama.block_count")))
    }
    if biases := [name for name in tensors if name.startswith(LAYERS) and name.endswith(".bias")]:
        raise ModelError(
            f"{biases[0]} and {len(biases) - 1} other biases: what is zero as a whole may still send something: leave out --uneven"
        )
    whole = int(field(reader, "llama.feed_forward_length"))
    if all(len(layer.neurons) == whole and layer.heads[1] == groups for layer in kept.values()):
        raise ModelError(
            "no neuron, head or layer is zero as a whole, so that nothing can be left out: leave out --uneven"
        )
    counts = zip(*((len(layer.neurons), *layer.heads) for layer in kept.values()), strict=True)
    with complete_file(target) as temporary:
        writer = GGUFWriter(temporary, DECI)
        copy_fields(reader, writer, {f"{own}.{count}" for count in _COUNTS}, {f"{own}.": f"{DECI}."})
        for name, value in zip(_COUNTS, counts, strict=True):
            writer.add_key_value(f"{DECI}.{name}", [*value], GGUFValueType.ARRAY, GGUFValueType.INT32)
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if field(reader, f"{own}.{name}") is None:
                writer.add_uint32(f"{DECI}.{name}", width)
        for tensor in reader.tensors:
            layer = kept[int(tensor.name.split(".")[1])] if tensor.name.startswith(LAYERS) else None
            if layer is None or not layer.gone(tensor.name):
                writer.add_tensor(tensor.name, _cut(tensor, layer))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return kept


def _kept(tensors: Mapping[str, Any], layer: int, heads: int, groups: int, width: int) -> Layer:
    """Return what stays of a layer."""
    gate, up, down, out = (
        _read(tensors[f"blk.{layer}.{part}.weight"]) for part in (*_MLP[:3], "attn_output")
    )
    live = np.asarray(gate.any(1) & up.any(1) & down.any(0))
    most = min(-(-int(live.sum()) // STEP) * STEP or STEP, len(live))
    neurons = np.sort(np.argsort(~live, kind="stable")[:most])
    sends, values = out.any(0), _read(tensors[f"blk.{layer}.attn_v.weight"])
    sent = np.asarray(sends.reshape(groups, -1).any(1) & values.reshape(groups, -1).any(1))
    if layer == 0 and not sent.any():
        sent[0] = True  # llama.cpp works out the width of a head from the first layer
    each = heads // groups
    queries, keys = (np.flatnonzero(np.repeat(sent, size)) for size in (each * width, width))
    return Layer(neurons, queries, keys, (int(sent.sum()) * each, int(sent.sum())))


def _read(tensor: Any) -> Float[ndarray, "row in"]:
    return np.concatenate([*read_rows(tensor)]).reshape(shape_of(tensor))


def _cut(tensor: Any, layer: Layer | None) -> ndarray:
    """Return what stays of a tensor, in float32: quantising comes after."""
    weights = _read(tensor)
    index = layer.index(tensor.name) if layer is not None else None
    return np.ascontiguousarray(weights if index is None else weights.take(index[1], axis=index[0]))


def cut_importance(importance: Importance, kept: Mapping[int, Layer]) -> Importance:
    """Return the importance of the inputs that stay."""
    found = dict(importance)
    for i, layer in kept.items():
        for part, index in (("ffn_down", layer.neurons), ("attn_output", layer.queries)):
            if (own := found.get(name := f"blk.{i}.{part}.weight")) is not None:
                found[name] = own[:, index]
    return found
