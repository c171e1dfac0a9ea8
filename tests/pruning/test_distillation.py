"""Training on the intact model's predictions: the same logits, fewer nats between them, and zeros that stay."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from reference import calibration, fresh, restored, shared
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from causalprune.calibration.examples import batches
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Batch, Decoder
from causalprune.interventions.ablation import entered_at
from causalprune.interventions.losses import divergence, target_logits, targets
from causalprune.models.anatomy import inspect_model
from causalprune.pruning import training as distillation
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.pruning.training import last_hidden

every_family = pytest.mark.parametrize("family", FAMILIES)
EXAMPLES = calibration(((14, 5), (13, 9), (12, 3)))
BATCHES = batches(EXAMPLES.examples, max_batch_tokens=1024)


def predictions(decoder: Decoder) -> list[Tensor]:
    with torch.inference_mode():
        return [target_logits(decoder, batch, targets(everywhere(batch))) for batch in BATCHES]


def everywhere(batch: Batch) -> Batch:
    return replace(batch, is_target=batch.real)


def distance(decoder: Decoder, intact: list[Tensor]) -> float:
    pairs = zip(intact, predictions(decoder), strict=True)
    return float(sum(divergence(p, torch.arange(len(p)), q).sum() for p, q in pairs))


@every_family
def test_logits_are_made_again_from_what_the_last_layer_sent(family: str) -> None:
    decoder = shared(family)
    for batch, expected in zip(BATCHES, predictions(decoder), strict=True):
        with torch.inference_mode(), entered_at(decoder, len(decoder.layers), last_hidden(decoder, batch)):
            found = target_logits(decoder, batch, targets(everywhere(batch)))
        torch.testing.assert_close(found, expected)


@every_family
def test_predictions_come_closer_and_zeros_stay(family: str) -> None:
    decoder = shared(family)
    flags = [p.requires_grad for p in decoder.model.parameters()]
    intact, distances = predictions(decoder), []
    for update in ("refit", "distill"):
        with restored(decoder) as before:
            pruned = prune(decoder, Method("wanda", 0.5, update=update), calibration=EXAMPLES)
            distances.append(distance(decoder, intact))
            for p in decoder.projections:
                assert torch.equal(p.read() != 0, pruned.keep[p.name])
            pool = {p.parameter_name for p in decoder.projections}
            for name, parameter in decoder.model.named_parameters():
                assert name in pool or torch.equal(parameter, before[name]), name
    assert distances[1] < distances[0]
    assert [p.requires_grad for p in decoder.model.parameters()] == flags


@every_family
def test_gradients_in_pieces_are_those_of_the_whole_loss(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, batch = fresh(family), batches(EXAMPLES.examples[:1], max_batch_tokens=1024)[0]
    intact, wanted = last_hidden(decoder, batch), targets(everywhere(batch))
    with torch.inference_mode():
        teacher = target_logits(decoder, batch, wanted)
    parameters = list(dict.fromkeys(p.parameter for p in decoder.projections))
    for parameter in parameters:
        parameter.data.mul_(0.8)
        parameter.requires_grad_()
    with torch.enable_grad():
        logits = target_logits(decoder, batch, wanted)
        own, other = logits.log_softmax(-1), teacher.log_softmax(-1)
        loss = torch.nn.functional.kl_div(own, other, reduction="batchmean", log_target=True)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    monkeypatch.setattr(distillation, "CHUNK", 5)
    for one, other in zip(distillation._gradients(decoder, batch, intact, parameters), expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one / distillation.SCALE, other, rtol=1e-3, atol=1e-6)


def test_gradients_survive_float16() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=30_000, initializer_range=0.2, **shape)
    model, found = (
        LlamaForCausalLM(config),
        [],
    )  # of so many tokens each has a chance too small to divide in float16
    batch = batches(calibration([(200, 5)] * 5).examples, max_batch_tokens=1000)[0]
    for dtype in (torch.float32, torch.float16):
        decoder = inspect_model(copy.deepcopy(model).to(dtype), None, name="llama")
        intact, parameters = last_hidden(decoder, batch), [p.parameter for p in decoder.projections]
        for parameter in parameters:
            parameter.data.mul_(0.5)
            parameter.requires_grad_()
        gradients = distillation._gradients(decoder, batch, intact, parameters)
        found.append(torch.cat([g.float().flatten() for g in gradients if g is not None]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_nothing_is_written_where_inputs_are_not_numbers(family: str) -> None:
    decoder = fresh(family)
    decoder.model.get_input_embeddings().weight.data[:] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        prune(decoder, Method("magnitude", 0.5, update="refit"), calibration=EXAMPLES)


def test_training_that_does_not_fit_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = fresh("llama3")
    before = [parameter.clone() for parameter in decoder.model.parameters()]
    pool = sum(p.size for p in decoder.projections)
    assert distillation.memory_bytes(decoder) == {torch.device("cpu"): 20 * pool}
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=20 * pool - 1))
    with pytest.raises(
        OptionError, match=r"beside the model, .* free: choose another update, as in causal\+refit"
    ):
        prune(decoder, Method("wanda", 0.5, update="distill"), calibration=EXAMPLES)
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.model.parameters(), strict=True))


def test_two_runs_are_identical() -> None:
    one, two = fresh("qwen3_moe"), fresh("qwen3_moe")
    for decoder in (one, two):
        prune(decoder, Method("sparsegpt", 0.5, update="distill"), calibration=EXAMPLES)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_smaller_than_bfloat16_can_hold_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2e-3 of a weight is lost in bfloat16; forty of them, summed in float32, are not."""
    decoder = fresh("llama3")
    decoder.model.to(torch.bfloat16)
    monkeypatch.setattr(distillation, "RATE", 2e-3)
    monkeypatch.setattr(distillation, "MOST", 40)
    intact, distances = predictions(decoder), []
    with restored(decoder):
        prune(decoder, Method("magnitude", 0.5, update="refit"), calibration=EXAMPLES)
        distances.append(distance(decoder, intact))
    prune(decoder, Method("magnitude", 0.5, update="distill"), calibration=EXAMPLES)
    distances.append(distance(decoder, intact))
    assert distances[1] < 0.7 * distances[0]


def test_steps_are_as_large_as_weights_are() -> None:
    """The same function from MLP weights a sixteenth as large is trained in the same way."""
    one, two = fresh("llama3"), fresh("llama3")
    scaled = 0
    for a, b in zip(one.projections, two.projections, strict=True):
        if a.role in ("up", "down"):
            factor = 16.0 if a.role == "up" else 1 / 16
            b.write(a.read() * factor)
            scaled += 1
    assert scaled
    for decoder in (one, two):
        prune(decoder, Method("magnitude", 0.5, update="distill"), calibration=EXAMPLES)
    for a, b in zip(predictions(one), predictions(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_steps_do_not_vanish_in_float16() -> None:
    """More weights are kept than float16 can count."""
    weight = torch.full((300, 300), 0.5)
    mask = (torch.arange(90_000) % 5 > 0).view(300, 300).half()
    assert distillation._root_mean_square(weight, mask) == pytest.approx(0.5)
