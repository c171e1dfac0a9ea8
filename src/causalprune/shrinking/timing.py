"""How long a written token takes, in transformers on this machine: measured once for a model, and kept."""

import inspect
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from causalprune.core import Decoder, cache_folder
from causalprune.shrinking.structure import Kept, smaller
from causalprune.shrinking.worth import Kind

TOKENS, ROUNDS = 16, 5
"""Tokens that are read and then written, and how often each model does, in turns; the first time warms up."""


def read_and_written(decoder: Decoder, read: int, written: int) -> tuple[float, float]:
    """Return the seconds that a prompt of so many tokens takes, and then so many greedy ones."""
    model: Any = decoder.model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    prompt = torch.arange(read)[None] % model.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        start = time.perf_counter()
        output = model(input_ids=prompt.to(decoder.device), use_cache=True, **last)
        token = int(output.logits[0, -1].argmax())  # waits for the device
        between = time.perf_counter()
        for _ in range(written):
            step = torch.tensor([[token]], device=decoder.device)
            output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
            token = int(output.logits[0, -1].argmax())
    return between - start, time.perf_counter() - between


def token_seconds(decoder: Decoder, parts: Mapping[Kind, tuple[float, Kept]]) -> dict[str, float]:
    """Return the seconds for a written token of the whole model and of every one that `parts` keeps, from the cache if there."""
    path = cache_folder() / "times" / f"{decoder.fingerprint[:16]}-{_here(decoder)}.json"
    names = {name: round(share, 4) for name, (share, _) in parts.items()}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["parts"] == names:
            return dict(known["seconds"])
    models: dict[str, Decoder] = {"whole": decoder}
    models |= {name: smaller(decoder, kept) for name, (_, kept) in parts.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, own in models.items():
            taken[name].append(read_and_written(own, TOKENS, TOKENS)[1] / TOKENS)
    seconds = {name: statistics.median(own[1:]) for name, own in taken.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"parts": names, "seconds": seconds}), encoding="utf-8")
    return seconds


def _here(decoder: Decoder) -> str:
    """Return what times depend on besides the model: device, type of numbers, threads."""
    dtype = str(decoder.model.dtype).removeprefix("torch.")
    return f"{decoder.device.type}-{dtype}-{torch.get_num_threads()}"
