"""Circuits beside each other: what cannot be compared, and what must not be mixed up."""

from dataclasses import replace
from pathlib import Path

import pytest
from constructed import constructed, problems
from reference import shared
from test_finding import PROBLEMS, find

import causalprune as cp
from causalprune.core.errors import MismatchError, OptionError


def test_one_ledger_holds_several_behaviours(tmp_path: Path) -> None:
    """Same problems, another ablation: what one of them lost is not read for the other."""
    decoder, given = constructed("chain"), problems("chain", 24)
    found = {
        ablation: find(decoder, given, problems("chain", 24, 1), question=cp.Question(ablation=ablation))  # type: ignore[arg-type]
        for ablation in ("zero", "mean")
    }
    plain = cp.overlap(found, decoder, remove=2, stage=cp.quiet)
    kept = cp.overlap(found, decoder, remove=2, folder=tmp_path, stage=cp.quiet)
    assert kept.removal == plain.removal
    assert plain.removal[0][0] != plain.removal[0][1]


@pytest.mark.thorough
def test_circuits_that_cannot_be_compared_are_named() -> None:
    model, estimator = shared("llama2"), cp.Estimator("gradient")
    heads, neurons = (
        find(model, PROBLEMS, PROBLEMS, question=cp.Question((kind,)), estimator=estimator, rescore=1)
        for kind in ("heads", "neurons")
    )
    with pytest.raises(OptionError, match="at least two circuits"):
        cp.overlap([heads])
    with pytest.raises(MismatchError, match="1 and 2 are circuits of different units"):
        cp.overlap([heads, neurons])
    with pytest.raises(MismatchError, match="1 is a circuit of another model than or"):
        cp.overlap([heads, heads], constructed("or"), stage=cp.quiet)
    with pytest.raises(OptionError, match=r"12 of 12 units cannot be removed as a circuit"):
        cp.overlap([heads, heads], model, remove=len(heads.units), stage=cp.quiet)
    with pytest.raises(MismatchError, match="circuits of different models"):
        cp.overlap([heads, replace(heads, model_fingerprint="other")])
