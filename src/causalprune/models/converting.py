"""Tensors of a model in memory in the form and under the names that its files have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def as_saved(model: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors of a model as transformers saves them: renamed, and cut up where files hold parts."""
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415  it takes long

    found: Mapping[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found
