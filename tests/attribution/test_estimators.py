"""Estimators agree with exact effects as far as they promise, and their intervals say how far."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from reference import ROUNDING, calibration, shared
from torch import Tensor

from causalprune.attribution import estimators, questions
from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.attribution.sampling import Allocation, next_cells, settled
from causalprune.attribution.uncertainty import (
    estimate,
    posterior,
    reliability,
    scores,
    spearman,
    top_overlap,
)
from causalprune.calibration.examples import batches
from causalprune.core.errors import OptionError
from causalprune.core.types import Effects, Unit
from causalprune.interventions.ablation import gated
from causalprune.interventions.gradients import expansion, neuron_effects, uniforms
from causalprune.interventions.losses import by_row, cross_entropy, divergence, target_logits, targets
from causalprune.interventions.units import list_units, sites

EXAMPLES = calibration(((14, 5), (13, 9), (12, 4), (9, 1), (11, 3), (14, 2)))
UNITS = Question(("heads", "mlp"))


@pytest.mark.parametrize(
    ("family", "gate"), [("llama3", 1.0), ("llama3", 0.6), ("gemma2", 1.0), ("gpt2", 0.6), ("mixtral", 1.0)]
)
def test_the_gradient_is_the_finite_difference(family: str, gate: float) -> None:
    decoder = shared(family)
    (batch,) = batches(calibration(((14, 5), (13, 9))).examples, max_batch_tokens=64)
    units, wanted = list_units(decoder, UNITS.units), targets(batch)
    step = 2e-3 if family == "mixtral" else 2e-2  # a larger one reroutes tokens: the loss jumps
    _, slope, _ = expansion(decoder, batch, list(units.values()), torch.zeros(0, len(wanted.rows)), gate=gate)
    size = sites(decoder)

    def loss(parts: dict, value: float) -> Tensor:
        every = {site for own in units.values() for site in own}
        gates = {site: torch.full((2, size[site]), gate) for site in every}
        for site, index in parts.items():
            gates[site][:, index] = value
        with torch.inference_mode(), gated(decoder, gates):
            return by_row(cross_entropy(target_logits(decoder, batch, wanted), wanted), wanted)

    for i, parts in enumerate(units.values()):
        difference = (loss(dict(parts), gate - step) - loss(dict(parts), gate + step)) / (2 * step)
        torch.testing.assert_close(
            slope[i], difference, rtol=2e-2, atol=1e-2 if family == "mixtral" else 2e-3
        )
    assert float(slope.abs().max()) > 0.05, "nothing happened: the test is blind"


def test_every_name_of_an_estimator_has_a_function() -> None:
    assert get_args(questions.Named) == questions.ESTIMATORS
    assert {Estimator(name).name for name in questions.ESTIMATORS} == set(estimators.ESTIMATORS)


@pytest.mark.thorough
def test_the_fisher_term_is_the_divergence_of_a_small_step() -> None:
    decoder, draws, step = shared("llama3"), 600, 3e-2
    examples = calibration(((14, 5),)).examples
    (batch,) = batches(examples, max_batch_tokens=64)
    units, wanted = list_units(decoder, ["mlp"]), targets(batch)
    _, _, second = expansion(decoder, batch, list(units.values()), uniforms(examples, batch, draws, 0))
    with torch.inference_mode():
        intact = target_logits(decoder, batch, wanted)
        for i, parts in enumerate(units.values()):
            gates = {site: torch.full((1, sites(decoder)[site]), 1 - step) for site in parts}
            with gated(decoder, gates):
                masked = target_logits(decoder, batch, wanted)
            kl = float(divergence(intact, torch.arange(len(intact)), masked).sum())
            assert float(second[i, 0]) == pytest.approx(kl / step**2, rel=0.25)


@pytest.mark.parametrize("effect", ["ce", "kl"])
def test_predictions_do_not_depend_on_batches_or_order(effect: str) -> None:
    decoder = shared("llama3")
    found = [
        attribute(
            decoder,
            EXAMPLES,
            Question(effect=effect),
            Estimator("gradient", draws=2, max_batch_tokens=room),  # type: ignore[arg-type]
        ).predicted_nats
        for room in (1, 64)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_more_gate_values_integrate_along_the_path() -> None:
    decoder = shared("llama3")
    one, half, both = (
        attribute(decoder, EXAMPLES, UNITS, Estimator("gradient", draws=0, gates=gates)).predicted_nats
        for gates in ((1.0,), (0.5,), (1.0, 0.5))
    )
    assert one is not None
    assert half is not None
    torch.testing.assert_close(both, (one + half) / 2, **ROUNDING)


def test_the_intact_loss_is_that_of_open_gates() -> None:
    open_gates, half = (
        attribute(shared("llama3"), EXAMPLES, UNITS, Estimator("gradient", draws=0, gates=gates)).intact_nats
        for gates in ((1.0,), (0.5,))
    )
    torch.testing.assert_close(half, open_gates, **ROUNDING)


def test_the_first_cells_of_a_unit_are_the_first_of_the_order() -> None:
    effects, _ = made_up(2, 1, 0.0)
    order = torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()
    lengths = torch.zeros(2, dtype=torch.long)
    lengths[order] = torch.tensor([100, 1])  # only the second is within the room
    plan = Allocation(torch.zeros(200, dtype=torch.long), lengths, depth=4, seed=0)
    assert next_cells(effects, plan, 50.0) == []
    assert {sequence for _, sequence in next_cells(effects, plan, 500.0)} == set(order)


@pytest.mark.thorough
def test_adaptive_keeps_to_its_budget_and_approaches_exact(tmp_path: Path) -> None:
    decoder = shared("gemma2")
    exact = attribute(decoder, EXAMPLES, UNITS)
    truth, errors = exact.paired_delta_nats(), []
    for budget in (2.0, 1.4):
        how = Estimator("adaptive", budget=budget)
        effects = attribute(decoder, EXAMPLES, UNITS, how, ledger=tmp_path / f"{budget}")
        spent, naive = (effects.description[key] for key in ("tokens_forwarded", "naive_tokens"))
        assert naive == (15 + 1) * sum(len(e.tokens) for e in EXAMPLES.examples)
        assert naive / budget * 0.5 < spent <= naive / budget
        again = attribute(decoder, EXAMPLES, UNITS, how, ledger=tmp_path / f"{budget}")
        assert torch.equal(effects.masked_nats.nan_to_num(7.0), again.masked_nats.nan_to_num(7.0))
        there = effects.masked_nats.isfinite()
        torch.testing.assert_close(effects.masked_nats[there], exact.masked_nats[there], **ROUNDING)
        errors.append(float((scores(effects) - truth).abs().mean()))
    alone = attribute(decoder, EXAMPLES, UNITS, Estimator("gradient"))
    assert errors[1] < errors[0] < float((scores(alone) - truth).abs().mean())


def test_adaptive_stops_when_the_top_fifth_is_settled() -> None:
    decoder = shared("gemma2")
    effects = attribute(decoder, EXAMPLES, Question(), Estimator("adaptive", until_certain=True))
    exact = attribute(decoder, EXAMPLES, Question())
    assert settled(effects) >= 0.95 or bool(effects.masked_nats.isfinite().all())
    assert top_overlap(scores(effects), exact.paired_delta_nats()) >= 0.5


def made_up(n: int, seed: int, measured: float) -> tuple[Effects, Tensor]:
    """Return effects of 200 units whose predictions err as the method assumes, and their true means."""
    random = torch.Generator().manual_seed(seed)
    curvature = torch.rand(200, generator=random, dtype=torch.float64).exp() * 0.05
    truth = torch.randn(200, generator=random, dtype=torch.float64) * 0.1
    slopes = torch.randn(200, n, generator=random, dtype=torch.float64) * 0.3
    slopes -= slopes.mean(1, keepdim=True)
    bias = curvature * (0.2 + 0.4 * torch.randn(200, generator=random, dtype=torch.float64))
    noise = torch.randn(200, n, generator=random, dtype=torch.float64) * curvature[:, None]
    noise -= noise.mean(1, keepdim=True)
    change = truth[:, None] + slopes + noise
    predicted = truth[:, None] - bias[:, None] + slopes
    there = torch.rand(200, n, generator=random) < measured
    effects = Effects(
        units=tuple(Unit(0, i) for i in range(200)),
        masked_nats=torch.where(there, change, torch.nan),
        intact_nats=torch.zeros(n, dtype=torch.float64),
        tokens=torch.ones(n, dtype=torch.long),
        subset=torch.arange(n) % 3,
        model_fingerprint="m",
        calibration_fingerprint="c",
        predicted_nats=predicted,
        curvature_nats=curvature,
    )
    return effects, change.mean(1)


@pytest.mark.parametrize("measured", [0.03, 0.2, 1.0])
def test_the_posterior_covers_the_truth(measured: float) -> None:
    inside, errors, raw = [], [], []
    for seed in range(10):
        effects, truth = made_up(40, seed, measured)
        known = posterior(effects)
        predicted = effects.predicted_nats
        assert predicted is not None
        error = predicted.mean(1) + known.correction - truth
        inside.append((error.abs() <= 1.96 * known.variance.sqrt() + 1e-12).double().mean())
        errors.append(error.square().mean())
        raw.append((predicted.mean(1) - truth).square().mean())
    assert 0.9 <= float(torch.stack(inside).mean()) <= 1.0
    assert float(torch.stack(errors).mean()) < 0.75 * float(torch.stack(raw).mean())
    if measured == 1.0:
        assert max(map(float, errors)) < 1e-20, "all measured: nothing is left to predict"


def test_predictions_that_no_cell_checked_own_up_to_their_error() -> None:
    effects, truth = made_up(40, 0, 0.0)
    assert effects.predicted_nats is not None
    flat = effects.predicted_nats.mean(1, keepdim=True).expand(-1, 40)  # as the divergence is predicted
    bounds = [
        estimate(replace(effects, predicted_nats=flat, curvature_nats=known))
        for known in (effects.curvature_nats, None)
    ]
    inside = [float(((b.low <= truth) & (truth <= b.high)).double().mean()) for b in bounds]
    assert inside[0] > 0.85
    assert inside[1] < 0.05, "without a second-order part there is nothing to go by"


def test_intervals_of_exact_effects_cover_the_mean_of_all_sequences() -> None:
    random, inside = torch.Generator().manual_seed(0), []
    tokens = torch.randint(20, 200, (4000,), generator=random)
    change = (0.02 + torch.randn(40, 4000, generator=random, dtype=torch.float64) * 0.3) * tokens
    whole = change.sum(1) / tokens.sum()
    for start in range(0, 4000, 10):
        own = slice(start, start + 10)
        part = Effects(
            units=tuple(Unit(0, i) for i in range(40)),
            masked_nats=change[:, own],
            intact_nats=torch.zeros(10, dtype=torch.float64),
            tokens=tokens[own],
            subset=torch.arange(10) % 3,
            model_fingerprint="m",
            calibration_fingerprint="c",
        )
        found = estimate(part)
        inside.append(((found.low <= whole) & (whole <= found.high)).double().mean())
    assert 0.92 <= float(torch.stack(inside).mean()) <= 0.98


def test_intervals_of_divergences_are_positive_and_cover() -> None:
    random, inside, plain = np.random.default_rng(0), [], []
    for _ in range(300):
        tokens = torch.tensor(random.integers(50, 150, 8))
        cells = torch.tensor(random.gamma(1.0, 0.02, (40, 8))) * tokens  # true mean: 0.02
        part = Effects(
            units=tuple(Unit(0, i) for i in range(40)),
            masked_nats=cells,
            intact_nats=torch.zeros(8, dtype=torch.float64),
            tokens=tokens,
            subset=torch.arange(8) % 3,
            model_fingerprint="m",
            calibration_fingerprint="c",
            effect="kl",
            kl_nats=cells,
        )
        found, other = estimate(part), estimate(replace(part, effect="ce", kl_nats=None))
        assert bool((found.low > 0).all())
        inside.append(((found.low <= 0.02) & (found.high >= 0.02)).double().mean())
        plain.append(((other.low <= 0.02) & (other.high >= 0.02)).double().mean())
    assert 0.92 <= float(torch.stack(inside).mean()) <= 0.98
    assert float(torch.stack(plain).mean()) < 0.92, "skewed data that defeat the symmetric interval"


def test_cells_go_where_the_ranking_is_open_and_within_the_room() -> None:
    effects, _ = made_up(40, 1, 0.2)
    lengths = torch.full((40,), 10)
    plan = Allocation(torch.tensor([i % 4 for i in range(200)]), lengths, depth=4, seed=0)
    cells = next_cells(effects, plan, 500.0)
    costs = [10 * (4 - unit % 4) / 4 for unit, _ in cells]
    assert 480 < sum(costs) <= 500
    assert len(set(cells)) == len(cells)
    gained = sum(len(cells) - len([c for c in cells if c[0] % 4 != k]) for k in (3,))
    assert gained > len(cells) / 4, "cells of late layers are cheap and should be bought more often"
    assert next_cells(effects, plan, 1.0) == []


def test_reliability_of_noise_and_of_signal() -> None:
    noise, _ = made_up(40, 3, 1.0)
    signal = Effects(
        **{
            **vars(noise),
            "masked_nats": torch.arange(200.0).double()[:, None].expand(200, 40),
            "predicted_nats": None,
        }
    )
    assert reliability(signal)["split_half"] == pytest.approx(1.0)
    assert reliability(signal)["split_half_top_fifth"] == 1.0
    assert reliability(signal)["between_subsets"] == pytest.approx(1.0)
    random = torch.randn(200, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing = Effects(**{**vars(noise), "masked_nats": random, "predicted_nats": None})
    assert abs(reliability(nothing)["split_half"]) < 0.15
    assert reliability(nothing)["certain_signs"] < 0.12


def test_rank_correlation_by_hand() -> None:
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 40])) == pytest.approx(0.8)
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([5.0, 6, 9])) == pytest.approx(0.8660254)
    assert top_overlap(torch.arange(10.0), torch.arange(10.0).roll(1)) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 20.0}, "belongs to the estimator 'adaptive'"),
        ({"name": "adaptive", "budget": 0.5}, "above 1"),
        ({"name": "gradient", "gates": ()}, "gates"),
        ({"name": "gradients"}, "unknown estimator 'gradients': did you mean 'gradient'"),
        ({"share": (3, 2)}, "share 3/2: the first number counts from 1"),
        ({"name": "gradient", "share": (1, 2)}, "only the estimator 'exact' can be shared out"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Estimator(**options)


def test_a_budget_below_the_prediction_is_refused() -> None:
    with pytest.raises(OptionError, match=r"costs 1/3 of naive"):
        attribute(shared("llama2"), EXAMPLES, Question(), Estimator("adaptive", budget=50.0))
    with pytest.raises(OptionError, match="needs another estimator than 'adaptive'"):
        attribute(shared("llama2"), EXAMPLES, Question(ablation="resample"), Estimator("adaptive"))


def test_neurons_of_similar_effect_share_a_group() -> None:
    decoder = shared("llama3")
    groups = batches(EXAMPLES.examples, max_batch_tokens=64)
    slopes, every = neuron_effects(decoder, groups), list_units(decoder, ["neurons:1"])
    alone = torch.zeros(len(every), dtype=torch.float64)
    for batch in groups:
        alone += expansion(decoder, batch, list(every.values()), torch.zeros(0, 0))[1].sum(1)
    torch.testing.assert_close(torch.cat([slopes[i] for i in sorted(slopes)]), alone)

    found = attribute(decoder, EXAMPLES, Question(units=("neurons:16:effect",)))
    held = found.description["neurons"]
    assert len(held) == len(found.units)
    for layer, own in slopes.items():
        ranked = [own[held[f"{layer}.{i}"]] for i in range(3)]
        assert all(float(a.max()) <= float(b.min()) for a, b in itertools.pairwise(ranked))
        assert sorted(itertools.chain(*(held[f"{layer}.{i}"] for i in range(3)))) == list(range(len(own)))


@pytest.mark.parametrize("own", [{"effect": "loss"}, {"ablation": "zeros"}])
def test_unknown_words_of_a_question_are_refused(own: dict[str, Any]) -> None:
    ((name, value),) = own.items()
    with pytest.raises(OptionError, match=f"unknown {name} '{value}'"):
        Question(**own)
