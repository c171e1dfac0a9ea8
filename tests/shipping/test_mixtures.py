"""Which tensor gets which type: the table agrees with llama.cpp's own snapshots, which come in the converter's wheel."""

import re

import pytest

from causalprune.core.errors import ModelError
from causalprune.shipping import converting
from causalprune.shipping.mixtures import MIXES, Shape, need_importance, types_of

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
EXPERT = 1408
"""Width of the experts of GLM-4.6V, which its snapshot does not say."""
ARCHITECTURES = {
    "qwen3-0.6b": "qwen3",
    "qwen3-14b": "qwen3",
    "meta-llama-3.1-70b-instruct": "llama",
    "gemma-3-4b-it": "gemma3",
    "glm-4.6v": "glm4moe",
}


def snapshot(name: str) -> tuple[dict[str, int], dict[str, dict[str, str]]]:
    """Return the numbers of a model, and by mix what differs from the type of most matrices."""
    folder = converting.home() / "tests" / "snapshots"
    text = (folder / f"{name}.schema").read_text(encoding="utf-8")
    numbers = {key: int(value) for key, value in re.findall(r"(n_\w+)=(\d+)", text)}
    mixes = {}
    for head, body in re.findall(r"^\[(\w+)\] \w+\n((?:\S+ \S+\n)*)", text, re.MULTILINE):
        mixes[head.lower()] = dict(line.split() for line in body.splitlines())
    return numbers, mixes


def tensors(numbers: dict[str, int], *, tied: bool) -> dict[str, tuple[int, ...]]:
    width, experts = numbers["n_embd"], numbers.get("n_expert", 0)
    sizes: dict[str, tuple[int, ...]] = {"token_embd.weight": (numbers["n_vocab"], width)}
    sizes |= {} if tied else {"output.weight": (numbers["n_vocab"], width)}
    for i in range(numbers["n_layer"]):
        sizes |= {f"blk.{i}.{part}.weight": (width, width) for part in ATTENTION}
        sizes |= {f"blk.{i}.attn_norm.weight": (width,), f"blk.{i}.ffn_gate_inp.weight": (experts, width)}
        inner = EXPERT if experts and i > 0 else numbers["n_ff"]
        for end in ("_exps", "_shexp") if experts and i > 0 else ("",):
            sizes |= {f"blk.{i}.{part}{end}.weight": (inner, width) for part in ("ffn_gate", "ffn_up")}
            sizes |= {f"blk.{i}.ffn_down{end}.weight": (width, inner)}
    return sizes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_types_are_as_llama_cpp_chooses_them(name: str) -> None:
    numbers, mixes = snapshot(name)
    sizes = tensors(numbers, tied=name.startswith("gemma"))
    shape = Shape(
        ARCHITECTURES[name],
        numbers["n_layer"],
        numbers["n_head"] // numbers["n_head_kv"],
        numbers.get("n_expert", 0),
    )
    for mix, (base, _) in MIXES.items():
        ours = {key: own for key, own in types_of(sizes, mix, shape).items() if own not in (None, base)}
        theirs = {key: own.upper() for key, own in mixes[mix].items() if key in sizes}
        assert ours == theirs, mix


def test_rows_that_no_block_divides_fall_back() -> None:
    shape = Shape("llama", 1, 1)
    of = {width: types_of({"blk.0.attn_k.weight": (8, width)}, "q4_k_m", shape) for width in (512, 96, 40)}
    assert [found["blk.0.attn_k.weight"] for found in of.values()] == ["Q4_K", "Q5_0", "F16"]
    with pytest.raises(ModelError, match=r"blk\.0\.attn_k\.weight has rows of 40.*Q8_0"):
        types_of({"blk.0.attn_k.weight": (8, 40)}, "q8_0", shape)


def test_who_needs_an_importance_matrix() -> None:
    sizes = {"output.weight": (8, 256), "blk.0.attn_q.weight": (8, 256), "blk.0.attn_v.weight": (8, 256)}
    shape = Shape("llama", 8, 1)
    needing = {mix: list(need_importance(types_of(sizes, mix, shape), mix)) for mix in MIXES}
    assert {mix for mix, names in needing.items() if names} == {"iq3_xxs", "iq3_xs", "q2_k_s"}
    assert needing["iq3_xxs"] == ["blk.0.attn_q.weight"]
