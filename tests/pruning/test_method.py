from typing import Any

import pytest

from causalprune.core.errors import OptionError
from causalprune.pruning.criteria import CRITERIA, SCOPES
from causalprune.pruning.methods import Method
from causalprune.pruning.training import FEWEST, MOST, TOKENS, epochs


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_0_and_1_is_refused(sparsity: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        Method("magnitude", sparsity)


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("criterion", "wandaa", "unknown method 'wandaa': did you mean 'wanda'"),
        (
            "criterion",
            "CAP",
            "unknown method 'CAP': choices are cap, causal, fisher, magnitude, random, relevance, snip, sparsegpt, wanda",
        ),
        ("scope", "4:2", "unknown scope '4:2': choices are 2:4, global, matrix, row"),
        ("scope", "rows", "unknown scope 'rows': did you mean 'row'"),
        ("scope", "", "unknown scope '': choices are 2:4, global, matrix, row"),
        ("update", "refits", "unknown update 'refits': did you mean 'refit'"),
        ("budgets", "grade", "unknown budgets 'grade': did you mean 'graded'"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(field: str, name: str, message: str) -> None:
    names: dict[str, Any] = {"criterion": "wanda", "sparsity": 0.5, field: name}
    with pytest.raises(OptionError) as error:
        Method(**names)
    assert message in str(error.value)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_a_scope_is_the_criterions_own_unless_it_is_given(criterion: str) -> None:
    assert Method(criterion, 0.5).resolved_scope == CRITERIA[criterion].scope
    for scope in SCOPES:
        assert Method(criterion, 0.5, scope).resolved_scope == scope


def test_a_pattern_is_a_sparsity() -> None:
    assert Method("wanda", 0.5, "2:4").resolved_scope == "2:4"
    assert Method("wanda", 0.75, "1:4").sparsity == 0.75
    with pytest.raises(OptionError, match=r"2:4 is a sparsity of 0\.5, not 0\.6"):
        Method("wanda", 0.6, "2:4")


def test_updates_are_the_criterions_own_unless_they_are_given() -> None:
    assert Method("sparsegpt", 0.5).resolved_update == "obs"
    assert Method("sparsegpt", 0.5, update="none").resolved_update == "none"
    assert Method("wanda", 0.5).resolved_update == "none"
    with pytest.raises(OptionError, match="did you mean 'refit'"):
        Method("wanda", 0.5, update="refti")


@pytest.mark.parametrize(
    ("criterion", "scope", "update", "walks"),
    [
        ("magnitude", None, None, 0),
        ("cap", None, None, 0),
        ("cap", None, "refit", 1),
        ("wanda", None, None, 1),
        ("wanda", "global", None, 1),
        ("wanda", "global", "obs", 2),
        ("sparsegpt", None, None, 1),
        ("sparsegpt", "global", None, 2),
    ],
)
def test_walks_through_the_layers(criterion: str, scope: str | None, update: str | None, walks: int) -> None:
    assert Method(criterion, 0.5, scope, update=update).walks == walks


def test_training_sees_so_many_tokens_within_bounds() -> None:
    found = {tokens: epochs(tokens) for tokens in (0, 18_001, 26_676, 44_670, 10**6)}
    assert found == {0: 3, 18_001: 3, 26_676: 3, 44_670: 2, 10**6: 2}
    assert all(n in (FEWEST, MOST) or TOKENS <= n * tokens < TOKENS + tokens for tokens, n in found.items())


def test_passes_count_walks_trials_and_training() -> None:
    assert Method("magnitude", 0.5).passes(30, 48, 10_000) == 0
    assert Method("wanda", 0.5).passes(30, 48, 10_000) == 2
    assert Method("wanda", 0.5, "global", update="refit").passes(30, 48, 10_000) == 4
    assert Method("sparsegpt", 0.5, update="distill").passes(30, 48, 10_000) == 2 + 3 * MOST
    assert Method("sparsegpt", 0.5, update="distill").passes(30, 1000, 10**6) == 2 + 3 * FEWEST
    trials = 3 * 2 * 31 / 2 * 8 / 48
    slopes = 3
    graded = Method("causal", 0.5, update="refit", budgets="graded")
    assert graded.passes(30, 48, 10_000) == pytest.approx(4 + slopes + trials)
    assert graded.passes(30, 4, 10_000) == pytest.approx(4 + slopes + trials * 6)
    assert Method("causal", 0.5, update="refit").passes(30, 48, 10_000) == 2 + slopes
    assert Method("fisher", 0.5, "row").passes(30, 48, 10_000) == 2
    assert Method("fisher", 0.5).passes(30, 48, 10_000) == 2 + slopes
