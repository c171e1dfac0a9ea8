"""Exactly the least important weights become zero, by every criterion in every scope and family."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import micro
import pytest
import torch
from families import FAMILIES
from reference import (
    ONE_ROUTE,
    calibration,
    example,
    fresh,
    logits,
    lowest_go,
    restored,
    shared,
    weights,
    with_expert_modules,
)
from torch import Tensor

from causalprune.attribution.estimators import attribute
from causalprune.core.errors import MismatchError, ModelError, OptionError
from causalprune.core.types import Calibration, Decoder, Effects, Example, Unit
from causalprune.interventions.statistics import InputNorms
from causalprune.models.anatomy import fingerprint
from causalprune.pruning.allocation import prune_counts, spread
from causalprune.pruning.criteria import CRITERIA, SCOPES, Evidence, wanda
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.pruning.pruned import Pruned

every_family = pytest.mark.parametrize("family", FAMILIES)
every_criterion = pytest.mark.parametrize("criterion", CRITERIA)
EXAMPLES = calibration()
ONE_BATCH = calibration(((14, 5), (13, 9)))


def effects_for(decoder: Decoder, seed: int = 0) -> Effects:
    """Return effects that no model was run for."""
    units = tuple(Unit(layer.index, h) for layer in decoder.layers for h in range(layer.attention.n_heads))
    masked = torch.rand(len(units), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    intact, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.long)
    return Effects(units, masked, intact, ones, torch.arange(3), fingerprint(decoder.model), "calibration")


def run(decoder: Decoder, method: Method, **options: Any) -> Pruned:
    return prune(decoder, method, calibration=ONE_BATCH, effects=effects_for(decoder), **options)


def assert_pruned(decoder: Decoder, before: dict[str, Tensor], pruned: Pruned) -> None:
    """Check that the keep masks say what happened, and that nothing else happened."""
    assert list(pruned.keep) == list(before)
    for projection in decoder.projections:
        keep, was, now = pruned.keep[projection.name], before[projection.name], projection.read()
        assert (was != 0).all(), "a weight was zero before: the test is blind"
        assert torch.equal(now != 0, keep)
        if pruned.method.resolved_update == "none":
            assert torch.equal(now[keep], was[keep])


@every_family
@every_criterion
def test_the_exact_number_goes_and_the_rest_is_untouched(family: str, criterion: str) -> None:
    decoder = shared(family)
    method = Method(criterion, sparsity=0.37)
    with restored(decoder) as before:
        intact = weights(decoder)
        pruned = run(decoder, method)
        assert_pruned(decoder, intact, pruned)
        assert pruned.method == method
        zeros = sum(int((~keep).sum()) for keep in pruned.keep.values())
        assert zeros == math.floor(0.37 * sum(w.numel() for w in intact.values()) + 0.5)
        in_pool = {p.parameter_name for p in decoder.projections}
        now = dict(decoder.model.named_parameters())
        assert sum(int((p == 0).sum()) for name, p in now.items() if name in in_pool) == zeros
        for name, parameter in now.items():
            assert (name in in_pool) != torch.equal(parameter, before[name]), name
            never = (
                "embed",
                "wte",
                "wpe",
                "head",
                "norm",
                "bias",
                "router",
                ".gate.weight",
                "shared_expert_gate",
            )
            assert not (name in in_pool and (parameter.ndim == 1 or any(part in name for part in never))), (
                name
            )


@every_criterion
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["gpt_neox", "olmoe"])  # interleaved and stacked matrices
def test_each_scope_has_its_own_budget_everywhere(family: str, criterion: str, scope: str) -> None:
    decoder = shared(family)
    with restored(decoder):
        before = weights(decoder)
        pruned = run(decoder, Method(criterion, 0.61, scope, budgets="uniform"))
        assert_pruned(decoder, before, pruned)
    sizes = [w.numel() for w in before.values()]
    gone = [int((~keep).sum()) for keep in pruned.keep.values()]
    assert sum(gone) == math.floor(0.61 * sum(sizes) + 0.5)
    if scope == "global":
        assert max(abs(g - 0.61 * s) for g, s in zip(gone, sizes, strict=True)) > 1 or criterion == "random"
    else:
        assert gone == prune_counts(sizes, 0.61)
    if scope == "row":
        for keep, count in zip(pruned.keep.values(), gone, strict=True):
            assert (~keep).sum(1).tolist() == spread(count, len(keep)).tolist()


@pytest.mark.thorough
@every_criterion
def test_two_runs_are_identical(criterion: str) -> None:
    for scope in (None, "global"):
        one, two = fresh("mixtral"), fresh("mixtral")
        method = Method(criterion, 0.5, scope)
        kept, again = run(one, method).keep, run(two, method).keep
        assert all(torch.equal(kept[name], again[name]) for name in kept)
        for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
            assert torch.equal(a, b)


@every_family
def test_magnitude_is_a_stable_sort_of_each_matrix(family: str) -> None:
    decoder = shared(family)
    with restored(decoder):
        before = weights(decoder)
        pruned = prune(decoder, Method("magnitude", 0.3))
    for (name, weight), count in zip(
        before.items(), prune_counts([w.numel() for w in before.values()], 0.3), strict=True
    ):
        (expected,) = lowest_go([weight.abs()], count)
        assert torch.equal(pruned.keep[name], torch.tensor(expected))


@pytest.mark.parametrize("sparsity", [0.05, 0.13, 0.2, 0.33, 0.5, 0.61, 0.87])
def test_cap_on_the_micro_model_is_what_the_method_says(sparsity: float) -> None:
    decoder = micro.decoder()
    ranking = micro.ranking()
    count = math.floor(sparsity * len(ranking) + 0.5)
    last, first = ranking[count - 1][0], ranking[count][0]
    assert first == last or first > last * (1 + 1e-4), (
        "too close for float32 to decide: choose another sparsity"
    )
    pruned = prune(decoder, Method("cap", sparsity), effects=attribute(decoder, micro.CALIBRATION))
    expected = {name: torch.tensor(weight, dtype=torch.float32) for name, weight in micro.weights().items()}
    for _, name, i, j in ranking[:count]:
        expected[name][i, j] = 0
    for name, weight in decoder.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    gone = {(name, i, j) for _, name, i, j in ranking[:count]}
    for projection in decoder.projections:
        for i, j in product(*map(range, projection.shape)):
            assert bool(pruned.keep[projection.name][i, j]) != ((projection.parameter_name, i, j) in gone)


def test_the_micro_model_has_ties_at_its_borders() -> None:
    ranking = micro.ranking()
    borders = [math.floor(s * len(ranking) + 0.5) for s in (0.05, 0.13, 0.2, 0.33, 0.5, 0.61, 0.87)]
    assert sum(ranking[k - 1][0] == ranking[k][0] for k in borders) >= 5


def test_cap_with_equal_effects_is_magnitude() -> None:
    one, two = fresh("qwen3"), fresh("qwen3")
    effects = effects_for(one)
    flat = replace(effects, masked_nats=torch.full((12, 3), 0.25, dtype=torch.float64))
    by_effects = prune(one, Method("cap", 0.4), effects=flat).keep
    by_magnitude = prune(two, Method("magnitude", 0.4, "global")).keep
    assert all(torch.equal(by_effects[name], by_magnitude[name]) for name in by_effects)
    uneven = prune(fresh("qwen3"), Method("cap", 0.4), effects=effects).keep
    assert not all(torch.equal(uneven[name], by_magnitude[name]) for name in uneven)


def linear_inputs(decoder: Decoder, layer: int) -> dict[str, Tensor]:
    """Return the root mean square inputs of the matrices of one layer, from whole passes by themselves."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for p in decoder.layers[layer].projections:
        rows = seen.setdefault(p.name, [])
        handles.append(p.module.register_forward_pre_hook(lambda _, a, rows=rows: rows.append(a[0][0])))
    for one in EXAMPLES.examples:
        logits(decoder.model, one.tokens)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double().square().mean(0).sqrt() for name, rows in seen.items()}


