"""Records in a line or two: what they are and how large, in place of all that they hold; and as JSON."""

import math
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

NAME = 60
"""Characters of a name; of a longer one its end is shown."""


class Shown:
    """A record that shows itself in a line or two, and in a notebook as a picture where there is one."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({TOLD.get(type(self).__name__, _fields)(self)})"

    def _repr_html_(self) -> str | None:
        # Pictures are made in the wing `reports`, which comes after this one: the package itself knows where.
        found: str | None = sys.modules["causalprune"].drawn(self)
        return found


class _Short(reprlib.Repr):
    """Shapes in place of tensors, and the first few members of everything else."""

    def repr_Tensor(self, own: Any, level: int) -> str:  # noqa: N802 (named after the class)
        return f"{str(own.dtype).removeprefix('torch.')}{list(own.shape)}"

    repr_Parameter = repr_Tensor  # noqa: N815


_short = _Short()
_short.maxtuple = _short.maxdict = _short.maxlevel = 3
_short.maxstring = NAME


def _fields(own: Any) -> str:
    return ", ".join(f"{field.name}={_short.repr(getattr(own, field.name))}" for field in fields(own))


def _decoder(own: Any) -> str:
    heads = sorted({sum(mixer.n_heads for mixer in layer.mixers) for layer in own.layers})
    total, pool = sum(p.numel() for p in own.model.parameters()), sum(p.size for p in own.projections)
    name = own.name if len(own.name) <= NAME else f"…{own.name[1 - NAME :]}"
    dtype = str(own.projections[0].parameter.dtype).removeprefix("torch.")
    shape = f"{len(own.layers)} layers of {' to '.join(dict.fromkeys(map(str, (heads[0], heads[-1]))))} heads"
    return f"{name}: {shape}, {total:,} parameters, {pool:,} of them prunable; {dtype} on {own.device}"


def _calibration(own: Any) -> str:
    sources = Counter(example.source for example in own.examples)
    tokens, targets = (
        sum(column) for column in zip(*((len(e.tokens), e.target_tokens) for e in own.examples), strict=True)
    )
    named = ", ".join(f"{n} × {source}" for source, n in sources.items())
    return f"{named}; {own.n_subsets} subsets, {tokens:,} tokens, {targets:,} of them targets"


def _effects(own: Any) -> str:
    kinds = ", ".join(f"{n:,} × {kind}" for kind, n in Counter(unit.kind for unit in own.units).items())
    how = own.description.get("estimator", "exact")
    how = how["name"] if isinstance(how, dict) else how
    return f"{kinds}; effect {own.effect} in nats, {how}, on {len(own.tokens):,} examples"


def _result(own: Any) -> str:
    weight = sum(own.weights)
    value = sum(own.values) / weight if weight else math.nan
    if own.metric == "perplexity":
        value = math.exp(value) if value < 700 else math.inf
    return f"{own.task}: {value:.4g} {own.metric.replace('_', ' ')} on {len(own.values):,} examples"


TOLD: dict[str, Callable[[Any], str]] = {
    "Decoder": _decoder,
    "Calibration": _calibration,
    "Effects": _effects,
    "EvalResult": _result,
}
"""What to say of a record by the name of its class; of others, their fields in short."""


def plain(value: Any) -> Any:
    """Return nested values as JSON has them: numbers that are not finite (no limit, or not known) as null."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
