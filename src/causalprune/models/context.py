"""How many tokens of a text a model was made for, and how it goes on after some."""

import inspect
from typing import Any

from jaxtyping import Int
from torch import Tensor

GROWS = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling whose factor is not in `max_position_embeddings` yet (as vLLM reads configurations)."""


def positions(config: Any) -> int | None:
    """Return the positions that a configuration has, after scaling; None where it has no limit."""
    text = config.get_text_config(decoder=True)
    longest: int | None = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if longest is None or scaling.get("rope_type", scaling.get("type")) not in GROWS:
        return longest
    original = scaling.get("original_max_position_embeddings") or longest
    return max(longest, int(original * (scaling.get("factor") or 1)))


def go_on(
    model: Any, tokens: Int[Tensor, "batch time"], cache: Any, seen: Tensor | None = None, **extra: Any
) -> tuple[Any, Any]:
    """Run a model on tokens after those that its cache holds (None: none); return its output and the cache, None where it keeps none.

    `seen` is the mask of all tokens so far, `[batch time]`. Mamba calls its cache otherwise, and wants no mask after the first tokens.
    """
    known = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in known and "past_key_values" not in known else "past_key_values"
    mask = None if name == "cache_params" and cache is not None else seen
    output = model(input_ids=tokens, attention_mask=mask, use_cache=True, **{name: cache}, **extra)
    return output, getattr(output, name, None)
