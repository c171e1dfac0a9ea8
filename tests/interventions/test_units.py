"""Every kind of unit is removed as if its weights were zero, in every family, measured by both effects."""

from typing import get_args

import pytest
import torch
from families import FAMILIES, N_LAYERS
from reference import ROUNDING, calibration, example, logits, nats, removed, shared
from torch import Tensor

from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.core.errors import OptionError
from causalprune.core.types import Calibration, Decoder, Effects, Example, Unit, UnitKind
from causalprune.interventions.ablation import InputCache, capture
from causalprune.interventions.units import NAMES, list_units

DENSE = ("heads", "kv_groups", "attention", "mlp", "layers")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe")
EXAMPLES = calibration(((14, 5), (13, 9)), subsets=2)


def divergence(decoder: Decoder, unit: Unit, one: Example) -> float:
    """Return KL(intact ‖ masked) over the target predictions, in float64, from all logits."""
    own = slice(one.target_start - 1, len(one.tokens) - 1)
    p = logits(decoder.model, one.tokens).double().log_softmax(-1)[own]
    with removed(decoder, unit):
        q = logits(decoder.model, one.tokens).double().log_softmax(-1)[own]
    return float((p.exp() * (p - q)).sum())


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_is_the_naive_ablation(family: str) -> None:
    decoder = shared(family)
    mixture = family in MIXTURES
    names = (*DENSE, "experts") if mixture else (*DENSE, "neurons:16")
    effects = attribute(decoder, EXAMPLES, Question(names, "kl"), Estimator(max_batch_tokens=64))
    kinds = {unit.kind for unit in effects.units}
    assert len(kinds) == len(names)
    assert effects.kl_nats is not None
    for i, unit in enumerate(effects.units):
        with removed(decoder, unit):
            expected = torch.tensor([nats(decoder.model, e) for e in EXAMPLES.examples], dtype=torch.float64)
        torch.testing.assert_close(effects.masked_nats[i], expected, **ROUNDING)
        kl = torch.tensor([divergence(decoder, unit, e) for e in EXAMPLES.examples], dtype=torch.float64)
        torch.testing.assert_close(effects.kl_nats[i], kl, rtol=1e-4, atol=2e-6)
    assert bool((effects.kl_nats >= 0).all())
    assert float(effects.kl_nats.max()) > 1e-2, "nothing happened: the test is blind"


def test_every_name_of_units_is_a_kind() -> None:
    assert set(NAMES.values()) == set(get_args(UnitKind))


def test_units_of_a_model_by_hand() -> None:
    units = list(list_units(shared("mixtral"), ["kv_groups", "experts", "mlp"]))
    assert units[:6] == [
        Unit(0, 0, "kv_group"),
        Unit(0, 1, "kv_group"),
        Unit(0, 0, "expert"),
        Unit(0, 1, "expert"),
        Unit(0, 2, "expert"),
        Unit(0, 0, "mlp"),
    ]
    assert len(units) == 6 * N_LAYERS


def test_neurons_are_grouped_by_index_or_by_effect() -> None:
    decoder = shared("llama2")
    by_index = list_units(decoder, ["neurons:16"])
    sizes = [sum(map(len, parts.values())) for parts in by_index.values()]
    assert sizes == [16, 16, 8] * N_LAYERS
    effect = {layer: torch.arange(40.0).roll(7 * layer) for layer in range(N_LAYERS)}
    for unit, parts in list_units(decoder, ["neurons:16:effect"], effect).items():
        (neurons,) = parts.values()
        ranks = effect[unit.layer][neurons]
        assert sorted(ranks.tolist()) == list(range(unit.index * 16, min(40, unit.index * 16 + 16)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["haeds"], "heads"),
        (["heads:3"], "a size belongs to neurons"),
        (["neurons:0"], "neurons"),
        (["heads:effect"], "a size belongs to neurons"),
        (["neurons:8", "neurons:8:effect"], "each once"),
        (["heads", "heads"], "each once"),
        ([], "at least one"),
        (["experts"], "no units of kind 'expert'"),
    ],
)
def test_units_that_make_no_sense_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list_units(shared("llama2"), names)


def slow_replacement(decoder: Decoder, layer: int, head: int, instead: list[Tensor]) -> list[float]:
    """Return losses with a head's activations replaced by rows of `instead` (one `[time width]` per example)."""
    attention, found = decoder.layers[layer].attention, []
    own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    for one, rows in zip(EXAMPLES.examples, instead, strict=True):

        def replace(_: object, args: tuple[Tensor], rows: Tensor = rows) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[..., own] = rows[..., own]
            return (changed,)

        handle = attention.output.register_forward_pre_hook(replace)
        found.append(nats(decoder.model, one))
        handle.remove()
    return found


