"""Closing candidates, by gates or in the weights, is one thing; what is known of them is what plain loops give."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from configs import build, tiny_config
from reference import calibration, fresh, shared

from causalprune.attribution.plan import planned
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.circuits.behaviour import Behaviour
from causalprune.core.errors import OptionError
from causalprune.core.resuming import State
from causalprune.core.types import Decoder, silent
from causalprune.correction.behaviours import CLEAN
from causalprune.correction.candidates import Rows, Units, Weights
from causalprune.correction.evidence import DRIFT, ODDS, Looking
from causalprune.correction.measuring import Measured, Trials
from causalprune.correction.samples import Half
from causalprune.correction.scores import Known, contrast
from causalprune.interventions.ablation import gated
from causalprune.interventions.asked import likelihood, odds
from causalprune.interventions.units import Site, sites
from causalprune.models.anatomy import inspect_model
from causalprune.pruning import staying
from causalprune.pruning.owning import private

PROBLEMS = calibration(tuple((12 + i % 3, 5) for i in range(12))).examples
HALF = Half(PROBLEMS[:6], PROBLEMS[6:])
GRADIENT = Estimator("gradient", draws=1)
LOOKING = [
    "bamba",
    "bitnet",
    "diffllama",
    "doge",
    "falcon_mamba",
    "flex_olmo",
    "granitemoehybrid",
    "jamba",
    "mamba",
    "minimax",
    "minimax_m2",
    "nemotron_h",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "zamba2",
]
"""Types whose units see more than what is their own, with those that the tests always look at."""


def thorough(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.thorough)


def units(decoder: Decoder, names: tuple[str, ...], factor: float = 0.0) -> Units:
    plan = planned(decoder, calibration(tuple((12, 5) for _ in range(3))), Question(names), GRADIENT)
    return Units(Behaviour(decoder, HALF.undesired, plan), factor)


@pytest.mark.parametrize("factor", [0.0, 0.5])
@pytest.mark.parametrize(
    ("family", "names"),
    [("llama3", ("heads", "neurons:3")), ("gpt2", ("heads", "neurons:1")), ("mixtral", ("experts", "heads"))],
)
def test_gates_and_weights_agree(family: str, names: tuple[str, ...], factor: float) -> None:
    decoder = fresh(family)
    own = units(decoder, names, factor)
    chosen = torch.arange(0, own.count, 5)
    trials = Trials(decoder, HALF, 256, None)
    before = [p.read().clone() for p in decoder.projections]
    closed = trials.without(own, chosen)
    assert all(torch.equal(p.read(), was) for p, was in zip(decoder.projections, before, strict=True))
    assert float(closed.kl.min()) > 0
    keep = own.keep(chosen)
    own.write(chosen)
    now = trials.now("now")
    for name in ("odds", "nats", "kl"):
        torch.testing.assert_close(getattr(now, name), getattr(closed, name), rtol=1e-3, atol=1e-4)
    zeros = {p.name: int((p.read() == 0).sum()) for p in decoder.projections}
    assert all(int((~keep[name]).sum()) <= count for name, count in zeros.items())
    assert any(int((~keep[name]).sum()) for name in keep) == (factor == 0)


@pytest.mark.parametrize("family", ["olmo2", "gemma3n_text", "mamba2", *(thorough(own) for own in LOOKING)])
def test_gates_and_weights_agree_where_units_see_each_other(family: str) -> None:
    """Norms over all heads, state spaces, cut activations, keys that later layers use: rows stay that others need."""
    model = build(tiny_config(family))
    state = {name: own.clone() for name, own in model.state_dict().items()}
    for kind in ("heads", "kv_groups", "mixers", "neurons:1", "attention"):
        model.load_state_dict(state)
        decoder = inspect_model(model, None, name=family)
        try:
            own = units(decoder, (kind,))
        except OptionError:
            continue  # it has none
        for start in range(min(own.count, 2)):  # layer 1 of Gemma 3n hands its keys on
            model.load_state_dict(state)
            trials, chosen = Trials(decoder, HALF, 256, None), torch.arange(start, own.count, 3)
            closed, counted = trials.without(own, chosen), own.weights(chosen)
            before = sum(int(p.read().count_nonzero()) for p in decoder.projections)
            own.write(chosen)
            now = trials.now("now")
            for name in ("odds", "nats", "kl"):
                torch.testing.assert_close(getattr(now, name), getattr(closed, name), rtol=1e-3, atol=1e-4)
            assert before - sum(int(p.read().count_nonzero()) for p in decoder.projections) == counted > 0


def test_rows_go_where_a_unit_alone_sees_them() -> None:
    assert private(shared("llama3")) == {site for site in sites(shared("llama3")) if site.place != "experts"}
    decoder = inspect_model(build(tiny_config("olmo2")), None, name="olmo2")
    assert {site.place for site in private(decoder)} == {"mlp"}
    keep = staying(decoder, [{Site(0, "heads"): torch.arange(3)}])
    assert {p.role for p in decoder.projections if not keep[p.name].all()} == {"o"}
    keep = staying(decoder, [{Site(0, "heads"): torch.arange(4)}])  # none is left to see them
    assert {p.role for p in decoder.projections if not keep[p.name].all()} == {"q", "k", "v", "o"}
    half = inspect_model(build(tiny_config("mamba")).bfloat16(), None, name="mamba")
    assert not private(half)  # by little: steps of time hang on all channels


@pytest.mark.parametrize("family", ["llama3", "gpt2", "mixtral"])
def test_single_weights_come_back_bit_for_bit(family: str) -> None:
    decoder = fresh(family)
    own, trials = Weights(decoder), Trials(decoder, HALF, 256, None)
    chosen = torch.arange(3, own.count, 97)
    before = [p.read().clone() for p in decoder.projections]
    closed = trials.without(own, chosen)
    assert all(torch.equal(p.read(), was) for p, was in zip(decoder.projections, before, strict=True))
    own.write(chosen)
    torch.testing.assert_close(trials.now("now").nats, closed.nats, rtol=1e-5, atol=1e-6)
    keep = own.keep(chosen)
    assert sum(int((~keep[name]).sum()) for name in keep) == len(chosen)
    for p, was in zip(decoder.projections, before, strict=True):
        assert torch.equal(p.read(), was * keep[p.name])


def test_slopes_of_weights_sum_to_those_of_their_neuron() -> None:
    """A neuron's gate multiplies its column of the down projection: the slopes of those weights are its slope, cut up."""
    decoder = shared("llama3")
    own, single = units(decoder, ("neurons:1",)), Weights(decoder)
    none = torch.zeros(0, dtype=torch.long)
    (batch, *_) = batches(PROBLEMS[:1], max_batch_tokens=1)
    for asked in (odds, likelihood):
        gates = own.slopes(batch, asked, none, 1.0, relevant=False)[:, 0]
        weights = single.slopes(batch, asked, none, 1.0, relevant=False)[:, 0]
        for p in decoder.projections:
            if p.role == "down":
                start = single.starts[p.name]
                columns = weights[start : start + p.size].view(p.shape).sum(0)
                at = [i for i, unit in enumerate(own.units) if unit.layer == p.layer]
                torch.testing.assert_close(columns.double(), gates[at], rtol=1e-3, atol=1e-5)


