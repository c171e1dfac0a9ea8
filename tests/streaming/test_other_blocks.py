"""Blocks that transformers does not load, such as those that predict more tokens, are copied and never taken for layers."""

from pathlib import Path

import pytest
import torch
from configs import tiny_config
from families import tiny
from safetensors.torch import load_file, save_file
from sources import write

from causalprune.checkpoints.saving import save
from causalprune.models.loading import load
from causalprune.pruning import Method, prune
from causalprune.streaming import Seen, prune_stream
from causalprune.streaming.files import stored_fingerprint


def test_experts_of_another_block_are_not_those_of_a_layer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, tiny(tiny_config("qwen3_next")))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    experts = {name: weight for name, weight in tensors.items() if ".layers.0.mlp.experts.0." in name}
    assert experts, "experts are saved one by one"
    others = {
        name.replace("model.layers", "mtp.layers"): torch.randn_like(weight)
        for name, weight in tensors.items()
        if ".layers.0.mlp." in name
    }
    save_file(tensors | others, file, metadata={"format": "pt"})
    method, found = Method("magnitude", 0.5, "row"), {}
    decoder = load(str(folder))
    save(decoder, tmp_path / "memory", prune(decoder, method))
    prune_stream(folder, tmp_path / "stream", method, seen=Seen(None))
    for way in ("memory", "stream"):
        found[way] = load_file(tmp_path / way / "model.safetensors")
    assert found["memory"].keys() == found["stream"].keys() == tensors.keys() | others.keys()
    for name, weight in found["memory"].items():
        assert torch.equal(weight, found["stream"][name]), name
    for name, weight in others.items():
        assert torch.equal(found["stream"][name], weight), f"{name} is not of the model"
    assert all(
        int((found["stream"][name] == 0).sum()) == weight.numel() // 2 for name, weight in experts.items()
    )


@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "olmo_hybrid"])
def test_weights_whose_class_gives_them_a_dtype_have_it_streamed_too(name: str, tmp_path: Path) -> None:
    model = tiny(tiny_config(name)).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    decoder = load(str(tmp_path))
    assert {p.dtype for p in decoder.model.parameters()} == {torch.bfloat16, torch.float32}
    assert stored_fingerprint(tmp_path) == decoder.fingerprint
