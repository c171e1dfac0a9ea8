"""Training on the intact model's predictions: the same logits, fewer nats between them, and zeros that stay."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from reference import calibration, fresh, restored, shared
from torch import Tensor, nn

from causalprune.calibration.examples import batches
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Batch, Decoder, Projection, silent
from causalprune.interventions import pieces
from causalprune.interventions.ablation import LayerInputs, entered_at
from causalprune.interventions.gradients import output_slopes
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
def test_gradients_have_seen_what_training_follows(family: str) -> None:
    decoder, seen = shared(family), list[LayerInputs]()
    alone = batches(EXAMPLES.examples, max_batch_tokens=1)
    output_slopes(decoder, alone, last=seen)
    for batch, own in zip(alone, seen, strict=True):
        (found,), (expected,) = own.hidden.values(), last_hidden(decoder, batch).hidden.values()
        torch.testing.assert_close(found, expected)


def test_where_gradients_are_taken_nothing_runs_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "last_hidden", None)  # a call would fail
    found = prune(fresh("llama2"), Method("causal", 0.5), calibration=EXAMPLES, on_progress=silent)
    assert found.method.resolved_update == "distill"


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
    found = gradients(decoder, batch, intact, monkeypatch)
    for parameter, other in zip(parameters, expected, strict=True):
        assert (parameter in found) == (other is not None)
        if other is not None:
            torch.testing.assert_close(found[parameter], other, rtol=1e-3, atol=1e-6)


def gradients(
    decoder: Decoder, batch: Batch, intact: LayerInputs, monkeypatch: pytest.MonkeyPatch
) -> dict[nn.Parameter, Tensor]:
    """Return what a step would move weights by."""
    found: dict[nn.Parameter, Tensor] = {}
    training = distillation._Run(decoder, distillation.Training())

    def seen(self: object, p: Projection, gradient: Tensor, number: int, rate: float) -> None:
        found[p.parameter] = gradient

    with monkeypatch.context() as patch:
        patch.setattr(distillation._Run, "_move", seen)
        training.step([(batch, intact)], 1, 0.0, lambda layer: None)
    return found


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_run_again_give_the_same_bits(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, batch = fresh(family), batches(EXAMPLES.examples[:1], max_batch_tokens=1024)[0]
    if dtype == torch.bfloat16 and any(p.expert is not None for p in decoder.projections):
        pytest.skip("torch multiplies stacks of bfloat16 in multiples of eight only")
    decoder.model.to(dtype)
    intact = last_hidden(decoder, batch)
    for p in decoder.projections:
        p.parameter.data.mul_(0.8)
        p.parameter.requires_grad_()
    held = gradients(decoder, batch, intact, monkeypatch)
    monkeypatch.setattr(pieces, "SHARE", 0.0)
    again = gradients(decoder, batch, intact, monkeypatch)
    assert held.keys() == again.keys()
    assert all(torch.equal(own, again[parameter]) for parameter, own in held.items())


def test_a_block_that_layers_share_moves_once_by_all_its_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama3").model
    first = model.model.layers[0].mlp
    alone = inspect_model(copy.deepcopy(model), None, name="alone")
    alone.model.model.layers[-1].mlp.load_state_dict(first.state_dict())
    model.model.layers[-1].mlp = first
    decoder = inspect_model(model, None, name="shared")
    batch = batches(EXAMPLES.examples[:1], max_batch_tokens=1024)[0]
    found = []
    for own in (decoder, alone):
        intact = last_hidden(own, batch)
        for parameter in own.model.parameters():
            parameter.data.mul_(0.8)
            parameter.requires_grad_()
        found.append(gradients(own, batch, intact, monkeypatch))
    both = [found[1][alone.model.model.layers[at].mlp.down_proj.weight] for at in (0, -1)]
    torch.testing.assert_close(found[0][first.down_proj.weight], both[1] + both[0])


def test_float16_is_refused_before_anything_changes() -> None:
    decoder = fresh("llama3")
    decoder.model.to(torch.float16)
    with pytest.raises(OptionError, match=r"float16.*--dtype bfloat16.*such as refit"):
        prune(decoder, Method("wanda", 0.5, update="distill"), calibration=EXAMPLES)
    assert all(bool(p.read().all()) for p in decoder.projections)


def test_a_slope_that_is_not_finite_stops_and_names_step_and_layer() -> None:
    decoder, batch = fresh("llama3"), BATCHES[0]
    intact = last_hidden(decoder, batch)
    decoder.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match=r"training step 1: .* model.layers.2 are not finite"):
        distillation.distill(decoder, [(batch, intact)], how=distillation.Training(), on_step=silent)
    assert all(bool(p.read().isfinite().all()) for p in decoder.projections)


def test_a_slope_of_weights_that_is_not_finite_moves_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer no slope at an output shows it."""
    decoder, batch, back = fresh("llama3"), BATCHES[0], distillation.Pieces.back
    intact = last_hidden(decoder, batch)

    def broken(self: distillation.Pieces, layer: int, *given: Any) -> Any:
        slopes, gradients = back(self, layer, *given)
        if layer == 0 and gradients[0] is not None:
            gradients[0][0, 0] = torch.inf
        return slopes, gradients

    monkeypatch.setattr(distillation.Pieces, "back", broken)
    with pytest.raises(ModelError, match=r"training step 1: slopes at layers\.0.* are not finite"):
        distillation.distill(decoder, [(batch, intact)], how=distillation.Training(), on_step=silent)
    assert all(bool(p.read().isfinite().all()) for p in decoder.projections)


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_nothing_is_written_where_inputs_are_not_numbers(family: str) -> None:
    decoder = fresh(family)
    decoder.model.get_input_embeddings().weight.data[:] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        prune(decoder, Method("magnitude", 0.5, update="refit"), calibration=EXAMPLES)


@pytest.mark.thorough
def test_two_runs_are_identical() -> None:
    one, two = fresh("qwen3_moe"), fresh("qwen3_moe")
    for decoder in (one, two):
        prune(decoder, Method("sparsegpt", 0.5, update="distill"), calibration=EXAMPLES)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.thorough
def test_steps_smaller_than_bfloat16_can_hold_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2e-3 of a weight is lost in bfloat16; forty of them, rounded by chance, are not."""
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


@pytest.mark.thorough
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
