"""How much faster a smaller model runs than the whole one: a few seconds, in turns, in transformers."""

import statistics
import time

import torch

from causalprune.core import Decoder, ModelError, Speed
from causalprune.shrinking import read_and_written

BUDGET_SECONDS = 20.0
ROUNDS, LEAST_ROUNDS = 5, 3
READ_PER_WRITTEN = 8
"""Tokens of the prompt for each that is written."""


def speeds(whole: Decoder, smaller: Decoder, seconds: float = BUDGET_SECONDS) -> Speed | None:
    """Time both models in turns on one sequence; None where `seconds` are too few for three rounds, or nothing can be written.

    Speed depends on shapes alone, so the whole model may have been changed in place on the way to the smaller one.
    """
    start, rounds = time.perf_counter(), list[tuple[tuple[float, float], tuple[float, float]]]()
    try:
        single = min(read_and_written(whole, 1, 1)[1] for _ in range(2))  # the first warms up
    except ModelError:  # it does not write
        return None
    written = max(4, min(32, int(seconds / (4 * (LEAST_ROUNDS + 1)) / single)))
    longest = getattr(whole.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    read = min(READ_PER_WRITTEN * written, (longest or 1024) - written)
    if 2 * (LEAST_ROUNDS + 1) * written * single > seconds:
        return None
    while len(rounds) <= ROUNDS:
        rounds.append((read_and_written(whole, read, written), read_and_written(smaller, read, written)))
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
