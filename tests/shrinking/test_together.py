"""Units that go together, and architectures whose other parts compute by how many there are."""

import pytest
import torch
from configs import tiny_config
from families import VOCAB, tiny
from reference import calibration
from torch import Tensor

import causalprune as cp
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Decoder
from causalprune.models.anatomy import inspect_model
from causalprune.shrinking import Shares, Shrinking, shrink
from causalprune.shrinking.structure import Kept, column_keep, silence, smaller
from causalprune.shrinking.together import following, worthiest

TOKENS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
EXAMPLES = calibration()


def made(model_type: str, **changes: object) -> Decoder:
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    again = type(config).from_dict(config.to_dict() | changes)
    again._attn_implementation = "eager"
    return inspect_model(tiny(again), None, name=model_type)


def logits(decoder: Decoder) -> Tensor:
    with torch.inference_mode():
        found: Tensor = decoder.model(TOKENS % decoder.model.config.get_text_config().vocab_size).logits
    return found


def closed(decoder: Decoder, kept: Kept) -> Tensor:
    """Return the logits with the same units removed by zeros."""
    silence(decoder, kept)
    masks = column_keep(decoder, kept)
    for p in decoder.projections:
        p.erase(masks[p.name])
    return logits(decoder)


def test_equally_many_stay_of_every_part() -> None:
    worth = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, torch.nan])
    assert worthiest(worth, 4).tolist() == [0, 1, 2, 7]
    assert worthiest(worth, 4, 2).tolist() == [0, 1, 6, 7]
    assert worthiest(worth, 4, 4).tolist() == [0, 2, 5, 7]


def test_routers_choose_among_the_same_groups() -> None:
    """The smaller model is the large one whose router never takes the experts that went."""
    decoder = made(
        "deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, num_local_experts=8
    )
    found = shrink(decoder, Shares(experts=0.25), EXAMPLES, Shrinking("magnitude", "none"), stage=cp.quiet)
    for stays in found.kept.experts.values():
        assert [int((stays // 4 == part).sum()) for part in (0, 1)] == [3, 3]
    for layer in decoder.layers:
        if layer.experts is not None:
            bias = layer.module.mlp.gate.e_score_correction_bias
            gone = [i for i in range(8) if i not in found.kept.experts[layer.index].tolist()]
            bias[gone] = -100.0
    torch.testing.assert_close(logits(found.decoder), logits(decoder))


def test_heads_stay_with_the_keys_that_they_read() -> None:
    decoder = made(
        "gemma3n_text",
        num_hidden_layers=6,
        num_kv_shared_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=[40] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    modes = decoder.model.config.kv_sharing_modes
    assert modes.count("reuse") == 3
    groups = {i: torch.tensor([i % 2]) for i in range(6)}
    kept = following(decoder, groups)
    assert [int(kept[i]) for i in range(3)] == [0, 1, 0]
    assert [int(kept[i]) for i in range(3, 6)] == [1, 1, 0]
    cut = smaller(decoder, Kept(kv_groups=kept))
    torch.testing.assert_close(logits(cut), closed(decoder, Kept(kv_groups=kept)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["minicpm3", "llama4_text", "bamba", "deepseek_v3"])
def test_fewer_layers_compute_as_the_others_did(model_type: str) -> None:
    changes: dict[str, dict[str, object]] = {
        "bamba": {"attn_layer_indices": [1, 2]},
        "llama4_text": {
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "moe_layers": [1, 3],
            "no_rope_layers": [1, 0, 1, 0],
        },
    }
    decoder = made(model_type, num_hidden_layers=4, **changes.get(model_type, {}))
    stays = (0, 1, 3)
    cut = smaller(decoder, Kept(layers=stays))
    assert len(cut.layers) == 3
    gone = decoder.layers[2]
    gone.module.forward = lambda hidden, *_, **__: (hidden, None) if model_type == "bamba" else hidden
    torch.testing.assert_close(logits(cut), logits(decoder), rtol=1e-4, atol=1e-4)


def test_layers_that_compute_by_their_numbers_go_from_the_end_alone() -> None:
    decoder = made("diffllama", num_hidden_layers=3)
    with pytest.raises(ModelError, match="none can go but the last"):
        smaller(decoder, Kept(layers=(0, 2)))
    assert len(smaller(decoder, Kept(layers=(0, 1))).layers) == 2


@pytest.mark.parametrize("model_type", ["minimax_m2", "lfm2_moe", "ernie4_5_moe", "afmoe"])
def test_biases_beside_a_router_lose_experts_too(model_type: str) -> None:
    decoder = made(model_type)
    layers = [layer for layer in decoder.layers if layer.experts is not None]
    kept = {layer.index: torch.tensor([0, 2, 3]) for layer in layers}
    cut = smaller(decoder, Kept(experts=kept))
    assert {layer.n_experts for layer in cut.layers if layer.experts is not None} == {3}
    own, other = (dict(one.model.state_dict()) for one in (cut, decoder))
    biases = [name for name in own if name.endswith("bias") and own[name].numel() == 3]
    assert biases
    for name in biases:
        assert torch.equal(own[name].flatten(), other[name].flatten()[[0, 2, 3]])


def test_a_width_that_is_stated_is_taken() -> None:
    decoder = made("lfm2", intermediate_size=96, block_auto_adjust_ff_dim=True, block_multiple_of=16)
    width = next(p.shape[1] for p in decoder.projections if p.role == "down")
    stays = {layer.index: torch.arange(0, width, 2) for layer in decoder.layers}
    cut = smaller(decoder, Kept(neurons=stays))
    torch.testing.assert_close(logits(cut), closed(decoder, Kept(neurons=stays)))


def test_inputs_that_are_weighted_already_tell_no_weights() -> None:
    decoder = made("llama4_text")
    with pytest.raises(OptionError, match="weighted already: choose them by effect"):
        shrink(decoder, Shares(experts=0.25), EXAMPLES, Shrinking("activation", "none"), stage=cp.quiet)
