"""Interventions do what they say in every family, and leave nothing behind."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, N_LAYERS, VOCAB
from reference import fresh, logits, shared, without_head
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from causalprune.core.types import Decoder
from causalprune.interventions import ablation
from causalprune.interventions.ablation import LayerInputs, capture, entered_at, gated, run_layer
from causalprune.interventions.units import Site

every_family = pytest.mark.parametrize("family", FAMILIES)
TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(7))


def run(decoder: Decoder, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        output: Any = decoder.model(input_ids=tokens, use_cache=False)
    return output.logits


def heads(layer: int) -> Site:
    return Site(layer, "heads")


def state(decoder: Decoder) -> dict[str, Any]:
    """Return all hooks and replaced methods of a model."""
    found: dict[str, Any] = {}
    for name, module in decoder.model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
        found[name] = hooks, vars(module).get("forward")
    return found


@every_family
def test_a_gate_of_zero_is_zeroed_columns_of_the_output_projection(family: str) -> None:
    decoder = shared(family)
    intact = run(decoder)
    for layer in decoder.layers:
        n_heads = layer.attention.n_heads
        for head in range(n_heads):
            gate = torch.ones(2, n_heads)
            gate[:, head] = 0
            with gated(decoder, {heads(layer.index): gate}):
                masked = run(decoder)
            with without_head(layer, head):
                expected = run(decoder)
            torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)
            assert (masked - intact).abs().max() > 1e-3, "this head does nothing: the test is blind"


@every_family
def test_each_row_and_layer_has_its_own_gates(family: str) -> None:
    decoder = shared(family)
    n_heads = decoder.layers[0].attention.n_heads
    gates = {heads(0): torch.ones(2, n_heads), heads(2): torch.ones(2, n_heads)}
    gates[heads(0)][1, 2] = gates[heads(2)][1, 0] = 0
    with gated(decoder, gates):
        masked = run(decoder)
    with without_head(decoder.layers[0], 2), without_head(decoder.layers[2], 0):
        expected = run(decoder)
    torch.testing.assert_close(masked[0], run(decoder)[0], rtol=1e-5, atol=1e-5)  # experts share a product
    torch.testing.assert_close(masked[1], expected[1], rtol=1e-5, atol=1e-5)


def test_a_gate_scales() -> None:
    decoder = fresh("qwen3")
    layer = decoder.layers[1]
    width = layer.attention.head_dim
    with gated(decoder, {heads(1): torch.tensor([[1.0, 0.5, 1.0, 1.0]] * 2)}):
        scaled = run(decoder)
    output = layer.projections[3]
    assert output.role == "o"
    changed = output.read().clone()
    changed[:, width : 2 * width] *= 0.5
    output.write(changed)
    torch.testing.assert_close(scaled, run(decoder), rtol=1e-5, atol=1e-5)


@every_family
def test_entering_at_any_layer_continues_the_full_pass_without_the_earlier_layers(family: str) -> None:
    decoder = shared(family)
    intact = run(decoder)
    inputs = capture(decoder, TOKENS, stop=N_LAYERS - 1)
    assert sorted(inputs.hidden) == list(range(N_LAYERS))
    for layer in range(N_LAYERS):
        ran: list[int] = []
        handles = [
            each.attention.output.register_forward_pre_hook(lambda *_, i=each.index, ran=ran: ran.append(i))
            for each in decoder.layers
        ]
        with entered_at(decoder, layer, inputs):
            entered = run(decoder, torch.full_like(TOKENS, 5))  # other tokens: only their shape may matter
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(entered, intact, rtol=0, atol=0)
        assert ran == list(range(layer, N_LAYERS))


@every_family
def test_capture_stops_at_its_layer_and_layers_run_alone(family: str) -> None:
    decoder = shared(family)
    inputs = capture(decoder, TOKENS, stop=N_LAYERS - 1)
    head: list[int] = []
    handle = decoder.model.get_output_embeddings().register_forward_pre_hook(lambda *_: head.append(1))
    first = capture(decoder, TOKENS, stop=0)
    for layer in range(N_LAYERS - 1):
        after = run_layer(decoder, TOKENS, layer, LayerInputs({layer: inputs.hidden[layer]}, inputs.as_tuple))
        torch.testing.assert_close(after, inputs.hidden[layer + 1], rtol=0, atol=0)
    handle.remove()
    assert sorted(first.hidden) == [0]
    assert not head, "logits were computed"


class TupleLayer(LlamaDecoderLayer):
    """A layer as it was before transformers 5, and as remote code still has it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (super().forward(*args, **kwargs),)


