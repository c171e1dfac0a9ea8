"""How long a written token takes, in transformers on this machine: measured once for a model, and kept."""

import hashlib
import inspect
import json
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from causalprune.core import Decoder, ModelError, cache_folder, versions
from causalprune.evaluation import write_json
from causalprune.models import go_on
from causalprune.shrinking.structure import Kept, smaller
from causalprune.shrinking.worth import Kind

TOKENS, ROUNDS = 16, 5
"""Tokens that are read and then written, and how often each model does, in turns; the first time warms up."""


def read_and_written(decoder: Decoder, read: int, written: int) -> tuple[float, float]:
    """Return the seconds that a prompt of so many tokens takes, and then so many greedy ones; `ModelError` for a model without a cache."""
    model: Any = decoder.model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    prompt = torch.arange(read)[None] % model.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        start = time.perf_counter()
        output, cache = go_on(model, prompt.to(decoder.device), None, None, **last)
        if cache is None:
            raise ModelError(f"{decoder.name} keeps no cache of what it reads")
        token = int(output.logits[0, -1].argmax())  # waits for the device
        between = time.perf_counter()
        for _ in range(written):
            step = torch.tensor([[token]], device=decoder.device)
            output, cache = go_on(model, step, cache)
            token = int(output.logits[0, -1].argmax())
    return between - start, time.perf_counter() - between


def token_seconds(decoder: Decoder, parts: Mapping[Kind, tuple[float, Kept]]) -> dict[str, float]:
    """Return the seconds for a written token of the whole model and of every one that `parts` keeps, from the cache if there.

    Each part takes turns with the whole model, one part in memory at a time.

    Raises:
        ModelError: the model has no cache of keys and values to write with.
    """
    path = cache_folder() / "times" / f"{decoder.fingerprint[:16]}-{_here(decoder)}.json"
    names = {str(name): round(share, 4) for name, (share, _) in parts.items()}
    if (known := _kept(path, names)) is not None:
        return known
    whole, ratios = list[float](), dict[str, float]()
    for name, (_, kept) in parts.items():
        part = smaller(decoder, kept)
        try:
            turns = _turns(decoder, part)
        except ModelError as error:
            raise ModelError(
                f"{decoder.name} cannot be timed as it writes ({error}): ask for --parameters or --memory"
            ) from error
        whole += [own for own, _ in turns]
        ratios[str(name)] = statistics.median(other / own for own, other in turns)
    middle = statistics.median(whole)
    seconds = {"whole": middle, **{name: middle * ratio for name, ratio in ratios.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"parts": names, "seconds": seconds})
    return seconds


def _kept(path: Path, names: Mapping[str, float]) -> dict[str, float] | None:
    """Return the seconds that are kept, None where they are of other parts or cannot be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return dict(known["seconds"]) if known["parts"] == names else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _turns(whole: Decoder, part: Decoder) -> list[tuple[float, float]]:
    """Return the seconds for a token of both models, in turns."""
    rounds = [
        tuple(read_and_written(own, TOKENS, TOKENS)[1] / TOKENS for own in (whole, part))
        for _ in range(ROUNDS)
    ]
    return [(own, other) for own, other in rounds[1:]]


def _here(decoder: Decoder) -> str:
    """Return what times depend on besides the weights: size, type of numbers, device, threads; machine, attention, versions."""
    dtype, size = (
        str(decoder.model.dtype).removeprefix("torch."),
        sum(p.numel() for p in decoder.model.parameters()),
    )
    cuda = (
        torch.cuda.get_device_name(decoder.device).replace(" ", "_") if decoder.device.type == "cuda" else ""
    )
    own = f"{size}-{dtype}-{decoder.device.type}{cuda}-{torch.get_num_threads()}"
    attention = decoder.model.config._attn_implementation  # noqa: SLF001
    about = f"{platform.node()} {platform.processor()} {attention} {versions()}"
    return f"{own}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
