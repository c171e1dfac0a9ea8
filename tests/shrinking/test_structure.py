"""Smaller models: what is cut out must be exactly what was removed, in every family."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB
from pretended import pretended
from transformers import AutoModelForCausalLM

from causalprune.checkpoints.saving import save
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Decoder
from causalprune.models.anatomy import inspect_model
from causalprune.models.loading import load
from causalprune.models.mistral import as_mistral
from causalprune.shrinking.structure import Kept, column_keep, silence, smaller

TOKENS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
DENSE = [name for name in FAMILIES if name not in ("mixtral", "olmoe", "qwen2_moe")]


def decoder_of(name: str) -> Decoder:
    return inspect_model(FAMILIES[name](), None, name=name)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = decoder.model(TOKENS).logits
    return found


def masked(decoder: Decoder, kept: Kept) -> torch.Tensor:
    """Return the logits with the same units removed by zeros."""
    for p in decoder.projections:
        p.erase(column_keep(decoder, kept)[p.name])
    return logits(decoder)


def dense_layers(decoder: Decoder) -> list[int]:
    return [layer.index for layer in decoder.layers if layer.experts is None]


@pytest.mark.parametrize("name", DENSE)
def test_fewer_neurons_are_as_zeroed_neurons(name: str) -> None:
    decoder = decoder_of(name)
    stays = {i: torch.arange(i % 2, 40, 2) for i in dense_layers(decoder)}
    cut = smaller(decoder, Kept(neurons=stays))
    torch.testing.assert_close(logits(cut), masked(decoder, Kept(neurons=stays)))
    widths = {p.shape[1] for p in cut.projections if p.name.endswith("down") and ".experts." not in p.name}
    assert widths == {20}


@pytest.mark.parametrize(
    "name", ["llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "llama2"]
)
def test_fewer_kv_groups_are_as_zeroed_heads(name: str) -> None:
    decoder = decoder_of(name)
    n = decoder.layers[0].attention.n_kv_heads
    kept = Kept(kv_groups={layer.index: torch.tensor([layer.index % n]) for layer in decoder.layers})
    cut = smaller(decoder, kept)
    assert (cut.layers[0].attention.n_heads, cut.layers[0].attention.n_kv_heads) == (4 // n, 1)
    torch.testing.assert_close(logits(cut), masked(decoder, kept))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "olmoe"])
def test_a_family_that_cannot_lose_heads_says_so(name: str) -> None:
    decoder = decoder_of(name)
    with pytest.raises(ModelError, match="cannot lose such units"):
        smaller(decoder, Kept(kv_groups={i: torch.tensor([0]) for i in range(len(decoder.layers))}))


def test_a_share_that_would_not_load_is_refused() -> None:
    decoder = decoder_of("llama2")
    three = Kept(kv_groups={layer.index: torch.arange(3) for layer in decoder.layers})
    with pytest.raises(
        ModelError, match=r"would not load .*not a multiple.*ask for another share.*--as-mistral"
    ):
        smaller(decoder, three)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_llama_is_a_mistral_bit_for_bit_and_loses_heads_that_it_could_not(
    name: str, tmp_path: Path
) -> None:
    decoder = decoder_of(name)
    other = as_mistral(decoder)
    assert (other.model.config.model_type, other.fingerprint) == ("mistral", decoder.fingerprint)
    assert torch.equal(logits(other), logits(decoder))
    if name == "llama2":
        three = Kept(kv_groups={layer.index: torch.arange(3) for layer in decoder.layers})
        cut = smaller(other, three)
        save(cut, tmp_path / "cut", manifest={})
        assert torch.equal(logits(load(str(tmp_path / "cut"))), logits(cut))
        torch.testing.assert_close(logits(cut), masked(decoder, three))
    with pytest.raises(ModelError, match="only Llamas without biases"):
        as_mistral(decoder_of("qwen2"))


def test_masks_are_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = inspect_model(FAMILIES["llama3"](), None, name="llama3")
    with pretended(monkeypatch):
        decoder.model.to("cuda")
        masks = column_keep(decoder, Kept(layers=(0,), neurons={0: torch.arange(3)}))
        assert {mask.device.type for mask in masks.values()} == {"cuda"}


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2", "mixtral", "gpt2", "gpt_neox", "opt"])
def test_fewer_layers_are_as_zeroed_layers(name: str) -> None:
    decoder = decoder_of(name)
    for parameter_name, parameter in decoder.model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    cut = smaller(decoder, Kept(layers=(0, 2)))
    assert len(cut.layers) == 2
    silence(decoder, Kept(layers=(0, 2)))
    if name != "mixtral":  # whose experts are not zeroed by columns
        torch.testing.assert_close(logits(cut), masked(decoder, Kept(layers=(0, 2))))
    assert torch.equal(cut.layers[1].projections[0].read(), decoder.layers[2].projections[0].read())


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_without_an_expert_others_are_chosen(name: str) -> None:
    """The smaller model is the large one with a router that never takes expert 1."""
    decoder = decoder_of(name)
    layers = [layer for layer in decoder.layers if layer.experts is not None]
    kept = {x.index: torch.tensor([i for i in range(x.n_experts) if i != 1]) for x in layers}
    cut = smaller(decoder, Kept(experts=kept))
    assert {x.n_experts for x in cut.layers if x.experts is not None} == {layers[0].n_experts - 1}
    for layer in layers:
        layer.module.mlp.gate.register_forward_hook(_never_one)
    torch.testing.assert_close(logits(cut), logits(decoder))


def _never_one(
    router: torch.nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]
) -> object:
    """Choose and weigh experts as the router does, with expert 1 out of reach."""
    weight = router.weight
    hidden = args[0].reshape(-1, weight.shape[1])
    scores = torch.nn.functional.linear(hidden, weight)
    scores[:, 1] = -torch.inf
    chances = scores.softmax(-1)
    top, chosen = chances.topk(output[2].shape[-1], dim=-1)
    if not torch.allclose(
        output[1].sum(-1), output[0].float().softmax(-1).topk(output[2].shape[-1]).values.sum(-1)
    ):
        top = top / top.sum(-1, keepdim=True)
    return scores, top, chosen


def test_what_stays_loads_as_a_standard_checkpoint(tmp_path: object) -> None:
    decoder = decoder_of("qwen3")
    neurons = {i: torch.arange(24) for i in range(3)}
    cut = smaller(decoder, Kept(neurons, {i: torch.tensor([1]) for i in range(3)}, layers=(0, 1)))
    cut.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(TOKENS).logits, logits(cut))


def test_tied_embeddings_stay_tied() -> None:
    cut = smaller(decoder_of("llama3"), Kept(layers=(0, 2)))
    assert cut.model.lm_head.weight is cut.model.get_input_embeddings().weight


def test_the_old_model_is_left_alone() -> None:
    decoder = decoder_of("llama3")
    before = decoder.fingerprint
    smaller(decoder, Kept(neurons={i: torch.arange(8) for i in range(3)}))
    assert inspect_model(decoder.model, None, name="again").fingerprint == before


def test_unequal_widths_are_refused() -> None:
    with pytest.raises(OptionError, match="same number of neurons"):
        smaller(
            decoder_of("llama2"), Kept(neurons={0: torch.arange(8), 1: torch.arange(9), 2: torch.arange(8)})
        )


def test_too_few_experts_are_refused() -> None:
    decoder = decoder_of("mixtral")
    with pytest.raises(OptionError, match="every token needs 2 experts"):
        smaller(decoder, Kept(experts={i: torch.tensor([0]) for i in range(3)}))


def test_dense_layers_of_a_mixture_are_renumbered() -> None:
    decoder = decoder_of("qwen3_moe")  # layer 1 is dense
    cut = smaller(decoder, Kept(layers=(1, 2)))
    assert [layer.experts is None for layer in cut.layers] == [True, False]


def test_a_layer_pattern_goes_along() -> None:
    decoder = decoder_of("gemma3")
    types = decoder.model.config.layer_types
    assert smaller(decoder, Kept(layers=(0, 2))).model.config.layer_types == [types[0], types[2]]
