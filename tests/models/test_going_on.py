"""A model that goes on from its cache says what it says from all tokens, whatever its class calls that cache."""

import pytest
import torch
from configs import tiny_config
from families import tiny

from causalprune.models.context import go_on, positions


@pytest.mark.parametrize("model_type", ["llama", "mamba", "mamba2", "falcon_mamba", "qwen3_next"])
def test_what_is_read_in_steps_is_what_is_read_at_once(model_type: str) -> None:
    config = tiny_config(model_type)
    model = tiny(config)
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(tokens, use_cache=False).logits
        output, cache = go_on(model, tokens[:, :4], None, torch.ones(2, 4, dtype=torch.long))
        assert cache is not None
        torch.testing.assert_close(output.logits, whole[:, :4], rtol=1e-4, atol=1e-4)
        for at in range(4, 7):
            seen = torch.ones(2, at + 1, dtype=torch.long)
            output, cache = go_on(model, tokens[:, at : at + 1], cache, seen)
            torch.testing.assert_close(output.logits[:, 0], whole[:, at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "longest"), [("llama", 128), ("gpt2", 128), ("mpt", 128), ("bloom", None)]
)
def test_positions_are_counted_whatever_a_configuration_calls_them(
    model_type: str, longest: int | None
) -> None:
    config = tiny_config(model_type)
    assert positions(config) == longest
    if model_type == "mpt":  # no position beyond has a bias
        with torch.inference_mode(), pytest.raises(RuntimeError):
            tiny(config)(torch.zeros(1, 129, dtype=torch.long))
