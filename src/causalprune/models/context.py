"""How many tokens of a text a model was made for."""

from typing import Any

GROWS = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling whose factor is not in `max_position_embeddings` yet (as vLLM reads configurations)."""


def positions(config: Any) -> int | None:
    """Return the positions that a configuration has, after scaling; None where it has no limit."""
    text = config.get_text_config(decoder=True)
    longest: int | None = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if longest is None or scaling.get("rope_type", scaling.get("type")) not in GROWS:
        return longest
    original = scaling.get("original_max_position_embeddings") or longest
    return max(longest, int(original * (scaling.get("factor") or 1)))
