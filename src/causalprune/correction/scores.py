"""What a candidate is worth taking out: pure functions of what is known of all, in one literal dict.

Listing a function here makes it a choice of the command line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from causalprune.correction.evidence import HARM, ODDS, Need, Vector

TINY = 1e-30
SHARE = 0.1
"""Share of the candidates that `set-difference` leaves alone, as those that what is to stay needs most."""


@dataclass(frozen=True, eq=False)
class Known:
    """What scores may look at: what was gathered (as `Looking.gather` says), the harm that is expected of each, sizes of weights, the harm that a candidate's share of the limit is, a seed."""

    gathered: Mapping[Need, Tensor]
    harm: Vector | None
    magnitude: Vector
    floor: float
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """A score: the highest go first. `beneficial`: only those above zero go at all."""

    of: Callable[[Known], Vector]
    needs: tuple[Need, ...]
    beneficial: bool = False


def contrast(known: Known) -> Vector:
    """Fall of the undesired tokens' log-odds per harm to what is to stay.

    A candidate counts at least with its share of the harm that all may do together: with many to choose and little harm
    allowed, neither alone is what runs out.
    """
    assert known.harm is not None
    return known.gathered[ODDS] / (known.harm.clamp_min(0) + known.floor)


def difference(known: Known) -> Vector:
    """Mean over undesired samples less mean over others (Hatefi et al. 2025, arXiv 2506.13727, Eq. 7)."""
    return _worth(known, "undesired") - _worth(known, "preserve")


def _worth(known: Known, which: str) -> Vector:
    return known.gathered["rise", "undesired" if which == "undesired" else "preserve"]


def magnitude(known: Known) -> Vector:
    """The smallest weights go first (Han et al. 2015)."""
    return -known.magnitude


def random(known: Known) -> Vector:
    """By chance: what every score has to beat."""
    generator = torch.Generator().manual_seed(known.seed)
    return torch.rand(len(known.magnitude), generator=generator)


def set_difference(known: Known) -> Vector:
    """SNIP's score on undesired samples, but not of those that score highest on the others (Wei et al. 2024, arXiv 2402.05162)."""
    own, other = known.gathered["size", "undesired"], known.gathered["size", "preserve"]
    return own.masked_fill(_top(other, SHARE), -torch.inf)


def _top(values: Vector, share: float) -> Bool[Tensor, "candidate"]:
    found = torch.zeros(len(values), dtype=torch.bool)
    found[values.topk(int(share * len(values))).indices] = True
    return found


def ratio(known: Known) -> Vector:
    """Mean size of activations on undesired samples over that on the others (Pochkov and Schoots 2024, arXiv 2403.01267)."""
    return known.gathered["activity", "undesired"] / (known.gathered["activity", "preserve"] + TINY)


def dampening(known: Known) -> Vector:
    """Fisher information on undesired samples over that on the others (Foster et al. 2024, arXiv 2308.07707)."""
    own, other = known.gathered["square", "undesired"], known.gathered["square", "preserve"]
    return own / (other + TINY)


def onset(known: Known) -> Vector:
    """Mean size of activations from the first undesired token on less before (Hiraoka and Inui 2024, arXiv 2410.13497)."""
    return known.gathered["onset", "undesired"]


SCORES: dict[str, Score] = {
    "contrast": Score(contrast, (ODDS, HARM), beneficial=True),
    "difference": Score(difference, (("rise", "undesired"), ("rise", "preserve"))),
    "magnitude": Score(magnitude, ()),
    "random": Score(random, ()),
    "set-difference": Score(set_difference, (("size", "undesired"), ("size", "preserve"))),
    "ratio": Score(ratio, (("activity", "undesired"), ("activity", "preserve"))),
    "dampening": Score(dampening, (("square", "undesired"), ("square", "preserve"))),
    "onset": Score(onset, (("onset", "undesired"),)),
}
ACTIVE = ("ratio", "onset")
"""Scores of what units send, which single weights and experts do not have."""
