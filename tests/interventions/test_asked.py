"""Slopes of what is asked of logits: the same numbers as other ways give, whatever the logits come in."""

import math

import pytest
import torch
from reference import calibration, shared

from causalprune.calibration.examples import batches
from causalprune.interventions import asked
from causalprune.interventions.asked import drawn, gate_slopes, likelihood, log_odds, odds, prominence
from causalprune.interventions.gradients import expansion, uniforms
from causalprune.interventions.losses import target_logits, targets
from causalprune.interventions.lrp import relevance, ruled
from causalprune.interventions.units import list_units

PROBLEMS = calibration(tuple((12 + i % 3, 5) for i in range(6)))


@pytest.mark.parametrize("chunk", [2, 256])
@pytest.mark.parametrize("family", ["llama3", "gpt2", "mixtral"])
def test_slopes_are_those_of_whole_logits(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "CHUNK", chunk)
    decoder = shared(family)
    names = ["heads", "experts"] if family == "mixtral" else ["heads", "neurons:5"]
    units = list(list_units(decoder, names).values())
    for batch in batches(PROBLEMS.examples, max_batch_tokens=64):
        labels = uniforms(PROBLEMS.examples, batch, 1, 0)
        _, first, second = expansion(decoder, batch, units, labels, gate=0.7)
        own = gate_slopes(decoder, batch, units, likelihood, gate=0.7)
        torch.testing.assert_close(own, first, rtol=1e-4, atol=1e-5)
        own = gate_slopes(decoder, batch, units, drawn(labels[0]), gate=0.7)
        torch.testing.assert_close(own.square() / 2, second, rtol=1e-3, atol=1e-5)


def test_relevance_is_the_same_too() -> None:
    decoder = shared("llama3")
    units = list(list_units(decoder, ["heads", "neurons:5"]).values())
    (batch, *_) = batches(PROBLEMS.examples, max_batch_tokens=64)
    with ruled(decoder):
        own = gate_slopes(decoder, batch, units, prominence)
    torch.testing.assert_close(own, relevance(decoder, batch, units)[1], rtol=1e-4, atol=1e-5)


def test_log_odds_are_what_they_say_and_have_slopes_where_losses_have_none() -> None:
    decoder = shared("llama3")
    (batch, *_) = batches(PROBLEMS.examples, max_batch_tokens=64)
    wanted = targets(batch)
    logits = target_logits(decoder, batch, wanted).detach().double()
    p = logits.softmax(-1).gather(-1, wanted.tokens[:, None])[:, 0]
    torch.testing.assert_close(log_odds(logits, wanted).double(), (p / (1 - p)).log(), rtol=1e-4, atol=1e-4)
    sure = torch.zeros(len(wanted.tokens), logits.shape[1])
    sure.scatter_(-1, wanted.tokens[:, None], 40.0)
    sure.requires_grad_()
    (slope,) = torch.autograd.grad(odds(sure, wanted, slice(None)).sum(), [sure])
    assert float(slope.gather(-1, wanted.tokens[:, None]).min()) == pytest.approx(1.0)
    assert float(log_odds(sure.detach(), wanted).max()) == pytest.approx(
        40 - math.log(logits.shape[1] - 1), rel=1e-5
    )
