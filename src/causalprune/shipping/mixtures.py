"""Which tensor of a GGUF file gets which type in a mix such as Q4_K_M: the rules of llama.cpp (`src/llama-quant.cpp`, b10605).

A mix has one type for most matrices, and more bits where llama.cpp has found that they matter. Types are named as GGUF
names them, in capitals; a mix as `llama-quantize` names it, in small letters.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from causalprune.core import ModelError

MIXES: Mapping[str, tuple[str, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q6_k": ("Q6_K", 18),
    "q5_k_m": ("Q5_K", 17),
    "q5_k_s": ("Q5_K", 16),
    "q5_1": ("Q5_1", 9),
    "q5_0": ("Q5_0", 8),
    "q4_k_m": ("Q4_K", 15),
    "q4_k_s": ("Q4_K", 14),
    "q4_1": ("Q4_1", 3),
    "q4_0": ("Q4_0", 2),
    "iq4_nl": ("IQ4_NL", 25),
    "iq4_xs": ("IQ4_XS", 30),
    "q3_k_l": ("Q3_K", 13),
    "q3_k_m": ("Q3_K", 12),
    "q3_k_s": ("Q3_K", 11),
    "iq3_m": ("IQ3_S", 27),
    "iq3_s": ("IQ3_S", 26),
    "iq3_xs": ("IQ3_S", 22),
    "iq3_xxs": ("IQ3_XXS", 23),
    "q2_k": ("Q2_K", 10),
    "q2_k_s": ("Q2_K", 21),
}
"""The type of most matrices, and the number of the mix in files, from more bits to fewer."""

PLAIN = ("F32", "F16", "BF16")
FALLBACK = {
    **dict.fromkeys(("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a type becomes where its blocks of 256 do not divide the width of rows: one of blocks of 32."""
BY_IMPORTANCE = ("IQ2_S", "IQ3_XXS")
"""Types that take an importance matrix; Q2_K does too in the mix q2_k_s."""

_LEFT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{own}.weight" for own in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
)  # fmt: skip
"""Parts of names of matrices that are never quantised, as position and token types."""
_KINDS = {
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_q.weight": "query",
    "attn_output.weight": "output",
    "ffn_up": "up",
    "ffn_gate": "gate",
    "ffn_down": "down",
}


class Shape(NamedTuple):
    """What the rules ask of a model: the layers, the query heads on a KV head, the experts, and whether an importance matrix is there."""

    architecture: str
    layers: int
    per_group: int
    experts: int = 0
    weighted: bool = False


class At(NamedTuple):
    """Where a matrix stands: in the i-th of n layers (of those with such a matrix, for values)."""

    i: int
    n: int
    shape: Shape

    @property
    def first(self) -> bool:
        """Whether it is in the first eighth."""
        return self.i < self.n // 8

    @property
    def outer(self) -> bool:
        """Whether it is in the first or the last eighth, or every third between: `use_more_bits`."""
        return self.first or self.i >= 7 * self.n // 8 or (self.i - self.n // 8) % 3 == 2

    @property
    def wide(self) -> bool:
        """Whether four or more query heads share a KV head."""
        return self.shape.per_group >= 4

    @property
    def falcon(self) -> bool:
        """Whether it is a Falcon, which has rules of its own."""
        return self.shape.architecture == "falcon"


Rule = Callable[[At], str | None]


def _middle(at: At) -> str | None:
    return "IQ3_XXS" if at.n // 8 <= at.i < 7 * at.n // 8 else None


def _down_q4_k_m(at: At) -> str | None:
    if not at.falcon:
        return "Q6_K" if at.outer else None
    return "Q6_K" if at.i < at.n // 16 else "Q5_K" if at.outer else "Q4_K"


def _down_q3_k_m(at: At) -> str:
    more = "Q4_K" if not at.falcon or at.outer else "Q3_K"
    return "Q5_K" if at.i < at.n // 16 else more


_EIGHT = (
    "q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_xs",
)  # fmt: skip
_RULES: Mapping[str, Mapping[str, Rule]] = {
    "value": {
        "q2_k": lambda at: "Q4_K" if at.wide else "Q3_K",
        "iq3_xxs": lambda at: "Q4_K" if at.wide else None if at.shape.weighted else "IQ3_S",
        **dict.fromkeys(("q2_k_s", "iq3_xs", "iq3_s"), lambda at: "Q4_K" if at.wide else None),
        "iq3_m": lambda at: "Q4_K",
        "q3_k_m": lambda at: "Q5_K" if at.i < 2 else "Q4_K",
        "q3_k_l": lambda at: "Q5_K",
        **dict.fromkeys(("iq4_nl", "iq4_xs"), lambda at: "Q5_K" if at.wide else None),
        **dict.fromkeys(("q4_k_m", "q5_k_m"), lambda at: "Q6_K" if at.outer else None),
        "q4_k_s": lambda at: "Q5_K" if at.i < 4 else None,
    },
    "down": {
        "q2_k": lambda at: "Q3_K",
        "q2_k_s": lambda at: "Q4_K" if at.first else None,
        "iq3_xxs": lambda at: None if at.shape.weighted else "Q4_K" if at.first else "Q3_K",
        "iq3_m": lambda at: "Q4_K" if at.first or (at.shape.experts == 8 and at.outer) else None,
        "q3_k_m": _down_q3_k_m,
        "q3_k_l": lambda at: "Q4_K" if at.falcon else "Q5_K",
        "q4_k_m": _down_q4_k_m,
        "q4_k_s": lambda at: "Q5_K" if at.first and not at.falcon else None,
        "q5_k_m": lambda at: "Q6_K" if at.outer else None,
        **dict.fromkeys(
            ("iq4_nl", "iq4_xs"), lambda at: "Q5_K" if at.first and not at.shape.weighted else None
        ),
        "q4_0": lambda at: "Q4_1" if at.first and at.shape.weighted else None,
        "q5_0": lambda at: "Q5_1" if at.first and at.shape.weighted else None,
    },
    "output": {
        "q2_k": lambda at: None if at.falcon else "Q3_K",
        "iq3_xxs": lambda at: None if at.falcon else "IQ3_S",
        "q3_k_m": lambda at: None if at.falcon else "Q4_K",
        "q3_k_l": lambda at: "Q4_K" if at.falcon else "Q5_K",
        "iq3_m": lambda at: None if at.falcon else "Q4_K",
    },
    **{key: {"iq3_xs": lambda at: "IQ3_XXS", "iq3_xxs": lambda at: "IQ2_S"} for key in ("key", "query")},
    **{key: {"iq3_xs": _middle} for key in ("gate", "up")},
}
"""What a matrix gets in a mix in place of the mix's own type, by what it is."""