def wanda_by_hand(decoder: Decoder, sparsity: float, *, advance: bool = True) -> dict[str, Tensor]:
    """Prune layer by layer, each on what the layers before it now give; return what stays."""
    every = [p for layer in decoder.layers for p in layer.projections]
    counts = dict(zip([p.name for p in every], prune_counts([p.size for p in every], sparsity), strict=True))
    intact = [linear_inputs(decoder, layer.index) for layer in decoder.layers]
    keeps: dict[str, Tensor] = {}
    for layer in decoder.layers:
        norms = linear_inputs(decoder, layer.index) if advance else intact[layer.index]
        for p in layer.projections:
            weight = p.read().clone()
            keep = torch.ones_like(weight, dtype=torch.bool)
            for i, count in enumerate(spread(counts[p.name], len(weight)).tolist()):
                score = weight[i].abs().double() * norms[p.name]
                keep[i, score.argsort(stable=True)[:count]] = False
            keeps[p.name] = keep
            p.write(weight * keep)
    return keeps


@pytest.mark.parametrize("room", [1, 28, 2048])
def test_wanda_sees_the_inputs_that_pruned_layers_give(room: int) -> None:
    decoder, by_hand, blind = fresh("llama3"), fresh("llama3"), fresh("llama3")
    pruned = prune(decoder, Method("wanda", 0.5), calibration=EXAMPLES, max_batch_tokens=room)
    expected = wanda_by_hand(by_hand, 0.5)
    for name, keep in pruned.keep.items():
        assert torch.equal(keep, expected[name]), name
    for a, b in zip(decoder.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(a, b)
    from_intact = wanda_by_hand(blind, 0.5, advance=False)
    assert any(not torch.equal(from_intact[name], expected[name]) for name in expected)


def test_global_wanda_sees_the_inputs_of_the_intact_model() -> None:
    decoder = fresh("llama3")
    before = weights(decoder)
    norms: dict[str, Tensor] = {}
    for layer in decoder.layers:
        norms |= linear_inputs(decoder, layer.index)
    scores = [(before[name].double().abs() * norms[name]).float() for name in before]
    count = math.floor(0.5 * sum(s.numel() for s in scores) + 0.5)
    pruned = prune(decoder, Method("wanda", 0.5, "global"), calibration=EXAMPLES)
    for (name, keep), expected in zip(pruned.keep.items(), lowest_go(scores, count), strict=True):
        assert torch.equal(keep, torch.tensor(expected)), name


def test_wanda_with_equal_norms_is_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wanda(weight, Evidence(input_norm=torch.full((8,), 2.0))), 2 * weight.abs())
    one, two = fresh("phi3"), fresh("phi3")
    by_magnitude = prune(one, Method("magnitude", 0.5, "row")).keep
    unequal = prune(fresh("phi3"), Method("wanda", 0.5), calibration=EXAMPLES).keep
    assert any(not torch.equal(unequal[name], by_magnitude[name]) for name in unequal)
    monkeypatch.setattr(InputNorms, "root_mean_square", lambda _, p: torch.full((p.shape[1],), 0.5))
    by_norms = prune(two, Method("wanda", 0.5), calibration=EXAMPLES).keep
    assert all(torch.equal(by_norms[name], by_magnitude[name]) for name in by_norms)