def test_evidence_is_a_mean_over_samples_and_harm_counts_above_a_share_of_the_limit() -> None:
    decoder = shared("llama3")
    own, none = units(decoder, ("heads",)), torch.zeros(0, dtype=torch.long)
    looking = Looking(own, HALF, GRADIENT, State())
    found = looking.gather(("odds", "undesired"), none, "none", silent)
    expected = torch.zeros_like(found)
    for example in HALF.undesired:
        (batch,) = batches([example], max_batch_tokens=1)
        expected += own.slopes(batch, odds, none, 1.0, relevant=False)[:, 0] / example.target_tokens / 6
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    whole = looking.gather(("harm", "preserve"), none, "none", silent)
    assert whole.shape == (1, own.count)
    assert float(whole.max()) > 0
    others = tuple(replace(e, source="other") for e in HALF.preserve[4:])
    two = Looking(own, Half(HALF.undesired, (*HALF.preserve[:4], *others)), GRADIENT, State())
    harm = two.gather(("harm", "preserve"), none, "none", silent)
    torch.testing.assert_close((4 * harm[0] + 2 * harm[1]) / 6, whole[0], rtol=1e-3, atol=1e-9)
    known = Known({ODDS: torch.ones(3)}, torch.tensor([2.0, 0.5, -1.0]), torch.ones(3), 0.5)
    assert contrast(known).tolist() == [pytest.approx(0.4), 1.0, 2.0]


