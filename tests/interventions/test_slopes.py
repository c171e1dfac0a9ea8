"""Slopes at outputs of matrices, and the criterion that multiplies them with weights and inputs."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from reference import ONE_ROUTE, calibration, fresh, restored, shared, with_expert_modules
from torch import Tensor, nn

from causalprune.calibration.examples import batches
from causalprune.core import resuming
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Calibration, Decoder, Layer
from causalprune.interventions import pieces
from causalprune.interventions.gradients import output_slopes
from causalprune.interventions.pieces import as_they_are
from causalprune.pruning.allocation import keep_matrix, keep_rows
from causalprune.pruning.criteria import Evidence, fisher, wanda
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.pruning.obs import BLOCK, DAMPING, inverse_factor
from causalprune.pruning.parts import Steps
from causalprune.pruning.scores import score
from causalprune.pruning.walks import Gathered, Plan, planned, walk
from causalprune.streaming.files import Seen, prune_stream

EXAMPLES = calibration(((14, 5), (13, 9), (9, 1)))


def found(decoder: Decoder, examples: Calibration = EXAMPLES, room: int = 2048) -> dict[str, Tensor]:
    return output_slopes(decoder, batches(examples.examples, max_batch_tokens=room))


def first_layer(
    decoder: Decoder, method: Method, examples: Calibration = EXAMPLES
) -> tuple[Plan, Gathered, Layer]:
    """Return what a walk has gathered when it comes to the first layer, and gradients where the method needs them."""
    plan = planned(decoder, method, {}, examples)
    gathered = Gathered(found(decoder, examples) if "slopes" in method.needs else {})
    moments = "moments" in method.needs
    return (
        plan,
        gathered,
        next(walk(plan, gathered, Steps(), advance_pruned=False, moments=moments)),
    )


def expected(decoder: Decoder, examples: Calibration = EXAMPLES) -> dict[str, Tensor]:
    """Return what one backward pass through the whole model says, sequence by sequence, for matrices in linear modules."""
    squares: dict[str, Any] = {}
    modules = {p.module for p in decoder.projections if type(p.module).__name__ in ("Linear", "Conv1D")}
    for one in examples.examples:
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Tensor, outputs: Any = outputs) -> None:
            output.requires_grad_() if output.is_leaf else None
            output.retain_grad()
            outputs[module] = output

        with ExitStack() as stack, torch.enable_grad():
            for module in modules:
                stack.callback(module.register_forward_hook(keep).remove)
            tokens = torch.tensor([one.tokens])
            logits = decoder.model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
            wanted = range(one.target_start, len(one.tokens))
            (-sum(logits[at - 1, one.tokens[at]] for at in wanted)).backward()
        for p in decoder.projections:
            if p.module in outputs and outputs[p.module].grad is not None:
                rows = slice(None) if p.rows is None else p.rows
                own = outputs[p.module].grad.flatten(0, -2)[:, rows].double().square().sum(0)
                squares[p.name] = squares.get(p.name, 0) + own
    count = sum(len(one.tokens) for one in examples.examples)
    return {name: (own / count).sqrt() for name, own in squares.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_those_of_a_whole_backward_pass(family: str) -> None:
    decoder = shared(family)
    own, other = found(decoder), expected(decoder)
    assert other
    for name, slope in other.items():
        assert bool(slope.any()), name
        torch.testing.assert_close(own[name], slope, rtol=1e-3, atol=1e-6)
    assert all(p.parameter.grad is None and not p.parameter.requires_grad for p in decoder.projections)


@pytest.mark.parametrize("examples", [EXAMPLES, ONE_ROUTE])
def test_stacked_experts_have_the_slopes_of_modules(examples: Calibration) -> None:
    stacked, modules = fresh("mixtral"), with_expert_modules()
    own, other, whole = (
        found(stacked, examples),
        found(modules, examples, room=1),
        expected(modules, examples),
    )
    assert own.keys() == other.keys() == whole.keys()
    assert (len(own) == len(stacked.projections)) == (examples is EXAMPLES)
    for name, slope in whole.items():
        torch.testing.assert_close(own[name], slope, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(other[name], slope, rtol=1e-3, atol=1e-6)


def test_batches_do_not_matter() -> None:
    decoder = shared("llama3")
    one, many = found(decoder), found(decoder, room=1)
    for name, slope in one.items():
        torch.testing.assert_close(slope, many[name], rtol=1e-3, atol=1e-6)


def test_equal_slopes_within_rows_are_wanda() -> None:
    weight, norm = torch.randn(6, 20), torch.rand(20) + 0.1
    counts = torch.full((6,), 9)
    score = fisher(weight, Evidence(input_norm=norm, output_slope=torch.full((6,), 0.3)))
    assert torch.equal(keep_rows(score, counts), keep_rows(wanda(weight, Evidence(input_norm=norm)), counts))
    rows = fisher(weight, Evidence(input_norm=norm, output_slope=torch.rand(6) + 0.1))
    assert torch.equal(keep_rows(rows, counts), keep_rows(score, counts)), (
        "within a row a slope is a constant"
    )
    one, two = shared("llama2"), fresh("llama2")
    with restored(one):
        kept = prune(one, Method("fisher", 0.5, "row"), calibration=EXAMPLES).keep
        other = prune(two, Method("wanda", 0.5), calibration=EXAMPLES).keep
        assert all(torch.equal(keep, other[name]) for name, keep in kept.items())


def predicted(decoder: Decoder, row: int, column: int) -> float:
    """Return half the square of the score of one weight of the first matrix: its predicted rise per token."""
    plan, gathered, _ = first_layer(decoder, Method("fisher", 0.5))
    return float(score(plan, gathered, decoder.projections[0])[row, column]) ** 2 / 2


def test_a_score_by_hand() -> None:
    decoder = shared("llama2")
    p = decoder.projections[0]
    rows = [
        decoder.model.model.layers[0].input_layernorm(
            decoder.model.get_input_embeddings()(torch.tensor(e.tokens))
        )
        for e in EXAMPLES.examples
    ]
    inputs = torch.cat(rows).detach().double().square().mean(0)
    slope = expected(decoder)[p.name]
    by_hand = float(p.read()[2, 3]) ** 2 * float(inputs[3]) * float(slope[2]) ** 2 / 2
    assert predicted(decoder, 2, 3) == pytest.approx(by_hand, rel=1e-3)


def test_an_expert_without_tokens_is_worth_what_its_siblings_are() -> None:
    decoder = shared("mixtral")
    plan, gathered, layer = first_layer(decoder, Method("fisher", 0.5), ONE_ROUTE)
    downs = [p for p in layer.projections if p.role == "down"]
    seen = [p for p in downs if gathered.norms.tokens.get(p.name)]
    assert 0 < len(seen) < len(downs)

    def mean(own: list[Tensor]) -> Tensor:
        return torch.cat(own).double().square().mean().sqrt()

    norms = [norm for p in seen if (norm := gathered.norms.root_mean_square(p)) is not None]
    factor = mean(norms) * mean([gathered.slopes[p.name] for p in seen])
    for p in downs:
        if p not in seen:
            torch.testing.assert_close(
                score(plan, gathered, p), p.read().abs() * factor.float(), rtol=1e-4, atol=0
            )


def test_unseen_experts_are_worth_what_their_siblings_are_to_sparsegpt() -> None:
    decoder = shared("mixtral")
    plan, gathered, layer = first_layer(decoder, Method("sparsegpt", 0.5, "global"), ONE_ROUTE)
    downs = [p for p in layer.projections if p.role == "down"]
    seen = [
        gathered.moments.hessians[p.name].diagonal() for p in downs if gathered.moments.tokens.get(p.name)
    ]
    known = torch.cat(seen).double().square().mean().sqrt().float()
    for p in downs:
        if not gathered.moments.tokens.get(p.name):
            torch.testing.assert_close(
                score(plan, gathered, p), p.read().square() * known * 1.01, rtol=1e-4, atol=0
            )
    assert 0 < len(seen) < len(downs)


def test_outputs_that_the_loss_does_not_depend_on_are_unknown() -> None:
    decoder = fresh("mixtral")
    layer = decoder.layers[-1]
    for p in layer.projections:
        if p.role == "down":
            p.write(torch.zeros(p.shape))  # nothing that leads to them matters any more
    found = output_slopes(decoder, batches(EXAMPLES.examples, max_batch_tokens=64))
    own = {p.role for p in layer.projections if p.name in found}
    assert own == {"q", "k", "v", "o", "down"}


@pytest.mark.parametrize("criterion", ["fisher", "snip"])
def test_what_the_loss_does_not_depend_on_goes_first_where_all_are_compared(criterion: str) -> None:
    decoder = fresh("llama3")
    own = {p.role: p for p in decoder.layers[-1].projections}
    own["down"].write(torch.zeros(own["down"].shape))
    keep = prune(decoder, Method(criterion, 0.5, "global"), calibration=EXAMPLES).keep
    assert not any(bool(keep[own[role].name].any()) for role in ("gate", "up"))


def test_slopes_that_are_not_finite_are_said_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    for method in (Method("causal", 0.5), Method("fisher", 0.5)):
        decoder = fresh("llama3")
        decoder.model.model.norm.weight.data[0] = torch.nan
        with pytest.raises(ModelError, match=r"slopes at the output of layers\..* are not finite: look for"):
            prune(decoder, method, calibration=EXAMPLES, max_batch_tokens=16, kept_in=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def same_masks(one: Method, other: Method, monkeypatch: pytest.MonkeyPatch, slope: float) -> bool:
    """Return whether two methods keep the same weights where gradients are the same at all outputs."""

    def equal(decoder: Decoder, *_: Any) -> dict[str, Tensor]:
        return {p.name: torch.full((p.shape[0],), slope) for p in decoder.projections}

    monkeypatch.setattr("causalprune.pruning.layers.output_slopes", equal)
    kept = [prune(fresh("olmoe"), method, calibration=EXAMPLES).keep for method in (one, other)]
    return all(torch.equal(keep, kept[1][name]) for name, keep in kept[0].items())


@pytest.mark.thorough
def test_causal_is_sparsegpt_where_gradients_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for scope in (None, "global"):
            causal = Method("causal", 0.5, scope, update="obs", budgets="uniform")
            assert same_masks(causal, Method("sparsegpt", 0.5, scope), patch, 0.25)
    kept = prune(fresh("olmoe"), causal, calibration=EXAMPLES).keep
    other = prune(fresh("olmoe"), Method("sparsegpt", 0.5, "global"), calibration=EXAMPLES).keep
    assert any(not torch.equal(keep, other[name]) for name, keep in kept.items())


@pytest.mark.thorough
@pytest.mark.parametrize("scope", ["row", "2:4"])
def test_no_gradients_are_taken_where_rows_are_not_compared(
    scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("causalprune.pruning.layers.output_slopes", None)  # a call would fail
    causal = Method("causal", 0.5, scope, update="obs", budgets="uniform")
    kept = prune(fresh("llama3"), causal, calibration=EXAMPLES).keep
    other = prune(fresh("llama3"), Method("sparsegpt", 0.5, scope), calibration=EXAMPLES).keep
    assert all(torch.equal(keep, other[name]) for name, keep in kept.items())
    assert causal.passes(30, 48, 10_000) < Method("causal", 0.5, update="obs", budgets="uniform").passes(
        30, 48, 10_000
    )


@pytest.mark.parametrize("family", ["llama3", "phi3", "mixtral"])
def test_causal_counts_errors_by_their_slopes(family: str) -> None:
    """In the first matrix, all of whose columns are one block, it is SparseGPT's scores of the intact weights times slopes."""
    decoder = fresh(family)
    p, slopes = decoder.projections[0], found(decoder)
    _, gathered, _ = first_layer(decoder, Method("sparsegpt", 0.5))
    upper = inverse_factor(gathered.moments.hessians[p.name], DAMPING, p.name)
    alike = (p.read() / upper.diagonal()).square()
    score = alike * slopes[p.name].float()[:, None]
    method = Method("causal", 0.5, update="obs", budgets="uniform")
    kept = prune(decoder, method, calibration=EXAMPLES).keep[p.name]
    assert torch.equal(kept, keep_matrix(score, p.size // 2))
    assert not torch.equal(kept, keep_matrix(alike, p.size // 2))
    assert p.shape[1] <= BLOCK


def test_progress_counts_the_way_back() -> None:
    seen: list[tuple[int, int]] = []
    method = Method("fisher", 0.5)
    prune(fresh("llama2"), method, calibration=EXAMPLES, on_progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert seen[-1][0] == seen[-1][1]


def test_streaming_says_that_gradients_need_the_model(tmp_path: Any) -> None:
    fresh("llama2").model.save_pretrained(tmp_path / "model")
    with pytest.raises(OptionError, match="leave out --stream"):
        prune_stream(tmp_path / "model", tmp_path / "out", Method("fisher", 0.5), seen=Seen(EXAMPLES))


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_run_again_and_all_batches_together_give_the_same_slopes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, groups = shared(family), batches(EXAMPLES.examples, max_batch_tokens=14)
    held = output_slopes(decoder, groups)
    assert held
    monkeypatch.setattr(pieces, "SHARE", 0.0)
    again, together = output_slopes(decoder, groups), output_slopes(decoder, groups, hold=as_they_are)
    for name, own in held.items():
        assert torch.equal(again[name], own)
        assert torch.equal(together[name], own)
