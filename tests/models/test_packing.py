"""Packed weights come out as their codes and scales say."""

from pathlib import Path

import pytest
import torch
from sources import compared, fp8
from transformers import GenerationConfig

from causalprune.checkpoints.saving import save
from causalprune.models.loading import load
from causalprune.models.packing import unpack_fp8
from causalprune.streaming.files import stored_fingerprint


def test_the_last_blocks_may_be_cut_short() -> None:
    """As in DeepSeek V3, whose latent keys have 576 rows in blocks of 128."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(2, 5, 7, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 3, generator=random)
    found = unpack_fp8(codes, scales, (4, 3))
    for e, i, j in ((0, 0, 0), (0, 4, 6), (1, 3, 2), (1, 2, 3)):
        assert found[e, i, j] == codes[e, i, j].float() * scales[e, i // 4, j // 3]


@pytest.mark.parametrize("width", [192, 576])
def test_a_model_whose_last_blocks_are_cut_short_is_unpacked_as_it_is_streamed(
    width: int, tmp_path: Path
) -> None:
    made = fp8(tmp_path / "source", intermediate_size=width)
    GenerationConfig(max_length=77).save_pretrained(made.model)
    decoder, plain = load(str(made.model)), made.tensors or {}
    held = dict(decoder.model.named_parameters())
    assert held.keys() == plain.keys()
    assert [name for name, weight in held.items() if not torch.equal(weight, plain[name])] == []
    assert decoder.fingerprint == stored_fingerprint(made.model)
    assert decoder.model.generation_config.max_length == 77
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    spread = load(str(made.model), device_map={**places, "lm_head": "cpu", "model.layers.1": "disk"})
    assert spread.fingerprint == decoder.fingerprint
    save(decoder, tmp_path / "out")
    assert not any(compared(made, tmp_path / "out").values())
