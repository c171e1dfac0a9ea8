"""Functions of a user's that give every answer a number. Loading one runs its code: only where that was asked for."""

import functools
import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from causalprune.core import OptionError
from causalprune.evaluation.tasks.repeating import TRAITS

Scorer: TypeAlias = Callable[[list[str], list[str] | None], Iterable[float]]
"""Called with texts and targets (None where there are none), or with texts alone where it takes no more; returns one number each.

More is better, unless the function has an attribute `higher_is_better` that is False.
"""
TAKEN = {
    "accuracy",
    "acc_norm",
    "nats_per_token",
    "perplexity",
    "answers",
    "cot",
    "nll",
    "ppl",
    "kl",
    *TRAITS,
}
"""Names of our own measures."""


def is_taken(name: str) -> bool:
    """Tell whether a name is, or ends in, that of a measure of our own."""
    return name in TAKEN or name.endswith(("_ppl", "_kl"))


def load_scorers(words: Sequence[str]) -> dict[str, Scorer]:
    """Import scorers written `NAME=module:function`; modules are looked for in the current folder too.

    Raises:
        OptionError: a name is taken, or there is no such function.
    """
    found: dict[str, Scorer] = {}
    for word in words:
        name, mark, place = word.partition("=")
        module, colon, function = place.partition(":")
        if not (name.isidentifier() and mark and module and colon and function.isidentifier()):
            raise OptionError(
                f"a scorer is written NAME=module:function, as polite=mymetrics:polite, not {word!r}"
            )
        if is_taken(name) or name in found:
            raise OptionError(
                f"scorer {word!r}: {name} is or ends in another measure's name, choose a new one"
            )
        scorer = getattr(_imported(module, word), function, None)
        if not callable(scorer):
            what = "has none" if scorer is None else f"is {type(scorer).__name__}, which cannot be called"
            raise OptionError(f"scorer {word!r}: a function {function} is wanted, and {module} {what}")
        found[name] = scorer
    return found


def scores(
    name: str, scorer: Scorer, texts: Sequence[str], targets: Sequence[str] | None
) -> tuple[float, ...]:
    """Return what a scorer says of texts; `OptionError` where that is not one finite number for each."""
    try:
        found = [float(value) for value in _asked(scorer, texts, targets)]
    except (Exception, SystemExit) as cause:  # code of a user's
        at = _failing(scorer, texts, targets)
        raise OptionError(f"scorer {name} failed ({type(cause).__name__}: {cause}){at}") from cause
    if len(found) != len(texts):
        raise OptionError(
            f"scorer {name} gave {len(found)} numbers for {len(texts)} texts: one for each is wanted"
        )
    for value, text in zip(found, texts, strict=True):
        if not math.isfinite(value):
            raise OptionError(f"scorer {name} gave {value} for {text[:40]!r}: a finite number is wanted")
    return tuple(found)


def _asked(scorer: Any, texts: Sequence[str], targets: Sequence[str] | None) -> Iterable[Any]:
    """Call a scorer; one that takes texts alone, as classifiers of other libraries do, gets those alone."""
    given = [list(texts), None if targets is None else list(targets)]
    try:
        inspect.signature(scorer).bind(*given)
    except TypeError:
        given = given[:1]
    except ValueError:  # written in C: nothing is known of it
        pass
    found: Iterable[Any] = scorer(*given)
    return found


def _failing(scorer: Any, texts: Sequence[str], targets: Sequence[str] | None) -> str:
    """Return which text alone makes a scorer fail, in words; empty where none does."""
    for at, text in enumerate(texts):
        try:
            list(_asked(scorer, [text], None if targets is None else [targets[at]]))
        except (Exception, SystemExit):
            return f" on {text[:40]!r}"
    return ""


def reference(scorer: Scorer) -> str:
    """Return where a scorer comes from, as `module:function`, and the beginning of the SHA-256 of its source where there is some."""
    name = f"{scorer.__module__}:{getattr(scorer, '__qualname__', type(scorer).__name__)}"
    own = _source_of(scorer.__module__)
    return f"{name} ({own})" if own and scorer.__module__ != "__main__" else name


@functools.cache
def _source_of(module: str) -> str | None:
    """Return the beginning of the SHA-256 of a module's source as it was when it was asked for first: that is what runs."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _imported(module: str, word: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that nothing there takes the place of a package
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as cause:
        raise OptionError(f"scorer {word!r}: {cause}, neither installed nor in the current folder") from cause
    except (Exception, SystemExit) as cause:  # code of a user's
        raise OptionError(
            f"scorer {word!r}: {module} cannot be imported ({type(cause).__name__}: {cause})"
        ) from cause
