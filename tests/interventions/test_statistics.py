"""Input norms are those of every real token that reached a matrix, and of no other."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from reference import calibration, logits, shared
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import GptOssConfig

from causalprune.calibration.examples import batches
from causalprune.core.errors import ModelError
from causalprune.core.types import Calibration, Decoder, Example, Layer
from causalprune.interventions.statistics import InputNorms, Moments, observed
from causalprune.models.anatomy import inspect_model

Inputs = dict[str, list[Tensor]]


def gather(decoder: Decoder, examples: Calibration, room: int = 2048) -> InputNorms:
    """Return the norms of all layers at once, in whole forward passes over padded batches."""
    norms = InputNorms()
    for batch in batches(examples.examples, max_batch_tokens=room):
        real = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        with ExitStack() as stack, torch.inference_mode():
            for layer in decoder.layers:
                stack.enter_context(observed(layer, real, norms.see))
            decoder.model(input_ids=batch.tokens, use_cache=False)
    return norms


@contextmanager
def recorded(module: nn.Module, keep: Callable[[tuple[Any, ...]], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: keep(args))
    yield
    handle.remove()


def swiglu(experts: Any, expert: int, x: Tensor) -> Tensor:
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return silu(gate) * up


def clamped(experts: Any, expert: int, x: Tensor) -> Tensor:
    """Return what GPT-OSS does: gate and up alternate, `[in out]`, with biases and limits."""
    both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[0::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)


def inputs_of(decoder: Decoder, layer: Layer, examples: Calibration, inside: Callable[..., Tensor]) -> Inputs:
    """Return every input of every projection of a layer, one sequence and one token at a time."""
    seen: Inputs = {projection.name: [] for projection in layer.projections}

    def keep_routed(args: tuple[Any, ...]) -> None:
        for x, chosen in zip(args[0], args[1].tolist(), strict=True):
            for projection in layer.projections:
                if projection.module is layer.experts and projection.expert in chosen:
                    down = projection.role == "down"
                    seen[projection.name].append(inside(layer.experts, projection.expert, x) if down else x)

    with ExitStack() as stack:
        for projection in layer.projections:
            if projection.module is not layer.experts:
                keep = seen[projection.name].extend
                stack.enter_context(
                    recorded(projection.module, lambda a, keep=keep: keep(a[0].flatten(0, -2)))
                )
        if layer.experts is not None:
            stack.enter_context(recorded(layer.experts, keep_routed))
        for example in examples.examples:
            logits(decoder.model, example.tokens)
    return seen


def assert_norms(decoder: Decoder, examples: Calibration, inside: Callable[..., Tensor] = swiglu) -> None:
    norms = gather(decoder, examples)
    for layer in decoder.layers:
        for name, inputs in inputs_of(decoder, layer, examples, inside).items():
            projection = next(p for p in layer.projections if p.name == name)
            assert norms.tokens[name] == len(inputs)
            found = norms.root_mean_square(projection)
            if not inputs:
                assert found is None
                continue
            assert found is not None
            expected = torch.stack(inputs).double().square().mean(0).sqrt()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_all_real_tokens(family: str) -> None:
    examples = calibration(((14, 5), (13, 9), (9, 1)))
    first = batches(examples.examples, max_batch_tokens=2048)[0]
    assert (first.lengths < first.tokens.shape[1]).any(), "nothing is padded: the test is blind"
    assert_norms(shared(family), examples)


@pytest.mark.parametrize("family", ["llama3", "phi3", "gpt2", "mixtral", "qwen2_moe"])
def test_moments_are_those_of_all_real_tokens(family: str) -> None:
    decoder, examples = shared(family), calibration(((14, 5), (13, 9), (9, 1)))
    for layer in decoder.layers:
        moments = Moments()
        for batch in batches(examples.examples, max_batch_tokens=2048):
            with observed(layer, batch.real, moments.see), torch.inference_mode():
                decoder.model(input_ids=batch.tokens, use_cache=False)
        for name, inputs in inputs_of(decoder, layer, examples, swiglu).items():
            assert moments.tokens[name] == len(inputs)
            if inputs:
                stacked = torch.stack(inputs)
                torch.testing.assert_close(moments.hessians[name], stacked.T @ stacked, rtol=1e-4, atol=1e-4)
        shared_by = {id(moments.hessians[f"layers.{layer.index}.{role}"]) for role in "qkv"}
        assert len(shared_by) == 1


def test_norms_inside_experts_with_biases_and_a_layout_of_their_own() -> None:
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 8}
    shape |= {"num_local_experts": 3, "num_experts_per_tok": 2, "swiglu_limit": 0.5, "pad_token_id": 0}
    config = GptOssConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    decoder = inspect_model(tiny(config), None, name="gpt_oss")
    assert_norms(decoder, calibration(((14, 5), (13, 9))), clamped)


@pytest.mark.parametrize("family", ["llama3", "qwen2_moe"])
def test_batches_do_not_matter(family: str) -> None:
    decoder, examples = shared(family), calibration()
    one, many = gather(decoder, examples), gather(decoder, examples, room=1)
    assert one.tokens == many.tokens
    for name, squares in one.squares.items():
        torch.testing.assert_close(squares, many.squares[name], rtol=1e-5, atol=1e-6)


def test_an_expert_that_no_token_reached_has_no_norm() -> None:
    decoder = shared(
        "olmoe"
    )  # equal tokens have equal hidden states: they all go to the same two of four experts
    norms = gather(decoder, Calibration((Example((7,) * 6, 1, "equal", ""),), (0,)))
    for layer in decoder.layers:
        routed = [p for p in layer.projections if p.expert is not None]
        none = [p.name for p in routed if norms.root_mean_square(p) is None]
        assert len(none) == 2 * 3
        assert sorted(none) == sorted(p.name for p in routed if norms.tokens[p.name] == 0)
        assert all(norms.tokens[p.name] == 6 for p in routed if p.name not in none)


def test_norms_by_hand() -> None:
    projection = shared("llama2").layers[0].projections[0]
    norms = InputNorms()
    assert norms.root_mean_square(projection) is None
    norms.add(projection, torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    norms.add(projection, torch.tensor([[0.0, -4.0], [0.0, 0.0]]))
    found = norms.root_mean_square(projection)
    assert found is not None
    assert found.tolist() == [2.5, 2.0]


def test_half_precision_inputs_do_not_overflow() -> None:
    projection = shared("llama2").layers[0].projections[0]
    norms = InputNorms()
    norms.add(projection, torch.full((3, 2), 60_000.0, dtype=torch.float16))
    found = norms.root_mean_square(projection)
    assert found is not None
    torch.testing.assert_close(found, torch.full((2,), 60_000.0, dtype=torch.float64))


class Own(nn.Module):
    act_fn = staticmethod(silu)


def test_experts_that_compute_in_unknown_ways_are_an_error() -> None:
    own, layer, norms = Own(), shared("mixtral").layers[0], InputNorms()
    routed = tuple(replace(p, module=own) for p in layer.projections if p.expert is not None)
    layer = replace(layer, projections=routed, experts=own)
    seen = observed(layer, torch.ones(1, 4) > 0, norms.see)
    with pytest.raises(ModelError, match="of a Own"), seen:
        pass
    assert not norms.tokens


def test_hooks_are_gone_after_an_exception() -> None:
    decoder = shared("mixtral")
    with (
        pytest.raises(KeyboardInterrupt),
        observed(decoder.layers[0], torch.ones(1, 4) > 0, InputNorms().see),
    ):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in decoder.model.modules())
