"""Rows of a run: how a method is written, what it makes, and the name that its row has."""

from dataclasses import dataclass
from typing import TypeAlias

from causalprune.core import OptionError
from causalprune.pruning import BUDGETS, TRAINS, Method, pattern_sparsity
from causalprune.shrinking import Shrinking

DEFAULT_SPARSITY = 0.2
SHRINK = "shrink"
"""The method of a recipe that removes parts for good."""


@dataclass(frozen=True)
class Removal:
    """A smaller model among the methods of a recipe: this share of all parameters goes, for which kinds of units compete."""

    share: float
    how: Shrinking

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise OptionError(
                f"the share of all parameters that shrink removes is between 0 and 1, not {self.share:g}"
            )


Cell: TypeAlias = Method | Removal | None
"""How a row of a run is made; None for the dense model."""


def label(method: Method | Removal) -> str:
    """Return the name of a pruned model in files and tables: `wanda-row-0.5`, `wanda+refit-2:4-0.5`, `shrink-0.2`."""
    if isinstance(method, Removal):
        update = "" if method.how.update == Shrinking.update else f"+{method.how.update}"
        return f"{SHRINK}{update}-{method.share:g}"
    words = "".join(f"+{word}" for word in (method.budgets, method.update) if word)
    return f"{method.criterion}{words}-{method.resolved_scope}-{method.sparsity:g}"


def writes_own(cell: Cell) -> bool:
    """Tell whether text that the model writes is preserved by default: where weights are trained, or parts go for good."""
    return isinstance(cell, Removal) or (cell is not None and cell.resolved_update in TRAINS)


def parse_method(
    text: str, sparsity: float | None = None, seed: int = 0, damping: float = Method.damping
) -> Method:
    """Return the method that `criterion[:scope][+budgets][+update]` names.

    As `wanda`, `wanda:2:4`, `cap:global+refit`, `wanda+graded+refit` or `causal:2:4+graded`. Without `sparsity`, a pattern's own or
    `DEFAULT_SPARSITY` is taken.
    """
    if is_removal(text):
        raise OptionError(
            f"{text} makes a smaller model: `causalprune shrink`, or a method of a recipe for `causalprune run`"
        )
    name, *words = text.split("+")
    criterion, _, scope = name.partition(":")
    if sparsity is None:
        sparsity = pattern_sparsity(scope) or DEFAULT_SPARSITY
    budgets = [word for word in words if word in BUDGETS]
    updates = [word for word in words if word not in BUDGETS]
    if len(budgets) > 1 or len(updates) > 1:
        raise OptionError(
            f"the method {text!r} has two words for the same: one of {BUDGETS} and one update are allowed"
        )
    update, own = (words[0] if words else None for words in (updates, budgets))
    return Method(criterion, sparsity, scope or None, seed, update, own, damping)


def is_removal(text: str) -> bool:
    """Tell whether a method makes a smaller model in place of zeros."""
    return text.partition("+")[0].partition(":")[0] == SHRINK


def parse_removal(text: str, seed: int = 0, batch_tokens: int = 2048) -> Removal:
    """Return the smaller model that `shrink[:share][+update]` names, as `shrink:0.2` or `shrink:0.1+distill`."""
    name, plus, update = text.partition("+")
    try:
        share = float(name.partition(":")[2] or DEFAULT_SPARSITY)
    except ValueError:
        raise OptionError(f"{text}: shrink takes a share of all parameters, as in shrink:0.2") from None
    how = Shrinking(update=update if plus else Shrinking.update, seed=seed, max_batch_tokens=batch_tokens)
    return Removal(share, how)
