"""Which class of transformers loads a model as a whole."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)


def class_for(config: Any) -> Any:
    """Return the class for images and text where the files are of such a model, or there is no other; else the causal one."""
    whole, causal = (
        _known(mapping, config)
        for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    )
    saved_whole = whole is not None and whole.__name__ in (config.architectures or ())
    return AutoModelForImageTextToText if whole and (causal is None or saved_whole) else AutoModelForCausalLM


def _known(mapping: Any, config: Any) -> Any:
    """Return the class of a mapping for a configuration, None where it has none."""
    found = mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found
