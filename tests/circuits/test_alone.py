"""A circuit alone is what gates make of the model; units that it is made of have nothing in common."""

import pytest
import torch
from reference import fresh, shared
from test_finding import PROBLEMS, find
from transformers import GptOssConfig, GptOssForCausalLM

import causalprune as cp
from causalprune.circuits.behaviour import Trials, behaviour
from causalprune.core.errors import OptionError
from causalprune.core.types import Decoder
from causalprune.models.anatomy import inspect_model
from causalprune.pruning.closing import close


def biased_experts() -> Decoder:
    """Return a model whose experts send something without a weight."""
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj_bias"):
            parameter.data.normal_()
    return inspect_model(model, None, name="gpt_oss")


def test_the_circuit_alone_is_what_gates_make_of_the_model() -> None:
    for decoder in (*map(fresh, ("llama3", "mixtral", "qwen2_moe", "gpt2")), biased_experts()):
        routed = any(layer.experts is not None for layer in decoder.layers)
        names = ["heads", "experts" if routed else "neurons:7"]
        own = behaviour(decoder, PROBLEMS.examples[:8], cp.Question(tuple(names)), cp.Estimator("gradient"))
        keep = torch.tensor([number % 4 > 0 for number in range(len(own.units))])
        closed = Trials(own).nats([keep])[0]
        every = list(own.plan.units.values())
        kept = close(decoder, [every[number] for number in (~keep).nonzero()[:, 0].tolist()])
        torch.testing.assert_close(Trials(own).nats([torch.ones_like(keep)])[0], closed, rtol=1e-4, atol=1e-5)
        assert sum(int((~kept[name]).sum()) for name in kept) > 0


@pytest.mark.parametrize("units", [("heads", "layers"), ("heads", "kv_groups"), ("neurons:1", "mlp")])
def test_units_that_are_parts_of_one_another_are_refused(units: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=f"units of {units[0]} and {units[1]} share parts at layer 0"):
        find(shared("llama2"), PROBLEMS, PROBLEMS, question=cp.Question(units))