def test_drift_is_how_what_is_measured_changes_with_a_gate() -> None:
    """Of units that are closed and of others, where some are closed; of clean texts the divergence alone."""
    decoder, by = shared("llama3"), 0.01
    own = units(decoder, ("heads",))
    preserve = tuple(replace(e, source=CLEAN + "x") if i % 2 else e for i, e in enumerate(HALF.preserve))
    half, closed = Half(HALF.undesired, preserve), torch.tensor([1, 4])
    slopes = Looking(own, half, GRADIENT, State()).gather(DRIFT, closed, "closed", silent)
    assert half.sources == [preserve[0].source, CLEAN + "x"]
    trials = Trials(decoder, half, 2048, None)

    def at(number: int, step: float) -> Measured:
        @contextmanager
        def moved() -> Iterator[Rows]:
            gates = own._gates(closed)
            for site, (index, owner) in own.of.places.items():
                gates[site] = gates[site].clone()
                gates[site][index[owner == number]] += step
            yield lambda rows: gated(decoder, {site: gate.expand(rows, -1) for site, gate in gates.items()})

        return trials._measured(f"{number}{step}", moved, silent)

    for number in (0, 1, 2, 4, 7):
        below, above = at(number, -by), at(number, by)
        for source, part in ((0, 0.5), (1, 0.0)):
            kl, nats = ((getattr(above, kind) - getattr(below, kind))[source::2] for kind in ("kl", "nats"))
            found = float(((1 - part) * kl + part * nats).mean() / (2 * by))
            assert found != pytest.approx(0, abs=1e-4)
            assert float(slopes[source, number]) == pytest.approx(found, rel=0.02, abs=1e-5)


def test_activity_is_the_mean_size_of_what_is_sent() -> None:
    decoder = shared("llama3")
    own, none = units(decoder, ("heads", "neurons:1")), torch.zeros(0, dtype=torch.long)
    looking = Looking(own, HALF, GRADIENT, State())
    found = looking.gather(("activity", "undesired"), none, "none", silent)
    sums, count, seen = torch.zeros(decoder.projections[-1].shape[1]), 0, {}
    down = decoder.projections[-1].module
    handle = down.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    for example in HALF.undesired:
        with torch.inference_mode():
            decoder.model(input_ids=torch.tensor([example.tokens]))
        sums += seen["x"][0].abs().sum(0)
        count += len(example.tokens)
    handle.remove()
    last = [
        i
        for i, unit in enumerate(own.units)
        if unit.kind == "neurons" and unit.layer == len(decoder.layers) - 1
    ]
    torch.testing.assert_close(found[last], (sums / count).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "names"), [("llama3", ("heads", "neurons:3")), ("mixtral", ("heads", "experts"))]
)
def test_equal_weights_have_equal_magnitude(family: str, names: tuple[str, ...]) -> None:
    """Heads that share keys and values too, of which no head has a part alone."""
    decoder = fresh(family)
    for p in decoder.projections:
        p.write(torch.full(p.shape, 0.5))
    own = units(decoder, names)
    torch.testing.assert_close(own.magnitude, torch.full((own.count,), 0.5, dtype=torch.float64))
    assert bool(own.alive.all())
