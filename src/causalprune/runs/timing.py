"""How much faster a smaller model runs than the whole one: a few seconds, in turns, in transformers."""

import inspect
import statistics
import time
from typing import Any

import torch

from causalprune.core import Decoder, Speed

BUDGET_SECONDS = 20.0
ROUNDS, LEAST_ROUNDS = 5, 3
READ_PER_WRITTEN = 8
"""Tokens of the prompt for each that is written."""


def speeds(whole: Decoder, smaller: Decoder, seconds: float = BUDGET_SECONDS) -> Speed | None:
    """Time both models in turns on one sequence; None where `seconds` are too few for three rounds.

    Speed depends on shapes alone, so the whole model may have been changed in place on the way to the smaller one.
    """
    start, rounds = time.perf_counter(), list[tuple[tuple[float, float], tuple[float, float]]]()
    single = min(_timed(whole, 1, 1)[1] for _ in range(2))  # the first warms up
    written = max(4, min(32, int(seconds / (4 * (LEAST_ROUNDS + 1)) / single)))
    longest = getattr(whole.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    read = min(READ_PER_WRITTEN * written, (longest or 1024) - written)
    if 2 * (LEAST_ROUNDS + 1) * written * single > seconds:
        return None
    while len(rounds) <= ROUNDS:
        rounds.append((_timed(whole, read, written), _timed(smaller, read, written)))
        passed = time.perf_counter() - start
        if passed * (len(rounds) + 1) / len(rounds) > seconds:
            break
    if len(rounds) <= LEAST_ROUNDS:
        return None
    timed = rounds[1:]  # the first warms up
    middle = statistics.median
    how = f"transformers, {str(whole.model.dtype).removeprefix('torch.')}, {whole.device.type}"
    how += f" (threads: {torch.get_num_threads()})" if whole.device.type == "cpu" else ""
    return Speed(
        reading=read / middle(b[0] for _, b in timed),
        writing=written / middle(b[1] for _, b in timed),
        dense_reading=read / middle(a[0] for a, _ in timed),
        dense_writing=written / middle(a[1] for a, _ in timed),
        reading_gain=middle(a[0] / b[0] for a, b in timed),
        writing_gain=middle(a[1] / b[1] for a, b in timed),
        rounds=len(timed),
        how=f"{how}, one sequence: {read} tokens read, {written} written, {len(timed)} rounds in turns",
    )


def _timed(decoder: Decoder, read: int, written: int) -> tuple[float, float]:
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
