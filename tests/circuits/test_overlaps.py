"""Circuits beside each other: what cannot be compared, and what must not be mixed up."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constructed import constructed, problems
from reference import shared
from test_finding import PROBLEMS, find

import causalprune as cp
from causalprune.circuits import Circuit
from causalprune.cli import showing
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


def circuits() -> dict[str, Circuit]:
    """Return circuits of the constructed AND, which has 16 heads in two layers: of two sets of problems."""
    how = {"question": cp.Question(), "estimator": cp.Estimator("gradient"), "rescore": 1, "keep": 0.5}
    return {
        name: find(constructed("and"), problems("and", 12, seed), problems("and", 12, seed + 2), **how)
        for seed, name in enumerate("ab")
    }


def test_where_no_other_set_can_be_drawn_none_is_shown() -> None:
    """The first layer whole has no other heads beside it, half of both has."""
    orders = {"whole": torch.arange(16), "half": torch.arange(16).view(2, 8).T.flatten()}
    own = {name: replace(circuits()["a"], order=order) for name, order in orders.items()}
    found = cp.overlap(own, constructed("and"), remove=8, stage=cp.quiet)
    assert found.random[0] == (None, None)
    assert all(value is not None and value != found.removal[1][0] for value in found.random[1])
    table = showing.overlap(found)[1]
    assert [*table.columns[1].cells][1] == "no other set"
    assert "of the same kinds and, where one has several, layers" in str(table.caption)


def test_circuits_in_another_order_and_beside_others_are_not_measured_again(tmp_path: Path) -> None:
    decoder, own = constructed("and"), circuits()
    first = cp.overlap(own, decoder, remove=2, folder=tmp_path, stage=cp.quiet)
    before = (tmp_path / "overlap.ledger").read_bytes()
    turned = cp.overlap(dict(reversed(own.items())), decoder, remove=2, folder=tmp_path, stage=cp.quiet)
    assert (tmp_path / "overlap.ledger").read_bytes() == before
    flipped = [tuple(row[::-1] for row in rows[::-1]) for rows in (first.removal, first.random)]
    assert [turned.removal, turned.random] == flipped
    third = replace(own["a"], order=own["a"].order.flip(0))
    more = cp.overlap(own | {"c": third}, decoder, remove=2, folder=tmp_path, stage=cp.quiet)
    assert [row[:2] for row in more.removal[:2]] == [*first.removal]
    assert (tmp_path / "overlap.ledger").read_bytes().startswith(before)
    other = {name: replace(one, model_fingerprint=constructed("or").fingerprint) for name, one in own.items()}
    with pytest.raises(MismatchError, match="belongs to another run: the model is another"):
        cp.overlap(other, constructed("or"), remove=2, folder=tmp_path, stage=cp.quiet)


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