class Unpacked(nn.ModuleList):
    """Layers for a model that unpacks what each returns."""

    def __iter__(self) -> Iterator[Any]:
        def unpacked(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            (hidden,) = layer(*args, **kwargs)
            return hidden

        return (partial(unpacked, layer) for layer in super().__iter__())


def test_layers_that_return_tuples() -> None:
    intact = run(shared("llama3"))
    decoder = fresh("llama3")
    for layer in decoder.layers:
        layer.module.__class__ = TupleLayer
    decoder.model.model.layers = Unpacked([layer.module for layer in decoder.layers])
    torch.testing.assert_close(run(decoder), intact, rtol=0, atol=0)
    inputs = capture(decoder, TOKENS, stop=N_LAYERS - 1)
    assert inputs.as_tuple
    for layer_index in range(N_LAYERS):
        with entered_at(decoder, layer_index, inputs):
            torch.testing.assert_close(run(decoder), intact, rtol=0, atol=0)
    after = run_layer(decoder, TOKENS, 1, inputs)
    torch.testing.assert_close(after, inputs.hidden[2], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama3", "gpt2", "opt", "mixtral"])
def test_an_exception_inside_leaves_the_model_as_it_was(family: str) -> None:
    decoder = shared(family)
    intact, before = run(decoder), state(decoder)
    inputs = capture(decoder, TOKENS, stop=2)
    gates = {heads(0): torch.zeros(2, 4), heads(2): torch.zeros(2, 4)}

    def interrupt(context: AbstractContextManager[None]) -> None:
        with context:
            assert state(decoder) != before
            raise KeyboardInterrupt

    contexts: list[AbstractContextManager[None]] = [
        gated(decoder, gates),
        entered_at(decoder, 2, inputs),
    ]
    for context in contexts:
        with pytest.raises(KeyboardInterrupt):
            interrupt(context)
        assert state(decoder) == before
    with pytest.raises(IndexError):  # no such layer: fails half-way through its preparations
        gated(decoder, {heads(0): gates[heads(0)], heads(99): gates[heads(0)]}).__enter__()
    broken = torch.full_like(TOKENS, VOCAB + 1)  # no such token: fails inside the model
    with pytest.raises(IndexError):
        capture(decoder, broken, stop=2)
    with pytest.raises(IndexError):
        run_layer(decoder, broken, 1, inputs)
    assert state(decoder) == before
    torch.testing.assert_close(run(decoder), intact, rtol=0, atol=0)


def test_a_forward_that_someone_else_replaced_comes_back() -> None:
    decoder = fresh("llama2")
    module = decoder.layers[0].module
    theirs = module.forward
    module.forward = theirs  # as accelerate does, on the instance
    inputs = capture(decoder, TOKENS, stop=1)
    with entered_at(decoder, 1, inputs):
        assert module.forward is not theirs
    assert vars(module)["forward"] is theirs


def test_a_model_that_never_reaches_the_layer_is_an_error() -> None:
    decoder = fresh("llama2")
    decoder.model.model.layers = nn.ModuleList(list(decoder.model.model.layers)[:2])
    with pytest.raises(RuntimeError, match=r"never reached model\.layers\.2"):
        ablation.capture(decoder, TOKENS, stop=2)


def test_one_sequence_alone_is_its_row_in_a_batch() -> None:
    decoder = shared("llama3")
    torch.testing.assert_close(
        run(decoder)[1], logits(decoder.model, TOKENS[1].tolist()), rtol=1e-5, atol=1e-5
    )
