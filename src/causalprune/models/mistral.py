"""A Llama under another name: the same weights as a Mistral."""

from dataclasses import replace

from transformers import MistralConfig, MistralForCausalLM

from causalprune.core import Decoder, ModelError
from causalprune.models.anatomy import reshaped, unfilled

_LLAMA = (
    "model_type",
    "architectures",
    "attention_bias",
    "mlp_bias",
    "pretraining_tp",
    "transformers_version",
)
"""What a configuration of a Llama says that one of a Mistral does not, or says otherwise."""


def as_mistral(decoder: Decoder) -> Decoder:
    """Return a Llama as a Mistral without a window: the same weights, which compute the same bit for bit.

    A Llama's heads have to divide its width, a Mistral's need not, so that it may lose KV groups one by one.

    Raises:
        ModelError: it is no Llama, or one with biases, for which a Mistral has no place.
    """
    own = decoder.model.config
    if own.model_type != "llama" or own.attention_bias or own.mlp_bias:
        raise ModelError(
            f"only Llamas without biases are Mistrals, not {decoder.name} ({own.model_type}): leave out --as-mistral"
        )
    stated = {key: value for key, value in own.to_dict().items() if key not in _LLAMA}
    config = MistralConfig(**stated, sliding_window=None)
    config._attn_implementation = own._attn_implementation  # noqa: SLF001
    model = unfilled(MistralForCausalLM, config, decoder.model.dtype)
    made = reshaped(decoder, model, decoder.model.state_dict())
    return replace(made, fingerprint=decoder.fingerprint, base=decoder.base)