def types_of(sizes: Mapping[str, tuple[int, ...]], mix: str, shape: Shape) -> dict[str, str | None]:
    """Return the type of every tensor of these names and shapes (rows last); None where it stays as it is stored.

    Raises:
        ModelError: a matrix has rows that the mix's type cannot hold.
    """
    tied, base = "output.weight" not in sizes, MIXES[mix][0]
    kinds = {name: _kind(name, tied=tied) for name in sizes}
    values = sum(kind == "value" for kind in kinds.values())
    found, seen = dict.fromkeys(sizes, None) | {}, dict.fromkeys(("value", "down", "gate", "up"), 0)
    for name in sorted(sizes, key=_in_file):
        if not _is_quantised(name, sizes[name]):
            continue
        kind, block = kinds[name], _block(base)
        at = At(*_place(name, kind, seen, values, shape), shape)
        own = base
        if base in PLAIN:
            found[name] = own
            continue
        if kind == "head":
            own = _head(base, mix, at, sizes[name][-1] % block == 0)
        elif kind == "embedding":
            own = "IQ3_S" if mix == "iq3_xxs" else base
        elif kind is not None:
            own = _ruled(kind, mix, at, base)
        seen[kind or ""] = seen.get(kind or "", 0) + 1
        found[name] = _fitting(name, own, sizes[name][-1])
    return found


def _ruled(kind: str, mix: str, at: At, base: str) -> str:
    """Return the type of a matrix in a layer."""
    rule = _RULES[kind].get(mix)
    own = (rule(at) if rule else None) or base
    eight = at.shape.experts == 8
    if kind == "value" and _is_70b(at.shape) and own in ("Q3_K", "Q4_K"):
        own = "Q5_K"
    if eight and kind in ("value", "key"):
        own = "Q8_0"
    if eight and kind == "output" and not at.falcon:
        own = "Q5_K" if mix in _EIGHT else base
    return own


def _head(base: str, mix: str, at: At, fits: bool) -> str:
    """Return the type of the matrix that makes the logits."""
    if at.falcon or not fits:
        return "Q8_0"
    return "Q5_K" if mix == "iq3_xxs" else base if base == "Q8_0" else "Q6_K"


def _fitting(name: str, own: str, width: int) -> str:
    """Return the type, or what llama.cpp takes in its place for rows of this width."""
    if width % _block(own) == 0:
        return own
    if own not in FALLBACK:
        raise ModelError(
            f"{name} has rows of {width}, which blocks of {_block(own)} do not divide: llama.cpp cannot store it as {own}; "
            "f32, f16 and bf16 hold rows of any width"
        )
    other = FALLBACK[own]
    return other if width % _block(other) == 0 else "F16"


def _block(own: str) -> int:
    """Return how many weights share a scale."""
    if own in PLAIN:
        return 1
    return 32 if re.fullmatch(r"Q\d_[01]|IQ4_NL", own) else 256


def _is_70b(shape: Shape) -> bool:
    return shape.layers == 80 and (
        shape.architecture in ("qwen2", "deci", "olmo")
        or (shape.architecture == "llama" and shape.per_group != 1)
    )


def _is_quantised(name: str, size: tuple[int, ...]) -> bool:
    own = name not in ("position_embd.weight", "token_types.weight") and not any(
        part in name for part in _LEFT
    )
    return own and name.endswith("weight") and any(n > 1 for n in size[:-1])  # more than one row


def _kind(name: str, *, tied: bool) -> str | None:
    """Return what a tensor is, by its name: head and embedding, or one of `_RULES`."""
    if name == "output.weight":
        return "head"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "head" if tied else "embedding"
    return next((kind for part, kind in _KINDS.items() if part in name), None)


def _place(
    name: str, kind: str | None, seen: Mapping[str, int], values: int, shape: Shape
) -> tuple[int, int]:
    """Return which of how many such matrices it is; in a mixture of experts the layer counts, but for values."""
    if kind == "value":
        return seen["value"], values
    counted = _in_file(name)[0] if shape.experts > 1 else seen.get(kind or "", 0)
    return counted, shape.layers


def _in_file(name: str) -> tuple[int, str]:
    """Return what tensors are sorted by: the layer, and the name."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1, name


def need_importance(types: Mapping[str, str | None], mix: str) -> Iterable[str]:
    """Return the tensors that cannot be quantised without an importance matrix."""
    own = (*BY_IMPORTANCE, "Q2_K") if mix == "q2_k_s" else BY_IMPORTANCE
    return [name for name, kind in types.items() if kind in own and name.startswith("blk.")]
