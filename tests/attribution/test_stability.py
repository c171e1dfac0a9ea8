"""What `stability` reports is what a slow computation finds."""

from pathlib import Path

import pytest
import torch
from reference import calibration, nats, removed, shared
from torch import Tensor

from causalprune.attribution.estimators import attribute
from causalprune.attribution.plan import planned
from causalprune.attribution.questions import Question
from causalprune.attribution.repeatability import (
    Pairs,
    Trial,
    compared,
    draws,
    interactions,
    stability,
    swapped,
)
from causalprune.core.errors import OptionError
from causalprune.core.types import Calibration, Effects, Unit, quiet

EXAMPLES = calibration(((14, 5), (13, 9), (9, 2), (8, 3), (12, 4)), subsets=5)


def effects_of(change: Tensor) -> Effects:
    n_units, n = change.shape
    return Effects(
        units=tuple(Unit(0, i) for i in range(n_units)),
        masked_nats=change,
        intact_nats=torch.zeros(n, dtype=torch.float64),
        tokens=torch.ones(n, dtype=torch.long),
        subset=torch.arange(n) % 5,
        model_fingerprint="m",
        calibration_fingerprint="c",
    )


def noisy(seed: int, truth: Tensor, noise: float, n: int = 40) -> Effects:
    random = torch.Generator().manual_seed(seed)
    return effects_of(
        truth[:, None] + noise * torch.randn(len(truth), n, generator=random, dtype=torch.float64)
    )


@pytest.mark.parametrize("names", [("heads",), ("heads", "mlp")])
def test_pairs_are_removed_together(names: tuple[str, ...]) -> None:
    decoder, question = shared("llama3"), Question(names)
    effects = attribute(decoder, EXAMPLES, question)
    first = Calibration(EXAMPLES.examples[:2], EXAMPLES.subset[:2])
    found = interactions(planned(decoder, first, question), effects, top=4)
    assert found["pairs"] == 6
    own = EXAMPLES.examples[:2]
    tokens = sum(e.target_tokens for e in own)
    intact = sum(nats(decoder.model, e) for e in own)
    for row in found["strongest"]:
        a, b = (Unit(*unit) for unit in row["units"])
        with removed(decoder, a):
            first = sum(nats(decoder.model, e) for e in own) - intact
            with removed(decoder, b):
                joint = sum(nats(decoder.model, e) for e in own) - intact
        with removed(decoder, b):
            second = sum(nats(decoder.model, e) for e in own) - intact
        assert row["joint_nats"] == pytest.approx(joint / tokens, abs=2e-5)
        assert row["sum_nats"] == pytest.approx((first + second) / tokens, abs=2e-5)


def test_two_calibrations_of_one_truth_reach_the_ceiling_and_others_do_not() -> None:
    truth = torch.randn(120, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = torch.randn(120, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    same = compared(noisy(3, truth, 3.0), noisy(4, truth, 3.0))
    assert same["spearman"] == pytest.approx(same["ceiling"], abs=0.08)
    different = compared(noisy(3, truth, 3.0), noisy(4, other, 3.0))
    assert abs(different["spearman"]) < 0.3 < different["ceiling"]
    shares = list(swapped(noisy(3, truth, 3.0), noisy(4, other, 3.0)).values())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] > 0.4


def test_draws_agree_as_far_as_their_noise_allows() -> None:
    truth = torch.randn(120, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    quiet_draws, loud_draws = draws(noisy(1, truth, 0.1)), draws(noisy(1, truth, 20.0))
    assert quiet_draws["spearman_between_draws"] > 0.98
    assert loud_draws["spearman_between_draws"] < 0.3
    assert loud_draws["median_sd_between_draws_nats"] == pytest.approx(20 / 8**0.5, rel=0.15)
    assert quiet_draws["problems_per_draw"] == 8


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    own = {"one": calibration()}
    with pytest.raises(OptionError, match="groups of neurons by effect are others"):
        stability(shared("llama3"), own, tmp_path, Trial(Question(("neurons:4:effect",))), stage=quiet)
    with pytest.raises(OptionError, match="ablation 'zero', not 'mean'"):
        stability(shared("llama3"), own, tmp_path, Trial(Question(ablation="mean")), stage=quiet)


@pytest.mark.thorough
def test_a_whole_run_is_resumed(tmp_path: Path) -> None:
    decoder = shared("llama3")
    calibrations = {"a/own": EXAMPLES, "b/own": Calibration(EXAMPLES.examples[::-1], EXAMPLES.subset)}
    runs = [
        stability(decoder, calibrations, tmp_path, Trial(pairs=Pairs(3, 2)), stage=quiet) for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0]["between"]["b/own"]["spearman"] == pytest.approx(1.0, abs=0.02)
    assert {path.name for path in tmp_path.iterdir()} == {"a%2Fown.ledger", "b%2Fown.ledger", "pairs.ledger"}
