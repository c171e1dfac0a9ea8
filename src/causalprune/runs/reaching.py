"""How far a search for a file goes: which shares can meet a limit, and when no more of them can pay."""

from causalprune.core import OptionError, say, size_of
from causalprune.runs.cells import outlined
from causalprune.runs.searching import Search
from causalprune.shipping import NEAR, Point, best, half, kept_after, worse

ROUNDED = 1.1
"""How much more than its share may go from layers whose widths are rounded."""


def check_reach(search: Search, points: list[Point]) -> None:
    """Raise `OptionError`, before anything is made smaller, for a size that nothing which is tried can have."""
    least, most = min(points, key=lambda p: p.bytes), max(search.shares, default=0.0)
    if search.asked.limit.kind == "size" and search.asked.limit.value < (floor := least_bytes(search, most)):
        raise OptionError(
            f"no file of {search.spec.name} is of {search.asked.limit}: the whole model as {least.mix} has "
            f"{least.bytes / 1e6:.1f} MB, {search.types(0.0)[least.mix]['fixed'] / 1e6:.1f} of them outside of its layers, and "
            f"without {most:.0%} of its parameters about {floor / 1e6:.0f} MB at least"
        )


def least_bytes(search: Search, share: float) -> float:
    """Return about how many bytes the smallest file without a share has, at least.

    All that goes is taken from layers: embeddings, norms and metadata stay, in whatever type they get.
    """
    bare = outlined(search.spec)
    inside = sum(p.size for p in bare.projections) / size_of(bare).parameters
    left = max(1 - ROUNDED * share / inside, 0.0)
    return float(
        min(own["fixed"] + (own["bytes"] - own["fixed"]) * left for own in search.types(0.0).values())
    )


def too_large(search: Search, share: float) -> bool:
    """Tell, and say, whether a model without a share, which would have to be made, has no file within a size that is asked for."""
    limit = search.asked.limit
    if limit.kind != "size" or share == search.start.lacks:
        return False
    if (least := least_bytes(search, share)) <= limit.value:
        return False
    with search.options.stage(f"without {share:.0%}") as progress:
        say(progress, note=f"left out: its smallest file has about {least / 1e6:.0f} MB, at least")
    return True


def foreseen(search: Search, share: float) -> float:
    """Return how much worse than dense a model without a share is, unrounded: what was measured, or the line through the last two.

    The rise grows ever faster with the share, so that the line is kind to it.
    """
    known = {0.0: 0.0}
    known |= {own: _behind(search, own) for own in search.shares if f"{own:g}/" in search.book.rows}
    if share in known or len(known) == 1:
        return known.get(share, 0.0)
    (first, low), (second, high) = sorted(known.items())[-2:]
    return high + (high - low) / (second - first) * (share - second)


def _behind(search: Search, share: float) -> float:
    return worse(half(search.result(share, ""), 0), search.dense)


def enough(search: Search, share: float, points: list[Point]) -> bool:
    """Tell whether a model without a share is, unrounded, so far behind a file that meets the limit that rounding it cannot pay."""
    limit, rise = search.asked.limit, foreseen(search, share)
    meeting = best(points, search.rises(points), limit, search.keeps(points))
    if not meeting or limit.kind == "speed":  # which is known once files are timed
        return False
    if limit.kind == "keep":
        return kept_after(rise, search.dense) < limit.value - NEAR
    return rise > search.rises(points)[meeting[0].name] + NEAR
