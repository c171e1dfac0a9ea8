"""What kept weights do for those that go, in whole models of every family."""

import pytest
import torch
from families import FAMILIES
from reference import calibration, fresh, restored, shared, weights

from causalprune.core.errors import OptionError
from causalprune.core.types import Calibration, Example
from causalprune.interventions.ablation import capture
from causalprune.models.anatomy import fingerprint
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method

every_family = pytest.mark.parametrize("family", FAMILIES)
EXAMPLES = calibration(((14, 5), (13, 9)))


@every_family
@pytest.mark.parametrize(("scope", "update"), [("2:4", "obs"), ("global", "refit")])
def test_updates_change_what_stays_and_leave_zeros(family: str, scope: str, update: str) -> None:
    decoder = shared(family)
    with restored(decoder):
        before = weights(decoder)
        pruned = prune(decoder, Method("wanda", 0.5, scope, update=update), calibration=EXAMPLES)
        assert all(torch.equal(p.read() != 0, pruned.keep[p.name]) for p in decoder.projections)
        zeros = sum(int((~keep).sum()) for keep in pruned.keep.values())
        assert zeros == sum(w.numel() for w in before.values()) // 2
        for p in decoder.projections:
            keep = pruned.keep[p.name]
            changed = not torch.equal(p.read()[keep], before[p.name][keep])
            assert changed or p.name in pruned.unrouted, f"{p.name} was not updated"


@every_family
def test_a_refit_brings_outputs_back(family: str) -> None:
    """With more tokens than features, the first layer's outputs get closer to the intact ones."""
    decoder, errors = shared(family), []
    seen = calibration(((14, 5), (13, 9), (12, 3), (14, 2), (13, 6), (12, 7)))
    tokens = torch.tensor([seen.examples[0].tokens])
    intact = capture(decoder, tokens, stop=1).hidden[1]
    for update in ("none", "refit"):
        with restored(decoder):
            prune(decoder, Method("magnitude", 0.5, "row", update=update), calibration=seen)
            errors.append(float((capture(decoder, tokens, stop=1).hidden[1] - intact).square().sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", ["llama3", "olmoe"])
def test_sparsegpt_prunes_each_block_by_what_the_one_before_left(family: str) -> None:
    one, two = fresh(family), fresh(family)
    adaptive = prune(one, Method("sparsegpt", 0.5), calibration=EXAMPLES).keep
    first = prune(two, Method("sparsegpt", 0.5, "global"), calibration=EXAMPLES).keep
    assert any(not torch.equal(adaptive[name], first[name]) for name in adaptive)


def test_experts_without_tokens_are_not_updated() -> None:
    same = Calibration((Example((7,) * 6, 1, "equal", ""),), (0,))
    for method in (Method("sparsegpt", 0.5), Method("wanda", 0.5, update="refit")):
        decoder = fresh("olmoe")
        before = weights(decoder)
        pruned = prune(decoder, method, calibration=same)
        assert pruned.unrouted
        for p in decoder.projections:
            if p.name in pruned.unrouted:
                keep = pruned.keep[p.name]
                assert torch.equal(p.read(), before[p.name] * keep)


def test_a_ranking_can_do_without_an_update() -> None:
    for scope in ("global", "matrix"):
        one, two = fresh("mistral"), fresh("mistral")
        before = weights(one)
        bare = prune(one, Method("sparsegpt", 0.5, scope, update="none"), calibration=EXAMPLES)
        assert all(torch.equal(p.read(), before[p.name] * bare.keep[p.name]) for p in one.projections)
        if scope == "global":
            updated = prune(two, Method("sparsegpt", 0.5, scope), calibration=EXAMPLES)
            assert all(torch.equal(keep, updated.keep[name]) for name, keep in bare.keep.items())


def test_a_pattern_that_does_not_fit_is_refused_before_anything_changes() -> None:
    decoder = fresh("llama3")
    before = fingerprint(decoder.model)
    with pytest.raises(
        OptionError, match=r"a pattern of 7 needs a multiple of 7 inputs, and layers\.0\.\w+ has"
    ):
        prune(decoder, Method("wanda", 5 / 7, "2:7"), calibration=EXAMPLES)
    assert fingerprint(decoder.model) == before


def test_much_damping_makes_sparsegpt_magnitude() -> None:
    kept = [
        prune(fresh("llama3"), Method(name, 0.5, damping=damping), calibration=EXAMPLES).keep
        for name, damping in (("magnitude", 0.01), ("sparsegpt", 1e6), ("sparsegpt", 0.01))
    ]
    assert all(torch.equal(keep, kept[1][name]) for name, keep in kept[0].items())
    assert not all(torch.equal(keep, kept[2][name]) for name, keep in kept[0].items())
