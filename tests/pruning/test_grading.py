"""Graded interventions: measured as they are meant, and nothing left behind."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB

from causalprune.calibration.examples import batches
from causalprune.checkpoints.saving import count_zeros
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.resuming import State
from causalprune.core.types import Calibration, Decoder, Example
from causalprune.models.anatomy import fingerprint, inspect_model
from causalprune.pruning.budgets import trial
from causalprune.pruning.grading import Experiment, dose_response, doses, groups_of
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.pruning.parts import Steps
from causalprune.pruning.pruned import manifest
from causalprune.pruning.walks import Gathered, planned, walk
from causalprune.runs.rows import label, parse_method


def decoder_of(name: str) -> Decoder:
    return inspect_model(FAMILIES[name](), None, name=name)


def problems(n: int = 6) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB, (14 + i % 3,), generator=generator).tolist() for i in range(n)]
    return Calibration(
        tuple(Example(tuple(row), 5, "random", str(i)) for i, row in enumerate(rows)), (0,) * n
    )


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2", "olmoe"])
def test_a_dose_is_measured_as_a_pruned_model_is(name: str) -> None:
    decoder, calibration = decoder_of(name), problems(3)
    before = fingerprint(decoder.model)
    found = dose_response(
        decoder,
        decoder.layers,
        Experiment(batches(calibration.examples, max_batch_tokens=40), (0.5, 1.0)),
        lambda p, tried: [p.read() * (1 - sparsity) for sparsity in tried],
    )
    assert fingerprint(decoder.model) == before
    intact = [
        decoder.model(torch.tensor([e.tokens])).logits[0, 4:-1].log_softmax(-1) for e in calibration.examples
    ]
    for number in (1, 4):  # the MLP of layer 0 and the attention of layer 2
        own = {p.name: p for p in decoder.projections}
        saved = {name: own[name].read().clone() for name in found.members[number]}
        for key, weight in saved.items():
            own[key].write(weight * 0)
        total, n = 0.0, 0
        for example, p in zip(calibration.examples, intact, strict=True):
            q = decoder.model(torch.tensor([example.tokens])).logits[0, 4:-1].log_softmax(-1)
            total, n = total + float((p.exp() * (p - q)).sum()), n + len(p)
        for key, weight in saved.items():
            own[key].write(weight)
        assert float(found.nats[number, 1]) == pytest.approx(total / n, rel=1e-4, abs=1e-6)


def test_divergences_that_are_not_finite_are_said_and_not_kept(tmp_path: Path) -> None:
    decoder, state = decoder_of("llama3"), State(tmp_path / "kept")
    decoder.model.model.norm.weight.data[0] = torch.nan
    experiment = Experiment(batches(problems(3).examples, max_batch_tokens=40), (0.5,))
    with pytest.raises(ModelError, match=r"divergences where layers\.0\..* is pruned are not finite"):
        dose_response(decoder, decoder.layers, experiment, lambda p, tried: [p.read()], state)
    assert not (tmp_path / "kept").exists()


def test_trials_side_by_side_are_those_one_by_one() -> None:
    decoder = decoder_of("llama3")
    plan, gathered = planned(decoder, parse_method("causal+graded", 0.5), {}, problems(), 40), Gathered()
    p = decoder.layers[0].projections[-1]
    next(walk(plan, gathered, Steps(), advance_pruned=False, moments=True))
    together = trial(plan, gathered, p, (0.3, 0.5, 0.7))
    for sparsity, found in zip((0.3, 0.5, 0.7), together, strict=True):
        alone = trial(plan, gathered, p, (sparsity,))[0]
        assert torch.equal(alone != 0, found != 0)
        assert int((found == 0).sum()) == round(sparsity * p.size)
        torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt2", "llama3"])
def test_groups_are_all_matrices_once(name: str, fused: bool) -> None:
    decoder = decoder_of(name)
    names = [p.name for layer in decoder.layers for group in groups_of(layer, fused=fused) for p in group]
    assert sorted(names) == sorted(p.name for p in decoder.projections)


def test_some_groups_may_lose_more_than_the_others_however_much_all_lose() -> None:
    assert doses(0.5) == (0.3, 0.5, 0.7)
    for sparsity in (0.75, 0.95, 0.97):
        low, middle, high = doses(sparsity)
        assert low < middle == sparsity < high < 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    "text", ["causal+graded", "wanda+graded", "magnitude+graded+refit", "wanda:matrix+graded"]
)
@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_graded_budgets_keep_the_count(text: str, sparsity: float) -> None:
    decoder = decoder_of("llama3")
    pruned = prune(decoder, parse_method(text, sparsity), calibration=problems())
    found, total = count_zeros(decoder), sum(p.size for p in decoder.projections)
    assert found["zeros"] == sum(int((~k).sum()) for k in pruned.keep.values())
    assert found["zeros"] == int(sparsity * total + 0.5)
    shares = {name: 1 - float(k.float().mean()) for name, k in pruned.keep.items()}
    assert max(shares.values()) > sparsity + 0.02 * (1 - sparsity)
    assert min(shares.values()) < sparsity - 0.02 * (1 - sparsity)


def test_what_the_task_can_spare_loses_more() -> None:
    decoder = decoder_of("llama3")
    down = decoder.layers[1].projections[-1]
    down.write(down.read() * 1e-3)  # its MLP hardly matters
    pruned = prune(decoder, parse_method("wanda+graded", 0.5), calibration=problems())
    assert float(pruned.keep["layers.1.up"].float().mean()) == pytest.approx(0.3, abs=0.01)
    record = manifest(pruned, None, None)
    assert len(record["dose_response"]["nats"]) == 6
    assert record["method"]["budgets"] == "graded"


@pytest.mark.parametrize("text", ["wanda:2:4+graded", "sparsegpt:2:4+graded", "causal:4:8+graded+refit"])
def test_graded_patterns_leave_dense_what_the_task_needs(text: str) -> None:
    decoder = decoder_of("llama3")
    for p in decoder.layers[1].projections:
        p.write(p.read() * 1e-3)  # a layer that hardly matters
    before = {p.name: p.read().clone() for p in decoder.projections}
    method = parse_method(text, 0.2)
    pruned = prune(decoder, method, calibration=problems())
    shares = {name: 1 - float(k.float().mean()) for name, k in pruned.keep.items()}
    assert set(shares.values()) == {0.0, 0.5}
    assert pruned.response is not None
    assert pruned.response.nats.shape == (12, 1)
    for members in pruned.response.members:
        assert len({shares[name] for name in members}) == 1  # engines fuse them
    pool = decoder.projections
    zeros = sum(shares[p.name] * p.size for p in pool) / sum(p.size for p in pool)
    assert 0.2 <= zeros < 0.3
    by_layer = [sum(shares[p.name] * p.size for p in layer.projections) for layer in decoder.layers]
    assert max(by_layer) == by_layer[1] > 1.5 * max(by_layer[0], by_layer[2])
    m = int(method.resolved_scope.rpartition(":")[2])
    for p in pool:
        if shares[p.name]:
            assert bool((pruned.keep[p.name].view(-1, m).sum(1) == m // 2).all())
        else:
            assert torch.equal(p.read(), before[p.name])
    assert count_zeros(decoder)["zeros"] == sum(int((~k).sum()) for k in pruned.keep.values())


def test_names_of_graded_patterns() -> None:
    assert label(parse_method("causal:2:4+graded", 0.4)) == "causal+graded-2:4-0.4"
    with pytest.raises(OptionError, match=r"no choice of what stays dense: ask for less than 0\.5"):
        parse_method("causal:2:4+graded", 0.5)
    with pytest.raises(OptionError, match=r"for less, add \+graded"):
        parse_method("causal:2:4", 0.4)
    assert Method("wanda", 0.4, "2:4", budgets="graded").doses == (0.5,)


def test_names_of_budgets() -> None:
    assert parse_method("causal", 0.5) == Method("causal", 0.5)
    assert Method("causal", 0.5).resolved_budgets == "uniform"
    assert parse_method("causal+graded", 0.5).resolved_budgets == "graded"
    assert label(parse_method("causal", 0.5)) == "causal-matrix-0.5"
    assert label(parse_method("wanda+graded+refit", 0.5)) == "wanda+graded+refit-row-0.5"
    for text in ("wanda:2:4+graded", "wanda:global+graded", "wanda+graded+uniform", "wanda+refit+obs"):
        with pytest.raises(OptionError):
            parse_method(text)


def test_progress_counts_trials_by_how_far_they_go() -> None:
    seen: list[tuple[int, int]] = []
    method = Method("sparsegpt", 0.5, budgets="graded")
    prune(decoder_of("llama2"), method, calibration=problems(), on_progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    done = sorted({done for done, _ in seen})
    first, second, third, *layers = (after - before for before, after in pairwise(done))
    # trials of a layer go through it and all after it; then come three layers, each as much as the others
    assert first - second == pytest.approx(second - third, abs=2)
    assert first > second > third > max(layers)
    assert max(layers) - min(layers) <= 1
