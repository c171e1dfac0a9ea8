import pytest

from causalprune.criteria import CRITERIA, SCOPES
from causalprune.errors import OptionError
from causalprune.pruning import Method


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_0_and_1_is_refused(sparsity: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        Method("magnitude", sparsity)


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("criterion", "wandaa", "unknown method 'wandaa': did you mean 'wanda'"),
        ("criterion", "CAP", "unknown method 'CAP': choices are cap, magnitude, random, wanda"),
        ("scope", "rows", "unknown scope 'rows': did you mean 'row'"),
        ("scope", "", "unknown scope '': choices are global, matrix, row"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(field: str, name: str, message: str) -> None:
    names = {"criterion": "wanda", "scope": None, field: name}
    with pytest.raises(OptionError) as error:
        Method(names["criterion"], 0.5, names["scope"])
    assert message in str(error.value)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_a_scope_is_the_criterions_own_unless_it_is_given(criterion: str) -> None:
    assert Method(criterion, 0.5).resolved_scope == CRITERIA[criterion].scope
    for scope in SCOPES:
        assert Method(criterion, 0.5, scope).resolved_scope == scope
