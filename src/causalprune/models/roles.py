"""The table of roles: what names of parameters mean where shapes alone cannot tell, and what is never pruned.

A family needs a row only for a name, or an order of fused rows, that no other family has.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from causalprune.core import Role

Rows: TypeAlias = slice | Int[Tensor, "out"] | None


class Pattern(NamedTuple):
    """One row of `PATTERNS`: which roles the parameters whose path in a layer matches play.

    Several roles share one matrix in the order of `layout`, a key of `ORDERS`. Such an order cannot be read off the
    shapes, so fused attention is accepted only for the model types it was checked for; what is fused in other mixers
    is told by what stands beside it (`beside`: an ending of another parameter's path in the mixer).
    """

    path: str
    roles: tuple[Role, ...]
    layout: str = "blocks"
    model_types: frozenset[str] | None = None
    beside: str | None = None


_IN = r"(?:shared_transf(?:ormer)?\.|mamba_decoder\.)?"
_MIXER = (
    _IN
    + r"(?P<mixer>(?:self_attn|attn|attention|self_attention|multi_head_attention|self_att\.self_attention"
)
_MIXER += r"|linear_attn|mamba|mixer|conv|temporal_block)(?:\.attention)?)\."
_MLP = _IN + r"(?:(?:mlp|feed_forward|ffn(?:\.ffn)?|block_sparse_moe|moe|mlp_block|mixer)\.)?"
_MLP += r"(?:(?P<group>experts|shared_experts?|shared_mlp)\.(?:(?P<expert>\d+)\.)?)?"
_PER_HEAD = frozenset({"gpt_neox", "bloom", "persimmon", "gpt_neox_japanese"})
PATTERNS = (
    Pattern(_MIXER + r"(?:q_proj|Wq|project_q)", ("q",)),
    Pattern(_MIXER + r"(?:k_proj|Wk|project_k)", ("k",)),
    Pattern(_MIXER + r"(?:v_proj|Wv|project_v|linear_x)", ("v",)),
    Pattern(_MIXER + r"(?:o_proj|out_proj|c_proj|dense|Wo|attention_out|linear_out)", ("o",)),
    Pattern(_MIXER + r"q_a_proj", ("q_a",)),
    Pattern(_MIXER + r"q_b_proj", ("q_b",)),
    Pattern(_MIXER + r"kv_a_proj_with_mqa", ("kv_a",)),
    Pattern(_MIXER + r"kv_b_proj", ("kv_b",)),
    Pattern(_MIXER + r"(?:gate_proj|g_proj|output_gate|in_proj_z|linear_y)", ("g",)),
    Pattern(_MIXER + r"qkv_proj", ("q", "k", "v"), "blocks", frozenset({"phi3", "phi4_multimodal"})),
    Pattern(_MIXER + r"qkv_proj", ("q", "k", "v"), "per head", frozenset({"minimax"})),
    Pattern(_MIXER + r"qkv_proj", ("q", "v", "k"), "per quarter", frozenset({"codegen"})),
    Pattern(_MIXER + r"c_attn", ("q", "k", "v"), "blocks", frozenset({"gpt2", "openai-gpt"})),
    Pattern(_MIXER + r"c_attn", ("q", "k", "v"), "blocks or per head", frozenset({"gpt_bigcode"})),
    Pattern(_MIXER + r"Wqkv", ("q", "k", "v"), "blocks", frozenset({"mpt", "dbrx"})),
    Pattern(_MIXER + r"query_key_value", ("q", "k", "v"), "per head", _PER_HEAD),
    Pattern(_MIXER + r"query_key_value", ("q", "k", "v"), "as Falcon", frozenset({"falcon"})),
    Pattern(_MIXER + r"in_proj_qkv", ("q", "k", "v"), "blocks"),
    Pattern(_MIXER + r"in_proj_qkvz", ("q", "k", "v", "g"), "per key"),
    Pattern(_MIXER + r"in_proj", ("v", "g"), "blocks", None, "x_proj.weight"),
    Pattern(_MIXER + r"in_proj", ("v", "g"), "interleaved", None, "x_proj_weight"),
    Pattern(_MIXER + r"in_proj", ("g", "v", "k", "q"), "blocks", None, "dt_bias"),
    Pattern(_MIXER + r"in_proj", ("k", "q", "v"), "blocks", None, "conv.weight"),
    Pattern(_MLP + r"(?:gate_proj|w1|w_in\.w_0)", ("gate",)),
    Pattern(_MLP + r"(?:up_proj|w3|c_fc|fc1|fc_in|dense_h_to_4h|w_in\.w_1|0)", ("up",)),
    Pattern(_MLP + r"(?:gate_up_proj|Wi|input_linear)", ("gate", "up")),
    Pattern(_MLP + r"(?:down_proj|w2|c_proj|fc2|fc_out|dense_4h_to_h|w_out|Wo|output_linear|2)", ("down",)),
)

LEFT_OUT = (
    (r"bias$", "bias"),
    (r"(?:norm\w*|(?:^|\.)ln_\w+)\.weight$", "norm"),
    (r"(?:^|\.)(?:gate|router|shared_expert_gate)\.(?:\w+\.)?weight$", "router"),
)
MIXED = (
    (r"^(?:\w+\.)*?(?:s?conv1?d?|conv_1d|conv)\.weight$", "convolution"),
    (r"^indexer\.", "indexer of sparse attention"),
    (r"^(?:in_proj_(?:ba|a|b)|[ab]_proj|x_proj|dt_proj|g_[ab]_proj)\.weight$", "decay or gate of low rank"),
    (r"^(?:x_proj_weight|dt_proj_weight|A_log|D|sinks)$", "state space"),
    (r"^(?:rg_lru|forget_gate)\.", "decay or gate of low rank"),
)
"""What stays whole in a mixer, by paths in it."""
BESIDE = (
    (r"\.(?:per_layer_input_gate|per_layer_projection)\.weight$", "per-layer embedding"),
    (r"\.(?:altup|laurel)\.", "AltUp or LAuReL"),
    (r"_adapter_list\.", "adapter of one use of a shared block"),
    (
        r"\.(?:shared_transformer|shared_transf)\.linear\.weight$|\.\d+\.linear\.weight$",
        "joint of a shared block",
    ),
    (r"\.(?:attn_hc|ffn_hc)\.fn$", "hyper-connection"),
)
"""What stays whole in a layer beside mixers and feed-forwards."""
TOWER = re.compile(r"(?:^|\.)\w*(?:vision|visual|image|img|audio|speech|video|resampler)\w*\.")
"""Paths of what is made for images and sounds, beside the language model."""
LINEAR = re.compile(r"(?:forget_gate\.)?A_log|(?:conv1d|conv_1d|conv|output_gate)\.weight")
"""Paths in a mixer of parameters that attention never has."""


@cache
def matches(parameter_name: str) -> Sequence[tuple[Pattern, re.Match[str]]]:
    """Return all rows of the table that a path in a layer fits, which differ in where they apply."""
    path = parameter_name.removesuffix(".weight")
    return [(p, hit) for p in PATTERNS if (hit := re.fullmatch(p.path, path))]


def arranged(roles: Sequence[Role], sizes: Sequence[int], times: int) -> dict[Role, Rows]:
    """Return which rows belong to each role where blocks of these sizes stand in a row, so many `times`."""
    if times == 1:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return {role: slice(end - size, end) for role, size, end in zip(roles, sizes, ends, strict=True)}
    if set(sizes) == {1}:
        return {role: slice(i, times * len(roles), len(roles)) for i, role in enumerate(roles)}
    table = torch.arange(times * sum(sizes)).view(times, -1).split(list(sizes), 1)
    return {role: part.flatten() for role, part in zip(roles, table, strict=True)}
