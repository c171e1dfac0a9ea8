"""What is asked of a correction, and what is said of one."""

from dataclasses import replace

import pytest
from planted import built, samples

import causalprune as cp
from causalprune.circuits import Value
from causalprune.core.errors import OptionError
from causalprune.correction.correcting import correct
from causalprune.correction.records import Contrast
from causalprune.correction.telling import sentences


def test_a_budget_is_how_many_go_at_most() -> None:
    assert Contrast(budget=0.4).number(192) == 76
    assert Contrast(budget=0.29).number(100) == 29  # 28.999999999999996 in binary
    for candidates in (3, 7, 192, 1000, 46_080, 61_440):
        with pytest.raises(OptionError, match="less than one: ask for at least") as told:
            Contrast(budget=0.99 / candidates).number(candidates)
        least = float(str(told.value).partition("at least ")[2].partition("%")[0]) / 100
        assert int(least * candidates + 1e-9) == 1


def test_one_kind_of_units_may_be_a_word() -> None:
    assert Contrast(units="heads") == Contrast(units=("heads",))  # type: ignore[arg-type]


def test_what_went_is_told_in_the_words_of_the_options() -> None:
    decoder, planting = built(1)
    found = correct(decoder, *samples(planting), Contrast(("heads",), 2.0, 5.0, "random"), stage=cp.quiet)
    assert found.what.endswith("of 8 (heads) set to zero")
    method = found.record()["method"]
    assert str(method["budget"]) == "2"
    assert not {"weights", "certain"} & method.keys()
    clear, unclear = (replace(found.after, benefit=Value(1.0, low, 2.0)) for low in (0.5, -0.5))
    said = [" ".join(sentences(replace(found, after=after))) for after in (clear, unclear)]
    assert ["not told apart from nothing" in own for own in said] == [False, True]
