"""The real thing: SmolLM2-135M-Instruct on GSM8K, as far as a few seconds go."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from causalprune.calibration.examples import batches, calibrate
from causalprune.checkpoints.saving import save
from causalprune.checkpoints.verification import verify
from causalprune.core.types import Calibration, Decoder
from causalprune.evaluation.measures import evaluate
from causalprune.interventions.ablation import LayerInputs, capture, entered_at, gated
from causalprune.interventions.losses import target_nats
from causalprune.interventions.units import Site
from causalprune.models.loading import load
from causalprune.models.summaries import summary
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

pytestmark = pytest.mark.xdist_group("smollm2")  # one worker fetches the model, once
HEADS = [(0, 0), (0, 8), (14, 3), (29, 5)]


@pytest.fixture(scope="module")
def decoder(smollm2: Path) -> Decoder:
    return load(str(smollm2))


@pytest.fixture(scope="module")
def problems(decoder: Decoder, data_dir: Path) -> Calibration:
    return calibrate(decoder.tokenizer, ["gsm8k"], n=3, data_dir=data_dir)


@pytest.mark.thorough
def test_what_is_found(decoder: Decoder) -> None:
    found = summary(decoder)
    assert (found["layers"], found["heads"], found["kv_heads"], found["head_width"]) == (30, 9, 3, 64)
    assert found["tied_embeddings"]
    assert found["prunable_weights"] == sum(p.size for p in decoder.projections) == 106_168_320
    assert decoder.tokenizer("Hello")["input_ids"]


def naive_nats(decoder: Decoder, layer: int, head: int, tokens: list[int], start: int) -> float:
    """Return the loss of the target with one head zeroed, by a full forward pass with all logits."""
    attention = decoder.layers[layer].attention

    def zero(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        heads = args[0].clone()
        heads[..., head * attention.head_dim : (head + 1) * attention.head_dim] = 0
        return (heads,)

    hook = attention.output.register_forward_pre_hook(zero)
    try:
        with torch.inference_mode():
            logits = decoder.model(input_ids=torch.tensor([tokens])).logits[0]
    finally:
        hook.remove()
    return float(
        nn.functional.cross_entropy(
            logits[start - 1 : -1].double(), torch.tensor(tokens[start:]), reduction="sum"
        )  # in float32 it is 2e-5 nats per token off on some processors
    )


@pytest.mark.thorough
def test_a_resumed_pass_is_a_full_pass(decoder: Decoder, problems: Calibration) -> None:
    (batch,) = batches(problems.examples[:1], max_batch_tokens=2048)
    example = problems.examples[0]
    inputs = capture(decoder, batch.tokens, stop=29)
    for layer, head in HEADS:
        gate = torch.ones(1, 9)
        gate[0, head] = 0
        own = LayerInputs({layer: inputs.hidden[layer]}, inputs.as_tuple)
        with entered_at(decoder, layer, own), gated(decoder, {Site(layer, "heads"): gate}):
            resumed = float(target_nats(decoder, batch)[0])
        naive = naive_nats(decoder, layer, head, list(example.tokens), example.target_start)
        assert resumed == pytest.approx(naive, abs=1e-5 * example.target_tokens)


@pytest.mark.thorough
def test_pruned_checkpoint_is_what_it_says(
    smollm2: Path, data_dir: Path, problems: Calibration, tmp_path: Path
) -> None:
    decoder = load(str(smollm2))
    pruned = prune(decoder, Method("wanda", 0.5), calibration=problems)
    save(decoder, tmp_path / "out", pruned)
    report = verify(tmp_path / "out")
    assert report.ok
    assert report.zeros == 53_084_160
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("Natalia sold clips", return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model(**tokens).logits, decoder.model(**tokens).logits)
    dense = evaluate(load(str(smollm2)), ["gsm8k_nll:2"], data_dir=data_dir)[0]
    assert sum(evaluate(decoder, ["gsm8k_nll:2"], data_dir=data_dir)[0].values) > sum(dense.values)
