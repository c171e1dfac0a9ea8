"""Types of models that people run today, from end to end, tiny; `make sweep` does the same with every type, and more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finishing
import pytest
import torch
import working
from configs import build, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as hf_logging

from causalprune.calibration.examples import batches
from causalprune.interventions.gradients import output_slopes
from causalprune.interventions.losses import cross_entropy, target_logits, targets
from causalprune.pruning.methods import Method

TYPES = [
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "kimi_linear",
    "minicpm3",
    "gemma4_text",
    "gemma3n_text",
    "llama4_text",
    "nemotron_h",
    "granitemoehybrid",
    "falcon",
    "falcon_h1",
    "jamba",
    "bamba",
    "zamba2",
    "lfm2_moe",
    "minimax",
    "gptj",
    "gpt_bigcode",
    "mpt",
]
IMAGE_TEXT = ("qwen3_vl", "mistral3", "llava", "qwen3_5")
METHODS = (Method("sparsegpt", 0.5), Method("cap", 0.5))
SHARED_BLOCKS = ("zamba2",)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers warns of token ids that tiny vocabularies lack."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(50)
    yield
    hf_logging.set_verbosity(before)


@pytest.mark.parametrize("name", [*TYPES, *(f"{name} with images" for name in IMAGE_TEXT)])
def test_a_type_works(name: str, tmp_path: Path) -> None:
    kind, _, images = name.partition(" ")
    auto: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model = build(tiny_config(kind), image_text=bool(images))
    decoder = working.inspected(model)
    assert working.closing_is_zeroing(decoder, most=4) <= working.SMALL
    assert working.rows_reach_their_units(decoder) > 0
    assert finishing.generates(decoder) <= 1e-3
    finishing.pruning_is_exact(working.fresh(model), METHODS)
    assert finishing.reloads(model, auto, tmp_path) <= 1e-6
    if kind not in SHARED_BLOCKS:
        finishing.streams(tmp_path, (Method("wanda", 0.5),))


def test_slopes_come_back_through_keys_that_are_handed_on() -> None:
    decoder = working.inspected(build(tiny_config("gemma3n_text")))
    groups = batches(working.examples(2).examples, max_batch_tokens=64)
    found, (batch,) = output_slopes(decoder, groups), groups
    p = next(p for p in decoder.projections if p.parameter_name in working.SHARED and p.role == "v")
    outputs: list[torch.Tensor] = []
    handle = p.module.register_forward_hook(lambda *own: outputs.append(own[2].requires_grad_()))
    with torch.enable_grad():
        wanted = targets(batch)
        loss = cross_entropy(target_logits(decoder, batch, wanted), wanted).sum()
    handle.remove()
    (slope,) = torch.autograd.grad(loss, outputs)
    torch.testing.assert_close(
        found[p.name].float(), (slope.flatten(0, 1).square().sum(0) / int(batch.real.sum())).sqrt()
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        "qwen3_next",
        "gemma3n_text",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama4_text", "zamba2")),
    ],
)
def test_effects_and_gradients_are_what_they_say(name: str) -> None:
    decoder = working.inspected(build(tiny_config(name)))
    assert working.exact_is_naive(decoder) <= 1e-3
    assert working.gradient_is_slope(decoder) <= 1e-2
