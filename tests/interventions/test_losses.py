"""Losses of target tokens are those of all logits, however they are batched, chunked and stored."""

import pytest
import torch
from families import FAMILIES
from reference import ROUNDING, calibration, fresh, nats, restored, shared

from causalprune.calibration.examples import batches
from causalprune.core.types import Batch, Calibration, Decoder
from causalprune.interventions import losses
from causalprune.interventions.losses import selected, target_logits, target_nats, target_positions, targets

every_family = pytest.mark.parametrize("family", FAMILIES)


def batch_of(examples: Calibration) -> Batch:
    """Return all examples in one batch, however different their lengths."""
    rows = [list(e.tokens) for e in examples.examples]
    longest = max(map(len, rows))
    return Batch(
        tokens=torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        lengths=torch.tensor([len(row) for row in rows]),
        is_target=torch.tensor(
            [[*e.is_target, *[False] * (longest - len(e.tokens))] for e in examples.examples]
        ),
        indices=tuple(range(len(rows))),
    )


def naive(decoder: Decoder, examples: Calibration) -> torch.Tensor:
    return torch.tensor([nats(decoder.model, e) for e in examples.examples], dtype=torch.float64)


@every_family
def test_losses_are_those_of_all_logits(family: str) -> None:
    decoder, examples = shared(family), calibration()
    expected = naive(decoder, examples)
    padded = target_nats(decoder, batch_of(examples))
    assert padded.dtype == torch.float64
    torch.testing.assert_close(padded, expected, **ROUNDING)
    alone = [target_nats(decoder, batch) for batch in batches(examples.examples, max_batch_tokens=1)]
    torch.testing.assert_close(torch.cat(alone), expected, **ROUNDING)  # the examples are sorted by length


def test_logits_are_computed_for_target_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 4)  # smaller than the number of targets
    decoder, examples = fresh("gemma2"), calibration()
    seen: list[int] = []
    handle = decoder.model.get_output_embeddings().register_forward_hook(
        lambda _m, _a, out: seen.append(out.shape[:-1])
    )
    found = target_nats(decoder, batch_of(examples))
    handle.remove()
    assert seen == [(1, sum(e.target_tokens for e in examples.examples))]
    torch.testing.assert_close(found, naive(decoder, examples), **ROUNDING)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "olmoe"])
def test_a_bfloat16_model_has_its_losses_summed_in_higher_precision(family: str) -> None:
    decoder, examples = fresh(family), calibration(((40, 2), (38, 30)))
    decoder.model.bfloat16()
    batch = batch_of(examples)
    wanted = targets(batch)
    logits = target_logits(decoder, batch, wanted).detach()
    assert logits.dtype == torch.bfloat16

    def summed(dtype: torch.dtype) -> torch.Tensor:
        chosen = logits.to(dtype).log_softmax(-1).gather(-1, wanted.tokens[:, None])[:, 0]
        return -torch.stack(
            [part.sum() for part in chosen.split([e.target_tokens for e in examples.examples])]
        )

    found, expected = target_nats(decoder, batch), summed(torch.float64)
    assert found.dtype == torch.float64
    error, naive_error = (found - expected).abs().max(), (summed(torch.bfloat16) - expected).abs().max()
    assert error < 1e-4
    assert error < naive_error / 10


def test_positions_by_hand() -> None:
    batch = Batch(
        tokens=torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 6, 7, 0]]),
        lengths=torch.tensor([4, 2, 3]),
        is_target=torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]).bool(),
        indices=(4, 0, 2),
    )
    rows, positions = target_positions(batch)
    assert list(zip(rows.tolist(), positions.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 0),
        (2, 0),
        (2, 1),
    ]
    twice = selected(batch, [0, 1, 2, 0, 1, 2])
    assert twice.tokens.tolist() == batch.tokens.tolist() * 2
    assert twice.lengths.tolist() == [4, 2, 3, 4, 2, 3]
    assert twice.is_target.tolist() == batch.is_target.tolist() * 2
    assert twice.indices == (4, 0, 2, 4, 0, 2)


def test_repeated_rows_lose_the_same() -> None:
    decoder, batch = shared("mistral"), batch_of(calibration())
    once, thrice = (
        target_nats(decoder, batch),
        target_nats(decoder, selected(batch, list(range(len(batch.tokens))) * 3)),
    )
    torch.testing.assert_close(thrice, once.repeat(3), **ROUNDING)


def test_the_output_head_is_free_again_after_an_error() -> None:
    decoder = shared("llama2")
    batch = batch_of(calibration())
    batch.tokens[0, 0] = 10_000
    with pytest.raises(IndexError):
        target_nats(decoder, batch)
    assert not decoder.model.get_output_embeddings()._forward_pre_hooks


def test_losses_change_with_the_weights() -> None:
    decoder, examples = shared("llama2"), calibration()
    before = target_nats(decoder, batch_of(examples))
    with restored(decoder):
        decoder.layers[1].projections[0].parameter.data[0, 0] += 1
        after = target_nats(decoder, batch_of(examples))
        torch.testing.assert_close(after, naive(decoder, examples), **ROUNDING)
    assert (after - before).abs().min() > 1e-4


@pytest.mark.parametrize("far", [False, True])
def test_how_many_positions_are_worked_on_at_once_changes_no_bit(
    far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    intact, own = torch.randn(2, 70, 500, generator=generator).mul(3)
    if far:
        own[3, 7] += 60  # its probability rises by more than expm1 bears
    at = torch.arange(70)
    wanted = losses.Targets(at, at, torch.arange(70), 70, 71)
    found = []
    for cached in (1, 500 * 9, 500 * 70):
        monkeypatch.setattr(losses, "CACHED", cached)
        own_slope = losses.divergence_slope(intact, own, 0.1)
        found.append((losses.divergence(intact, at, own), own_slope, losses.cross_entropy(own, wanted)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    p, q = intact.double().log_softmax(-1), own.double().requires_grad_()
    expected = (p.exp() * (p - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found[0][0].double(), expected, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(expected.sum() * 0.1, q)
    torch.testing.assert_close(found[0][1].double(), slope, rtol=1e-4, atol=1e-7)


def test_divergences_of_predictions_that_are_far_apart_by_hand() -> None:
    intact, far = torch.tensor([[0.0, -200.0, -1.0]]), torch.tensor([[-300.0, 0.0, -1.0]])
    p, q = intact.double().log_softmax(-1), far.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    found = losses.divergence(intact, torch.tensor([0]), far)
    assert found.double() == pytest.approx(expected, rel=1e-5)
    assert losses.divergence(intact, torch.tensor([0]), intact).item() == 0
