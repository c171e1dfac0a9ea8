"""Shares of a run, measured apart and merged, are the run; shares that do not belong together are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import calibration, shared

from causalprune.attribution.estimators import attribute, share_of
from causalprune.attribution.merging import merge
from causalprune.attribution.questions import Estimator, Question
from causalprune.checkpoints.saving import load_effects, save_effects
from causalprune.core.errors import MismatchError, OptionError
from causalprune.core.types import Effects

EXAMPLES = calibration()


def part(index: int, parts: int, family: str = "llama3", question: Question = Question()) -> Effects:
    return attribute(shared(family), EXAMPLES, question, Estimator(max_batch_tokens=28, share=(index, parts)))


@pytest.mark.thorough
@pytest.mark.parametrize("effect", ["ce", "kl"])
@pytest.mark.parametrize("parts", [2, 3, 40])
def test_merged_shares_are_the_whole(parts: int, effect: str, tmp_path: Path) -> None:
    question = Question(("heads", "mlp"), effect)  # type: ignore[arg-type]
    whole = part(1, 1, question=question)
    shares = [part(i, parts, question=question) for i in range(1, parts + 1)]
    for i, one in enumerate(shares):
        save_effects(one, tmp_path / f"{i}.json")
    merged = merge([load_effects(tmp_path / f"{i}.json") for i in reversed(range(parts))])
    assert torch.equal(merged.masked_nats, whole.masked_nats)
    assert torch.equal(merged.intact_nats, whole.intact_nats)
    assert (merged.kl_nats is None) == (whole.kl_nats is None)
    if merged.kl_nats is not None and whole.kl_nats is not None:
        assert torch.equal(merged.kl_nats, whole.kl_nats)
    measured = torch.stack([~one.masked_nats.isnan() for one in shares]).sum(0)
    assert bool((measured == 1).all()), "a cell was measured twice"


def test_experts_without_tokens_stay_unmeasured() -> None:
    question = Question(("experts",))
    whole = part(1, 1, "qwen3_moe", question)
    merged = merge([part(i, 2, "qwen3_moe", question) for i in (1, 2)])
    torch.testing.assert_close(merged.masked_nats, whole.masked_nats, rtol=0, atol=0, equal_nan=True)
    assert merged.description.get("unreached_experts") == whole.description.get("unreached_experts")


def test_shares_that_were_measured_in_other_batches_are_refused() -> None:
    one = part(1, 2)
    other = attribute(shared("llama3"), EXAMPLES, Question(), Estimator(max_batch_tokens=14, share=(2, 2)))
    with pytest.raises(MismatchError, match="in different batches or by different estimators"):
        merge([one, other])
    holed = part(2, 2)
    holed.masked_nats[:, 0] = torch.nan
    lacking = replace(one, masked_nats=one.masked_nats.clone())
    lacking.masked_nats[:, 0] = torch.nan
    with pytest.raises(MismatchError, match=r"\d+ of \d+ measurements are in none of the shares"):
        merge([lacking, holed])


def test_differences_stay_those_of_each_machine() -> None:
    """Another machine rounds the losses of the intact model otherwise, and those of the masked one as well."""
    one, other = part(1, 2), part(2, 2)
    off = torch.linspace(0.01, 0.1, len(other.intact_nats), dtype=torch.float64)
    moved = replace(other, intact_nats=other.intact_nats + off, masked_nats=other.masked_nats + off)
    torch.testing.assert_close(merge([one, moved]).change_nats(), merge([one, other]).change_nats())


def test_neurons_that_were_grouped_otherwise_are_not_joined() -> None:
    one, other = (part(i, 2) for i in (1, 2))
    grouped = replace(other, description={**other.description, "neurons": {"0": [[1, 2]]}})
    with pytest.raises(MismatchError, match="grouped neurons otherwise"):
        merge([one, grouped])


def test_shares_are_even() -> None:
    costs = {(number, layer): float(32 - layer) for number in range(8) for layer in range(32)}
    loads = [sum(costs[job] for job in share_of(costs, i, 7)) for i in range(1, 8)]
    assert sum(loads) == sum(costs.values())
    assert max(loads) <= sum(loads) / 7 + max(costs.values())


def test_what_does_not_belong_together_is_refused() -> None:
    one, two = part(1, 2), part(2, 2)
    with pytest.raises(OptionError, match=r"these are 1/2, 1/2"):
        merge([one, one])
    with pytest.raises(OptionError, match=r"these are 2/2"):
        merge([two])
    with pytest.raises(OptionError, match="nothing to merge"):
        merge([])
    with pytest.raises(MismatchError, match="different models"):
        merge([one, replace(two, model_fingerprint="other")])
    with pytest.raises(MismatchError, match="different questions"):
        merge([one, part(2, 2, question=Question(ablation="mean"))])
    with pytest.raises(OptionError, match="counts from 1"):
        Estimator(share=(3, 2))
    with pytest.raises(OptionError, match="only the estimator 'exact'"):
        Estimator("gradient", share=(1, 2))
