"""GGUF files: what they say of a model beside its weights, of which transformers reads a part.

llama.cpp keeps settings as metadata and as tensors of their own. What a file says is put into the configuration; what
that cannot say is refused by name. What no file says is as llama.cpp has it: a rotary base of 10,000, no sliding window in
a Llama, routers of Qwen2-MoE that do not sum to one, queries of Gemma scaled by the width of a head.
"""

import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tokenizers import pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from causalprune.core import ModelError

try:  # what this transformers knows of rules
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
except ImportError:
    GGUF_PRE_TOKENIZER_SPLITS: dict[str, str] = {}  # type: ignore[no-redef]

Fields = tuple[str, ...]
"""Names that a setting has in configurations, of which each has one; none where it follows from others."""

_NORM = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_SHAPE: dict[str, Fields] = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": (),  # the width of a head
    "attention.value_length": (),
    "attention.layer_norm_epsilon": _NORM,
    "attention.layer_norm_rms_epsilon": _NORM,
    "vocab_size": (),  # the embedding has as many rows
    "tensor_data_layout": (),
}
_WINDOW: dict[str, Fields] = {"attention.sliding_window": ("sliding_window",)}
_EXPERTS: dict[str, Fields] = {
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
_FINAL_CAP: dict[str, Fields] = {"final_logit_softcapping": ("final_logit_softcapping",)}
_CAPS: dict[str, Fields] = {**_FINAL_CAP, "attn_logit_softcapping": ("attn_logit_softcapping",)}
ARCHITECTURES: dict[str, dict[str, Fields]] = {
    "llama": {},
    "qwen2": {},
    "qwen2moe": _EXPERTS,
    "qwen3": {},
    "qwen3moe": _EXPERTS,
    "gemma2": _WINDOW | _CAPS,
    "gemma3": _WINDOW | _FINAL_CAP,
    "phi3": _WINDOW,
    "starcoder2": {},
    "stablelm": {"use_parallel_residual": ("use_parallel_residual",)},
    "nemotron": {},
    "bloom": dict.fromkeys(("context_length", "feed_forward_length", "attention.head_count_kv"), ()),
    "gpt2": {},
    "minimax-m2": _EXPERTS,
}
"""What is read: the settings of every architecture beside shape and rotation."""

_PARTIAL = ("phi3", "stablelm", "nemotron", "minimax-m2")
"""Architectures whose classes can rotate a part of each head."""
_YARN = {
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_FACTORS = "rope_freqs.weight"
_LONGROPE = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
_BASE, _HIGH, _POSITIONS = 10_000.0, 4.0, 8192  # llama.cpp's base; Llama 3's usual factor and positions
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_ENDS = ("eot", "eom")
"""Tokens that end a turn, where the file names others than the one that ends a text."""
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Rules by which llama.cpp cuts every digit off before merges, and transformers does not (findings/)."""
_PLAIN = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
"""Rules that are GPT-2's."""
_LONG = (".tokens", ".scores", ".token_type", ".merges")
_WIDE_GEMMA = {("gemma2", 46), ("gemma3", 62)}  # the 27B models, which llama.cpp tells by their layers


class Gguf(NamedTuple):
    """What a file holds: settings without the name of the architecture before them, special tokens, and tensors."""

    name: str
    architecture: str
    settings: dict[str, Any]
    special: dict[str, int | list[int] | None]
    tensors: dict[str, Any]
    words: tuple[str, str] = ("", "")
    """The kind of tokenizer, and the rule by which it cuts texts before merges."""

    def refuse(self, key: str) -> NoReturn:
        """Raise `ModelError` for a setting that the model would not have."""
        value = f" = {self.settings[key]}" if key in self.settings else ""
        raise ModelError(
            f"{self.name!r} has {self.architecture}.{key}{value}, which cannot be read from GGUF: pass the original model"
        )

    def check_weights(self, model: PreTrainedModel) -> None:
        """Raise `ModelError` where the file holds more or fewer weights than the model that was made of it."""
        held = {name: int(t.n_elements) for name, t in self.tensors.items() if not name.startswith("rope_")}
        inside = {id(t): t.numel() for t in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
        if (found := sum(held.values())) != (wanted := sum(inside.values())):
            kinds = {name.split(".", 2)[2] if name.startswith("blk.") else name for name in held}
            raise ModelError(
                f"{self.name!r} holds {found:,} weights, and a {type(model).__name__} made of it {wanted:,}, so that "
                f"something cannot be read from GGUF: pass the original model (its tensors: {', '.join(sorted(kinds))})"
            )


def read_gguf(path: Path) -> Gguf:
    """Read what a GGUF file says of its model; its weights stay on the disk.

    Raises:
        ModelError: it is a part of a split file, or of an architecture that is not read.
    """
    from gguf import GGUFReader  # noqa: PLC0415  an extra

    reader = GGUFReader(path)
    small = {key: field for key, field in reader.fields.items() if not key.endswith(_LONG)}
    fields = {key: field.contents() for key, field in small.items()}
    if (parts := fields.get("split.count", 1)) > 1:
        raise ModelError(
            f"{str(path)!r} is part {fields['split.no'] + 1} of {parts} of a split GGUF file: join them first, with "
            "`llama-gguf-split --merge FIRST-PART WHOLE.gguf`"
        )
    own = str(fields["general.architecture"])
    if own not in ARCHITECTURES:
        raise ModelError(
            f"{str(path)!r} is a GGUF file of the architecture {own}, which cannot be read: pass the original model "
            f"({', '.join(ARCHITECTURES)} can)"
        )
    settings = {key.removeprefix(f"{own}."): v for key, v in fields.items() if key.startswith(f"{own}.")}
    ids = {field: fields.get(f"tokenizer.ggml.{kind}_token_id") for field, kind in _SPECIAL.items()}
    ends = (ids["eos_token_id"], *(fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in _ENDS))
    some = [*dict.fromkeys(own for own in ends if own is not None)]
    ids["eos_token_id"] = some if len(some) > 1 else next(iter(some), None)
    words = str(fields.get("tokenizer.ggml.model", "")), str(fields.get("tokenizer.ggml.pre", ""))
    return Gguf(str(path), own, settings, ids, {tensor.name: tensor for tensor in reader.tensors}, words)


def cut_as(file: Gguf | None, tokenizer: Any) -> Any:
    """Let a tokenizer that was read from a GGUF file, if from one, cut texts before merges as llama.cpp does; warn where that is not known."""
    if file is None or file.words[0] != "gpt2":
        return tokenizer
    rule = file.words[1]
    if rule in _DIGITS:
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    elif rule not in {*GGUF_PRE_TOKENIZER_SPLITS, *_PLAIN}:
        warnings.warn(
            f"{file.name}: texts are cut by llama.cpp's rule {rule!r}, which is not known here, and now by GPT-2's: some get other "
            "tokens; pass the original model to be sure",
            stacklevel=3,
        )
    return tokenizer


def gguf_config(file: Gguf) -> PreTrainedConfig:
    """Return the configuration of the model in a GGUF file, with everything that the file says of it.

    Raises:
        ModelError: the file has a setting that the configuration cannot have.
    """
    path = Path(file.name)
    config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.vocab_size = len(file.tensors["token_embd.weight"].data)
    for name, token in file.special.items():
        setattr(config, name, token)
    # without it transformers leaves queries and keys as llama.cpp has them
    if file.architecture == "llama" and "attention.head_count_kv" not in file.settings:
        file.refuse("attention.head_count_kv")
    known = _SHAPE | ARCHITECTURES[file.architecture]
    for key, value in file.settings.items():
        if key in known:
            _set(file, config, key, known[key])
        elif not key.startswith("rope.") and bool(value) != (key == "attention.causal"):
            file.refuse(key)
    for bias, name in (("attn_q", "attention_bias"), ("ffn_up", "mlp_bias")):
        if hasattr(config, name):
            setattr(config, name, f"blk.0.{bias}.bias" in file.tensors)
    _rotate(file, config, _head(file, config))
    found: PreTrainedConfig = config
    return found


def _head(file: Gguf, config: Any) -> int:
    """Put the width of a head into the configuration, and what llama.cpp makes of it, and return it."""
    per_head = config.hidden_size // config.num_attention_heads
    head: int = file.settings.get("attention.key_length", per_head)
    if file.settings.get("attention.value_length", head) != head:
        file.refuse("attention.value_length")
    if hasattr(config, "head_dim"):
        config.head_dim = head
    elif head != per_head:
        file.refuse("attention.key_length")
    if hasattr(config, "query_pre_attn_scalar"):
        wide = (file.architecture, config.num_hidden_layers) in _WIDE_GEMMA
        config.query_pre_attn_scalar = per_head if wide else head
    if file.architecture == "llama" and hasattr(config, "sliding_window"):  # transformers makes it a Mistral
        config.sliding_window = None
    return head


def _set(file: Gguf, config: Any, key: str, fields: Fields) -> None:
    """Put a setting into the configuration."""
    value = file.settings[key]
    if isinstance(value, list):  # by layer; zero where a layer has none
        alike = {*value} - {0}
        value = alike.pop() if len(alike) == 1 else file.refuse(key)
    name = next((field for field in fields if hasattr(config, field)), None)
    if name is not None:
        setattr(config, name, (_short(value) or None) if key in _WINDOW | _CAPS else _short(value))
    elif fields and value:
        file.refuse(key)


def _short(value: Any) -> Any:
    """Return a number of single precision with the fewest digits that mean it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rotate(file: Gguf, config: Any, head: int) -> None:
    """Put base, width and scaling of the rotary embedding into the configuration."""
    said = {key: _short(value) for key, value in file.settings.items() if key.startswith("rope.")}
    if not getattr(config, "rope_parameters", None):
        for key in (*said, *(name for name in file.tensors if name.startswith("rope_"))):
            file.refuse(key)
        return
    width, base = said.pop("rope.dimension_count", head), said.pop("rope.freq_base", _BASE)
    if width != head and file.architecture not in _PARTIAL:
        file.refuse("rope.dimension_count")
    own = {"rope_theta": base, **_scaling(file, config, said, base ** (np.arange(0, width, 2) / width))}
    if file.architecture in _PARTIAL:
        own["partial_rotary_factor"] = width / head
    if "full_attention" in config.rope_parameters:
        local = {"rope_type": "default", "rope_theta": said.pop("rope.freq_base_swa", _BASE)}
        own = {"full_attention": own, "sliding_attention": local}
    for key in said:
        file.refuse(key)
    config.rope_parameters = own


def _scaling(file: Gguf, config: Any, said: dict[str, Any], turns: Any) -> dict[str, Any]:
    """Return how the rotary embedding is scaled, and take what says it out of `said`; the `turns` are 1 / frequency."""
    said.pop("rope.scaling.finetuned", None)  # tells where the weights come from
    factor = said.pop("rope.scaling.factor", said.pop("rope.scale_linear", 1.0)) or 1.0
    kind = said.pop("rope.scaling.type", "linear")
    kind = "none" if kind == "linear" and factor == 1 else kind
    positions = said.pop("rope.scaling.original_context_length", config.max_position_embeddings)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = positions
    own = {"rope_type": kind, "original_max_position_embeddings": positions}
    by_tensor = {
        name: [_short(float(x)) for x in t.data]
        for name, t in file.tensors.items()
        if name.startswith("rope_")
    }
    if kind == "none" and not by_tensor:
        return {"rope_type": "default"}
    if kind == "linear" and not by_tensor:
        return {"rope_type": kind, "factor": factor}
    if kind == "yarn" and not by_tensor:
        named = {field: said.pop(key) for key, field in _YARN.items() if key in said}
        return {**own, "factor": factor, **named}
    if kind in ("none", "longrope") and by_tensor.keys() == _LONGROPE.keys():
        own |= {_LONGROPE[name]: value for name, value in by_tensor.items()}
        scale = config.max_position_embeddings / positions
        usual = math.sqrt(1 + math.log(scale) / math.log(positions)) if scale > 1 else 1.0
        louder = said.pop("rope.scaling.attn_factor", usual)
        own |= {} if math.isclose(louder, usual, rel_tol=1e-6) else {"attention_factor": louder}
        return {**own, "rope_type": "longrope"}
    if kind == "none" and by_tensor.keys() == {_FACTORS}:
        return _llama3(np.array(by_tensor[_FACTORS]), 2 * math.pi * turns) or file.refuse(_FACTORS)
    return file.refuse("rope.scaling.type" if kind != "none" else min(by_tensor))


def _llama3(factors: Any, wavelengths: Any) -> dict[str, Any] | None:
    """Return the parameters by which Llama 3 divides its frequencies by these factors; None if there are none.

    A frequency of wavelength w is kept by the share s = (positions / w − 1) / (high − 1), within 0 and 1, and divided by the
    factor for the rest: two wavelengths between the ends give positions and high, one gives positions.
    """
    factor = float(factors.max())
    if np.allclose(factors, factor):
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    inside = (share > 1e-5) & (share < 1 - 1e-5)
    guesses = [
        (_HIGH, _POSITIONS),
        *(
            (_HIGH, w * (s * (_HIGH - 1) + 1))
            for s, w in zip(share[inside], wavelengths[inside], strict=True)
        ),
    ]
    if inside.sum() > 1:
        slope, start = np.polyfit(1 / wavelengths[inside], share[inside], 1)
        guesses.append((round(1 - 1 / start, 4), -slope / start))
    for high, positions in guesses:
        kept = np.clip((round(positions) / wavelengths - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - kept) / factor + kept), factors, rtol=1e-5):
            own = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
            return {**own, "original_max_position_embeddings": round(positions)}
    return None