def heads_seen(decoder: Decoder, layer: int) -> list[Tensor]:
    """Return what reaches the output projection of a layer, for every example."""
    seen: list[Tensor] = []
    handle = decoder.layers[layer].attention.output.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].clone())
    )
    for one in EXAMPLES.examples:
        nats(decoder.model, one)
    handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
def test_other_ablations_put_the_mean_or_another_example_there(family: str) -> None:
    decoder = shared(family)
    found = {
        how: attribute(decoder, EXAMPLES, Question(ablation=how), Estimator(max_batch_tokens=64))
        for how in ("mean", "resample")
    }
    for i, unit in enumerate(found["mean"].units):
        seen = heads_seen(decoder, unit.layer)
        mean = torch.cat(seen).mean(0)
        expected = slow_replacement(decoder, unit.layer, unit.index, [mean.expand_as(x) for x in seen])
        torch.testing.assert_close(found["mean"].masked_nats[i].tolist(), expected, **ROUNDING)
        other = [seen[1 - k][torch.arange(len(x)) % len(seen[1 - k])] for k, x in enumerate(seen)]
        expected = slow_replacement(decoder, unit.layer, unit.index, other)
        torch.testing.assert_close(found["resample"].masked_nats[i].tolist(), expected, **ROUNDING)


def test_resampling_needs_company_and_experts_need_zeros() -> None:
    alone = Calibration(EXAMPLES.examples[:1], (0,))
    with pytest.raises(OptionError, match="at least 2"):
        attribute(shared("llama2"), alone, Question(ablation="resample"))
    with pytest.raises(OptionError, match="only be ablated with 'zero'"):
        attribute(shared("mixtral"), EXAMPLES, Question(("mlp",), ablation="mean"))
    three = calibration(((14, 5), (13, 9), (4, 2)))
    effects = attribute(shared("llama2"), three, Question(ablation="resample"), Estimator(max_batch_tokens=1))
    assert bool(effects.masked_nats.isfinite().all())


def routed(decoder: Decoder, one: Example) -> set[tuple[int, int]]:
    """Return the experts that a sequence reaches."""
    reached: set[tuple[int, int]] = set()
    handles = [
        layer.experts.register_forward_pre_hook(
            lambda _, args, at=layer.index: reached.update((at, e) for e in args[1].unique().tolist())
        )
        for layer in decoder.layers
        if layer.experts is not None
    ]
    nats(decoder.model, one)
    for handle in handles:
        handle.remove()
    return reached


@pytest.mark.parametrize("estimator", ["exact", "gradient", "adaptive"])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_experts_without_tokens_are_unmeasured_not_unimportant(family: str, estimator: str) -> None:
    decoder, one = shared(family), example(2, 1, seed=5)
    reached = routed(decoder, one)
    how = Estimator(estimator, until_certain=estimator == "adaptive")  # type: ignore[arg-type]
    effects: Effects = attribute(decoder, Calibration((one,), (0,)), Question(("experts",)), how)
    values = effects.change_nats() if effects.predicted_nats is None else effects.predicted_nats
    unmeasured = [
        (u.layer, u.index) for u, gone in zip(effects.units, values.isnan().all(1), strict=True) if gone
    ]
    assert unmeasured
    assert unmeasured == [(u.layer, u.index) for u in effects.units if (u.layer, u.index) not in reached]
    assert effects.description["unreached_experts"] == [list(unit) for unit in unmeasured]


def test_a_small_cache_changes_the_work_and_not_the_result() -> None:
    decoder = shared("llama3")
    groups = batches(EXAMPLES.examples, max_batch_tokens=1)
    inputs = [capture(decoder, batch.tokens, stop=N_LAYERS - 1) for batch in groups]
    runs = []
    for limit in (0.0, 1e9):
        cache = InputCache(decoder, groups, limit)
        for number, layer in [(0, 2), (1, 0), (1, 1), (1, 2), (0, 1), (0, 2)]:
            found = cache.get(number, layer).hidden[layer]
            assert torch.equal(found, inputs[number].hidden[layer])
        runs.append(cache.layers_run)
    assert runs == [2 + 2 + 1 + 1, 4]
    few, many = (attribute(decoder, EXAMPLES, estimator=Estimator(cache_gib=g)) for g in (0.0, 1.0))
    assert torch.equal(few.masked_nats, many.masked_nats)