def test_random_depends_on_seed_and_matrix_only() -> None:
    def kept(seed: int, scope: Any = None) -> list[Tensor]:
        return list(prune(fresh("llama2"), Method("random", 0.5, scope, seed=seed)).keep.values())

    zero, again, one = kept(0), kept(0), kept(1)
    assert all(map(torch.equal, zero, again))
    assert not any(map(torch.equal, zero, one))
    assert not torch.equal(zero[0], zero[1])  # q and k of one shape


def test_experts_without_tokens_are_named_and_go_by_magnitude() -> None:
    decoder = fresh(
        "olmoe"
    )  # equal tokens have equal hidden states: they all go to the same two of four experts
    before = weights(decoder)
    equal = Calibration((Example((7,) * 6, 1, "equal", ""), Example((7,) * 4, 1, "equal", "")), (0, 0))
    pruned = prune(decoder, Method("wanda", 0.5), calibration=equal)
    assert len(pruned.unrouted) == 3 * 2 * 3  # layers, experts, matrices
    for layer in decoder.layers:
        own = [name for name in pruned.unrouted if name.startswith(f"layers.{layer.index}.experts.")]
        assert len(own) == 6
    by_magnitude = prune(fresh("olmoe"), Method("magnitude", 0.5, "row")).keep
    for name, keep in pruned.keep.items():
        assert torch.equal(keep, by_magnitude[name]) == (name in pruned.unrouted), name
    assert_pruned(decoder, before, pruned)
    assert run(fresh("olmoe"), Method("magnitude", 0.5)).unrouted == ()
    assert run(fresh("llama2"), Method("wanda", 0.5)).unrouted == ()


