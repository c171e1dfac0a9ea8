"""Load a Hugging Face decoder from the Hub, a folder or a GGUF file."""

import contextlib
import io
import json
import logging
import re
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as hf_logging

from causalprune.core import CheckpointError, Decoder, ModelError, OptionError, Source, unknown
from causalprune.models.anatomy import check_config, inspect_model, outline
from causalprune.models.classes import class_for
from causalprune.models.context import positions
from causalprune.models.folders import (
    PICKLE,
    TOKENIZER_FILES,
    check_folder,
    is_adapter,
    warn_left_over,
    weight_files,
)
from causalprune.models.gguf import Gguf, cut_as, gguf_config, read_gguf
from causalprune.models.mixing import setting
from causalprune.models.packing import packing
from causalprune.models.placing import place
from causalprune.models.sources import described, opened

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_WRAPPERS = {"_orig_mod": "torch.compile", "module": "DistributedDataParallel"}
"""What puts a part of its own into the names of weights."""
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_CORRUPT = (SafetensorError, UnpicklingError, EOFError)
_LOAD_ERRORS = (*_CORRUPT, OSError, ValueError, RuntimeError, LookupError, ImportError, StrictDataclassError)


def load(  # noqa: PLR0913 (all that there is to say about loading)
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Decoder:
    """Load a causal language model for inference and find what can be pruned in it.

    `name` is a name on the Hugging Face Hub, a local folder, or a GGUF file (or a folder that holds
    nothing but one). GGUF weights are dequantised to float32 unless `dtype` says otherwise, FP8 by blocks and MXFP4 to
    bfloat16; other packed forms are refused. The device `auto` is CUDA where there is one, else the CPU. The attention
    `auto` is that of the configuration; where its package is missing, sdpa.
    `device_map` (a dictionary may be given as JSON) goes to transformers and takes precedence over `device`; what
    it places on `disk` in another form than in the files is written to a temporary folder. The tokenizer is
    None for a local folder without tokenizer files. Weights that are there as a pickle only are refused unless
    `allow_pickle` is given; even then they are read as plain tensors (`weights_only`), never as code.
    """
    device, (folder, gguf) = device_of(device), _source(name, revision)
    check_options(dtype, device, attention)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    local = Path(folder).is_dir()
    if gguf is not None:
        options["gguf_file"] = gguf
    elif local:
        _check_files(name, Path(folder), allow_pickle)
    try:
        config, file = _config(name, folder, options)
        source = Source(Path(folder), torch.bfloat16, None, allow_pickle, trust_remote_code, not local)
        source, how = opened(name, source, config, dtype, options)
        how |= _attending(name, config, attention, device)
        own: Any = type(_empty(name, folder, options)) if "state_dict" in how else class_for(config)
        with _quiet(hide_bars=local), contextlib.ExitStack() as stack:
            model, loading = own.from_pretrained(
                None if "state_dict" in how else folder,
                **_spread(device_map, stack),
                output_loading_info=True,
                use_safetensors=None if allow_pickle or gguf is not None else True,
                weights_only=True,
                **how,
                **options,
            )
            known = not local or _speaks(Path(folder))
            tokenizer = cut_as(file, AutoTokenizer.from_pretrained(folder, **options)) if known else None
            place(model, device if device_map is None else None)
            weakref.finalize(model, stack.pop_all().close)
    except _LOAD_ERRORS as error:
        raise _load_error(name, error, local=local) from error
    _check_weights(name, model, loading, file)
    if source.form is not None:  # plain now, but `save_pretrained` refuses or packs what looks quantised
        model.hf_quantizer, model.is_quantized = None, False
        vars(model.config).pop("quantization_config", None)
        vars(model).pop("_weight_conversions", None)
    model.eval().requires_grad_(False)
    source = described(name, revision, source, model.dtype)
    return replace(inspect_model(model, tokenizer, name=name, revision=revision), source=source)


def device_of(name: str) -> str:
    """Return the name of a device, for `auto` that of CUDA where there is one, else of the CPU."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def check_options(dtype: str, device: str, attention: str = "auto") -> None:
    """Raise `OptionError` where a dtype or an attention is unknown, or a device cannot be used here."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if attention not in ATTENTIONS:
        raise unknown("attention", attention, ATTENTIONS)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error


def _config(name: str, folder: str, options: dict[str, Any]) -> tuple[Any, Gguf | None]:
    """Return the configuration of a model, and what the GGUF file says that it is in, if it is in one."""
    with _quiet(hide_bars=Path(folder).is_dir()):
        gguf = options.get("gguf_file")
        file = None if gguf is None else read_gguf(Path(folder, gguf))
        config = AutoConfig.from_pretrained(folder, **options) if file is None else gguf_config(file)
    check_config(config, name)
    return config, file


def _attending(name: str, config: Any, asked: str, device: str) -> dict[str, str]:
    """Return the option for the attention that is asked for; in place of a configuration's that cannot be had, sdpa."""
    own = getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
    if asked != "auto":
        return {"attn_implementation": asked}
    if own is None or (own in ATTENTIONS and "flash" not in own):
        return {}
    package = _PACKAGES.get(str(own), "kernels")
    if device.startswith("cuda") and find_spec(package):
        return {}
    warnings.warn(
        f"{name!r} asks for {own}, which needs a GPU and the package {package}: sdpa takes its place (--attention)",
        stacklevel=4,
    )
    return {"attn_implementation": "sdpa"}


def _check_weights(name: str, model: Any, loading: Any, file: Gguf | None) -> None:
    """Raise `ModelError` where files lack weights of the model, which says why where names show it; or a GGUF file has others."""
    absent = sorted({*map(str, loading["missing_keys"]), *map(str, loading["mismatched_keys"])})
    if absent and (found := wrapped(map(str, loading["unexpected_keys"]))):
        raise ModelError(f"{name!r} {found}")
    if absent:
        way = "files are missing or of another model; fetch them again"
        way = way if file is None else "they cannot be read from GGUF; pass the original model"
        lacks = f"lacks {len(absent)} weights of a {type(model).__name__}, such as {absent[0]}"
        raise ModelError(f"{name!r} {lacks}: {way}")
    if file is not None:
        file.check_weights(model)


def wrapped(names: Iterable[str]) -> str:
    """Return what is wrong with names of weights that were saved through a wrapper, empty for others."""
    for name in sorted(names):
        for part, wrapper in _WRAPPERS.items():
            if part in name.split(".")[: None if part.startswith("_") else 1]:
                return (
                    f"holds {name}: `{part}.` comes from {wrapper}, which was saved in place of the model in it; save "
                    f"`model.{part}`, or take `{part}.` out of the names in its files"
                )
    return ""


def _spread(device_map: str | dict[str, Any] | None, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Return the options that spread a model over devices and the disk, with a folder that goes with `stack`."""
    if device_map is None:
        return {}
    if isinstance(device_map, str) and device_map.startswith("{"):
        try:
            device_map = dict(json.loads(device_map))
        except ValueError as error:
            raise OptionError(f"device map {device_map!r} is no JSON object: {error}") from error
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="causalprune-offloaded-"))
    return {"device_map": device_map, "offload_folder": folder}


def read_shape(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, int, int]:
    """Return layers, heads per layer and parameters of a model, from its configuration alone."""
    model = _absent(name, revision, trust_remote_code=trust_remote_code)
    text = model.config.get_text_config(decoder=True)
    heads = setting(text, "num_attention_heads") or 0
    return text.num_hidden_layers, heads, sum(p.numel() for p in model.parameters())


def outlined(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Decoder:
    """Return what can be pruned in a model, from its configuration alone: it has no weights, and cannot run."""
    model = _absent(name, revision, trust_remote_code=trust_remote_code)
    own, folder = outline(model, None, name=name, revision=revision), _source(name)[0]
    with contextlib.suppress(CheckpointError):  # a configuration alone will do
        if weight_files(Path(folder))[0][0].suffix == PICKLE:
            return own
        form = packing(getattr(model.config, "quantization_config", None), name)
        return replace(own, source=Source(Path(folder), torch.bfloat16, form))
    return own


def _absent(name: str, revision: str | None, *, trust_remote_code: bool) -> Any:
    folder, gguf = _source(name, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    return _empty(name, folder, options | ({} if gguf is None else {"gguf_file": gguf}))


def skeleton(folder: Path, *, dtype: torch.dtype | None = None) -> Decoder:
    """Return the layers of the model in a local folder without its weights, which stay on the device `meta`.

    With the `dtype` that it is to have, whatever is not a weight has its values, so that it runs once it has weights.
    """
    options = {"trust_remote_code": False}
    model = _empty(str(folder), str(folder), options, dtype).eval().requires_grad_(False)
    return outline(model, None, name=str(folder))


def tokenizer_of(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in a local model folder; None where it has no such files."""
    if not _speaks(folder):
        return None
    try:
        with _quiet(hide_bars=True):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise _load_error(str(folder), error, local=True) from error


def _speaks(folder: Path) -> bool:
    """Tell whether a folder has files of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def reading(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, int | None]:
    """Return the tokenizer of a model, and the positions that it has (None: no limit), without its weights."""
    folder, gguf = _source(name, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    options |= {} if gguf is None else {"gguf_file": gguf}
    try:
        config, file = _config(name, folder, options)
        with _quiet(hide_bars=True):
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        return cut_as(file, tokenizer), positions(config)
    except _LOAD_ERRORS as error:
        raise _load_error(name, error, local=Path(folder).is_dir()) from error


def _empty(name: str, folder: str, options: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    """Build a model from its configuration, without weights; with a dtype, its buffers have their values, and it can run."""
    local, runs = Path(folder).is_dir(), dtype is not None
    place = init_empty_weights(include_buffers=False) if runs else torch.device("meta")
    try:
        config, _ = _config(name, folder, options)
        how: dict[str, Any] = _attending(name, config, "auto" if runs else "eager", "cpu")
        how |= {"dtype": dtype} if runs else {}
        with _quiet(hide_bars=local), place:
            trusted = options["trust_remote_code"]
            model = class_for(config).from_config(config, trust_remote_code=trusted, **how)
        if runs:
            model.tie_weights()  # accelerate has made two of what is one
    except _LOAD_ERRORS as error:
        raise _load_error(name, error, local=local) from error
    return model


def _source(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return the folder or Hub name to load from, and the GGUF file in it, if that is what is meant."""
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise OptionError(
            f"{name!r} is on this machine and has no revisions: leave out revision {revision!r}, or pass a name on the Hub"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name!r} is a file: pass the folder it is in, a .gguf file or a Hub name")
        return str(path.parent), path.name
    if path.is_dir():
        check_folder(path)
        if (path / "config.json").is_file():
            return str(path), None
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1 or (files and _PART.search(files[0].name)):
            return str(path), files[0].name
        found = f"{len(files)} .gguf files, pass one of them" if files else "no .gguf file either"
        raise ModelError(f"the folder {name!r} has no config.json ({found}): it is no model folder")
    if name.startswith(("/", ".", "~")) or name.endswith(".gguf") or name.count("/") > 1 or not name:
        raise ModelError(f"no file or folder {name!r}: pass a model folder, a .gguf file or a Hub name")
    return name, None


@contextlib.contextmanager
def _quiet(*, hide_bars: bool) -> Iterator[None]:
    """Silence transformers, which logs and draws bars even for good loads; downloads keep their bars."""
    with contextlib.ExitStack() as stack:
        stack.callback(hf_logging.set_verbosity, hf_logging.get_verbosity())
        hf_logging.set_verbosity(logging.CRITICAL)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if hide_bars:  # there are several kinds, and not all can be switched off
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _check_files(name: str, folder: Path, allow_pickle: bool) -> None:
    """Refuse weight files that could run code, or that lie elsewhere; name those that are not the model's."""
    try:
        files, _ = weight_files(folder)
    except CheckpointError as error:
        raise ModelError(f"{name!r} cannot be loaded: {error}") from error
    if files[0].suffix == PICKLE and not allow_pickle:
        raise ModelError(
            f"{name!r} has its weights as a pickle ({files[0].name}), which can run code when it is read: convert it "
            "to safetensors (load and `save_pretrained` it where that does no harm), or pass --allow-pickle "
            "(`allow_pickle=True`) if you trust where it comes from"
        )
    warn_left_over(folder)


def _load_error(name: str, error: BaseException, *, local: bool) -> ModelError:
    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
    if isinstance(error, _CORRUPT):
        return ModelError(f"a weight file of {name!r} is corrupted or cut short: fetch it again ({cause})")
    if "use_safetensors" in str(error):
        return ModelError(
            f"{name!r} has no weights as safetensors: pass --allow-pickle (`allow_pickle=True`) if it has them as "
            f"a pickle, which can run code when it is read, and you trust it ({cause})"
        )
    if "trust_remote_code" in str(error):
        return ModelError(f"{name!r} runs its own code: pass trust_remote_code if you trust it ({cause})")
    if local or not isinstance(error, OSError):
        return ModelError(f"{name!r} cannot be loaded ({cause})")
    if is_adapter(name):
        return ModelError(
            f"{name!r} is an adapter: merge it into its model first, with `peft.AutoPeftModelForCausalLM`, and pass that"
        )
    return ModelError(
        f"no model {name!r} in the local cache or on the Hugging Face Hub, or no network: "
        f"pass a Hub name (owner/model), a folder with config.json or a .gguf file ({cause})"
    )
