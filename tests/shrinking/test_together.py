"""Units that go together, and architectures whose other parts compute by how many there are."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from configs import tiny_config
from families import VOCAB, tiny
from reference import ONE_ROUTE, calibration, example, fresh
from torch import Tensor

import causalprune as cp
from causalprune.checkpoints.kept import was_pruned
from causalprune.checkpoints.saving import save
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.memory import Masks
from causalprune.core.types import Decoder
from causalprune.interventions.statistics import InputNorms
from causalprune.models.anatomy import inspect_model
from causalprune.models.loading import load
from causalprune.shrinking import Shares, Shrinking, shrink, structure, worth
from causalprune.shrinking.structure import Kept, column_keep, silence, smaller
from causalprune.shrinking.together import following, worthiest
from causalprune.shrinking.worth import balance

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


def test_beam_computes_by_the_numbers_of_layers() -> None:
    with pytest.raises(ModelError, match="none can go but the last"):
        smaller(made("beam", num_hidden_layers=3), Kept(layers=(0, 2)))


def test_layers_that_get_features_of_images_stay() -> None:
    decoder = made("llama")
    decoder.model.config.vision_config = SimpleNamespace(deepstack_visual_indexes=[3, 5])
    with pytest.raises(ModelError, match="the first 2 layers of llama get features of images"):
        structure._fewer_layers(decoder.model.config, decoder.model.config, (0, 2))


def test_text_beside_a_task_counts_no_more_than_it() -> None:
    task, text = example(10, 9, 1), replace(example(40, 1, 2), source="own")
    assert balance([task] * 3, {}) == [1.0] * 3
    assert balance([task, text], {}) == [1.0, 1 / 39]
    assert balance([example(60, 1, 3), text], {}) == [1.0, 1.0], "where the task has more, nothing changes"
    assert balance([text, text], {}) == [1.0, 1.0]
    assert balance([task, replace(task, source="c4"), text], {"preserve": ["c4"]}) == [1.0, 1 / 40, 1 / 40]


def test_experts_that_few_examples_miss_are_not_put_before_others() -> None:
    decoder = fresh("qwen3_moe")
    worths = {
        layer.index: torch.arange(layer.n_experts).double() for layer in decoder.layers if layer.n_experts
    }
    for own in worths.values():
        own[1:] = torch.nan
    found = worth._filled(decoder, ONE_ROUTE, worths)
    norms = InputNorms()
    worth._look(decoder, list(decoder.layers), ONE_ROUTE, norms.see, cp.silent)
    for layer, own in found.items():
        downs = [p for p in decoder.layers[layer].projections if p.role == "down" and p.expert is not None]
        for expert, p in enumerate(downs[1:], start=1):
            assert bool(own[expert].isnan()) != bool(norms.tokens.get(p.name))
    others = torch.cat([own[1:] for own in found.values()]).isnan()
    assert bool(others.any())
    assert not bool(others.all())


def test_an_update_that_has_nothing_to_make_up_for_is_none() -> None:
    found = shrink(
        made("llama", num_hidden_layers=3),
        Shares(layers=0.3),
        EXAMPLES,
        Shrinking("magnitude", "refit"),
        stage=cp.quiet,
    )
    assert found.update == "none"


def test_zeros_of_a_matrix_stay_where_a_checkpoint_says_so(tmp_path: Path) -> None:
    """Fewer than a hundredth of them: only the masks beside the checkpoint tell that they are meant."""
    decoder = fresh("llama3")
    p = decoder.projections[0]
    keep = {own.name: torch.ones(own.shape, dtype=torch.bool) for own in decoder.projections}
    keep[p.name][0, 0] = False
    p.erase(keep[p.name])
    masks = Masks()
    for name, mask in keep.items():
        masks.add(name, mask)
    save(decoder, tmp_path / "out", manifest={"method": {}}, keep=masks)
    again = load(str(tmp_path / "out"))
    zeros_stay = was_pruned(again)
    assert [own.name for own in again.projections if zeros_stay(own)] == [p.name]
    assert not bool(column_keep(again, Kept())[p.name][0, 0])
    assert not any(map(was_pruned(fresh("llama3")), fresh("llama3").projections))
