"""Weights that are scored by the gradient of a task, plain or as relevance goes back."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from reference import ONE_ROUTE, calibration, fresh, restored, shared
from torch import nn
from torch.nn.functional import cross_entropy

from causalprune.calibration.examples import batches
from causalprune.interventions.lrp import ruled
from causalprune.interventions.sensitivity import weight_slopes
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

EXAMPLES = calibration(((14, 5), (13, 9), (9, 1)))


@pytest.mark.parametrize("relevant", [False, True])
@pytest.mark.parametrize("family", ["llama3", "gpt2", "qwen3_moe"])
def test_gradients_are_those_of_one_backward_pass(family: str, relevant: bool) -> None:
    decoder = shared(family)
    found = weight_slopes(decoder, batches(EXAMPLES.examples, max_batch_tokens=64), relevant=relevant)
    own = list(dict.fromkeys(p.parameter for p in decoder.projections))
    assert not any(p.requires_grad or p.grad is not None for p in decoder.model.parameters())
    decoder.model.requires_grad_(True)
    try:
        with torch.enable_grad(), ruled(decoder) if relevant else nullcontext():
            total = torch.zeros(())
            for one in EXAMPLES.examples:
                logits = decoder.model(input_ids=torch.tensor([one.tokens]), use_cache=False).logits[0]
                at = list(range(one.target_start - 1, len(one.tokens) - 1))
                wanted = torch.tensor(one.tokens[one.target_start :])
                if relevant:
                    total = total + (logits[at, wanted] - logits[at].mean(-1)).sum()
                else:
                    total = total + cross_entropy(logits[at], wanted, reduction="sum")
            whole = torch.autograd.grad(total, own)
    finally:
        decoder.model.requires_grad_(False)
    for parameter, expected in zip(own, whole, strict=True):
        torch.testing.assert_close(found[parameter], expected, rtol=1e-3, atol=1e-4)
        assert bool(expected.any())


@pytest.mark.parametrize("criterion", ["snip", "relevance"])
def test_rows_keep_the_weights_of_largest_product(criterion: str) -> None:
    decoder = shared("phi3")
    slopes = weight_slopes(
        decoder, batches(EXAMPLES.examples, max_batch_tokens=64), relevant=criterion == "relevance"
    )
    with restored(decoder):
        worth = {
            p.name: (
                p.read() * replace(p, parameter=nn.Parameter(slopes[p.parameter], requires_grad=False)).read()
            ).abs()
            for p in decoder.projections
        }
        keep = prune(decoder, Method(criterion, 0.5), calibration=EXAMPLES).keep
    for name, score in worth.items():
        low = score.masked_fill(~keep[name], torch.inf).amin(1)
        assert bool((score.masked_fill(keep[name], 0).amax(1) <= low).all())
        assert torch.equal(keep[name].sum(1), torch.full((len(score),), score.shape[1] - score.shape[1] // 2))


def test_an_expert_without_tokens_has_no_gradient() -> None:
    pruned = prune(fresh("mixtral"), Method("relevance", 0.5), calibration=ONE_ROUTE)
    assert pruned.unrouted
    assert (
        abs(
            sum(int((~keep).sum()) for keep in pruned.keep.values())
            / sum(keep.numel() for keep in pruned.keep.values())
            - 0.5
        )
        < 0.01
    )


@pytest.mark.parametrize("criterion", ["relevance", "snip"])
def test_weights_of_an_expert_without_tokens_rank_by_magnitude(criterion: str) -> None:
    decoder = fresh("mixtral")
    by_size = prune(fresh("mixtral"), Method("magnitude", 0.5, "row")).keep
    pruned = prune(decoder, Method(criterion, 0.5, "row"), calibration=ONE_ROUTE)
    assert pruned.unrouted
    for name in pruned.unrouted:
        assert torch.equal(pruned.keep[name], by_size[name]), name
    assert not all(torch.equal(pruned.keep[p.name], by_size[p.name]) for p in decoder.projections)
