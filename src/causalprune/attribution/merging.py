"""Join effects that were measured in shares, on different machines."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from causalprune.core import Effects, MismatchError, OptionError


def merge(shares: Sequence[Effects]) -> Effects:
    """Return the effects of a whole run from all its shares, in any order; the same as if it had not been shared out.

    Raises:
        OptionError: a share is missing or given twice.
        MismatchError: the shares are of different models, calibrations or questions.
    """
    if not shares:
        raise OptionError("there is nothing to merge: pass the effects of all shares")
    first = shares[0]
    found = sorted(_share(effects) for effects in shares)
    parts = found[0][1]
    if found != [(i, parts) for i in range(1, parts + 1)]:
        given = ", ".join(f"{i}/{n}" for i, n in found)
        raise OptionError(f"all of 1/{parts} to {parts}/{parts} are needed, once each, and these are {given}")
    for effects in shares[1:]:
        for name, what in (
            ("model_fingerprint", "models"),
            ("calibration_fingerprint", "calibrations"),
            ("units", "units"),
            ("effect", "effects"),
        ):
            if getattr(effects, name) != getattr(first, name):
                raise MismatchError(f"the shares are of different {what}")
        if effects.description["question"] != first.description["question"]:
            raise MismatchError("the shares answer different questions")
        if effects.description.get("neurons") != first.description.get("neurons"):
            raise MismatchError(
                "the shares have grouped neurons otherwise, by effects that differ: take neurons:64 in a row"
            )
        if _alike(effects) != _alike(first):
            raise MismatchError(
                "the shares were measured in different batches or by different estimators: give all the same options"
            )
    estimator = {**first.description["estimator"], "share": (1, 1)}
    tokens = sum(float(effects.description["tokens_forwarded"]) for effects in shares)
    description: dict[str, Any] = {**first.description, "estimator": estimator, "tokens_forwarded": tokens}
    kl = [effects.kl_nats for effects in shares if effects.kl_nats is not None]
    masked = _joined([_beside(effects, first) for effects in shares])
    missing = masked.isnan()
    if holes := int((missing & ~missing.all(1, keepdim=True)).sum()):
        raise MismatchError(
            f"{holes} of {missing.numel()} measurements are in none of the shares: give all the same options"
        )
    return replace(first, masked_nats=masked, kl_nats=_joined(kl) if kl else None, description=description)


def _beside(effects: Effects, first: Effects) -> Tensor:
    """Return the masked losses of a share as the intact ones of the first have it: another machine rounds both alike."""
    if torch.equal(effects.intact_nats, first.intact_nats):
        return effects.masked_nats
    return effects.masked_nats - effects.intact_nats + first.intact_nats


def _share(effects: Effects) -> tuple[int, int]:
    index, parts = effects.description.get("estimator", {}).get("share", (1, 1))
    return int(index), int(parts)


def _alike(effects: Effects) -> dict[str, Any]:
    """Return how a share was measured, as all have to be."""
    return {
        key: value
        for key, value in effects.description["estimator"].items()
        if key not in ("share", "cache_gib")
    }


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return what any of the tables holds: NaN only where none has a value."""
    whole = parts[0].clone()
    for part in parts[1:]:
        whole = torch.where(whole.isnan(), part, whole)
    return whole