@pytest.mark.parametrize("examples", [EXAMPLES, ONE_ROUTE])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_experts_that_are_modules_lose_what_stacked_ones_lose(examples: Calibration, criterion: str) -> None:
    stacked, modules = fresh("mixtral"), with_expert_modules()
    expected = prune(stacked, Method(criterion, 0.5), calibration=examples)
    found = prune(modules, Method(criterion, 0.5), calibration=examples)
    assert list(found.keep) == list(expected.keep)
    for name, keep in found.keep.items():
        differing = (keep != expected.keep[name]).float().mean()
        assert differing < 0.005, name  # ties: rounding decides where all inputs are equal
    assert found.unrouted == expected.unrouted
    assert bool(found.unrouted) == (examples is not EXAMPLES)


@every_criterion
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(criterion: str) -> None:
    for value, scope in product((float("nan"), float("inf")), (None, "global")):
        decoder = fresh("phi3")
        projection = decoder.layers[1].projections[5]
        row = projection.read()[2]
        row[3] = value
        before = {name: p.clone() for name, p in decoder.model.named_parameters()}
        with pytest.raises(
            ModelError, match=r"model\.layers\.1\.mlp\.gate_up_proj\.weight \(layers\.1\.up\)"
        ):
            run(decoder, Method(criterion, 0.5, scope))
        for name, parameter in decoder.model.named_parameters():
            assert torch.equal(parameter.nan_to_num(7), before[name].nan_to_num(7))


def test_inputs_that_are_not_finite_are_an_error() -> None:
    decoder = fresh("llama2")
    decoder.model.get_input_embeddings().weight.data[:, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight .* not finite"):
        prune(decoder, Method("wanda", 0.5), calibration=EXAMPLES)


def test_what_a_criterion_needs_must_be_there() -> None:
    decoder = shared("llama2")
    other = effects_for(shared("llama3"))
    with restored(decoder) as before:
        with pytest.raises(OptionError, match="needs effects"):
            prune(decoder, Method("cap", 0.5), calibration=EXAMPLES)
        with pytest.raises(OptionError, match="'wanda' needs calibration"):
            prune(decoder, Method("wanda", 0.5), effects=effects_for(decoder))
        with pytest.raises(MismatchError, match="another model"):
            prune(decoder, Method("cap", 0.5), effects=other)
        assert all(torch.equal(p, before[name]) for name, p in decoder.model.named_parameters())


@every_criterion
def test_a_sparsity_of_nearly_nothing_changes_no_bit(criterion: str) -> None:
    decoder = shared("gemma2")
    for scope in SCOPES:
        with restored(decoder) as before:
            keep = run(decoder, Method(criterion, 1e-7, scope)).keep
            assert all(bool(k.all()) for k in keep.values())
            assert all(torch.equal(p, before[name]) for name, p in decoder.model.named_parameters())


@pytest.mark.thorough
def test_a_bfloat16_model_keeps_its_bits() -> None:
    for criterion in CRITERIA:
        decoder = fresh("llama3")
        decoder.model.bfloat16()
        before = weights(decoder)
        pruned = run(decoder, Method(criterion, 0.5))
        assert decoder.projections[0].read().dtype == torch.bfloat16
        assert_pruned(decoder, before, pruned)
        gone = sum(int((~keep).sum()) for keep in pruned.keep.values())
        assert gone == math.floor(0.5 * sum(w.numel() for w in before.values()) + 0.5)


def test_weights_that_are_zero_already_go_first_and_count() -> None:
    decoder = fresh("llama2")
    projection = decoder.projections[2]
    weight = projection.read()
    weight.flatten()[::3] = 0
    pruned = prune(decoder, Method("magnitude", 0.5))
    keep = pruned.keep[projection.name]
    assert not keep.flatten()[::3].any()
    assert int((projection.read() == 0).sum()) == int((~keep).sum()) == weight.numel() // 2


def test_progress_counts_layers() -> None:
    for criterion in ("wanda", "magnitude"):
        seen: list[tuple[int, int]] = []
        run(fresh("llama2"), Method(criterion, 0.5), on_progress=lambda *now, seen=seen: seen.append(now))
        thirds = [round(3 * done / total, 2) for done, total in seen]
        assert sorted({0, *thirds}) == [0, 1, 2, 3]
        assert thirds == sorted(thirds)


def test_longer_calibration_than_a_batch() -> None:
    decoder = fresh("mistral")
    long = Calibration((example(40, 1), example(12, 1)), (0, 0))
    pruned = prune(decoder, Method("wanda", 0.5), calibration=long, max_batch_tokens=16)
    again = prune(fresh("mistral"), Method("wanda", 0.5), calibration=long, max_batch_tokens=4096)
    assert all(torch.equal(keep, again.keep[name]) for name, keep in pruned.keep.items())
