"""Steps of bench/large.py about attribution on many machines: Ray on this one, and a simulated cluster of 64 workers."""

import heapq
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import BENCH, data_folder
from transformers import AutoModelForCausalLM, LlamaConfig

from causalprune.attribution.cluster import Cluster, fill, hand_out, in_order
from causalprune.attribution.estimators import exact, exact_jobs
from causalprune.attribution.measured import Measured
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import Plan, planned
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.core.progress import shown
from causalprune.core.types import Calibration, Effects, Example
from causalprune.models.loading import load

MIDDLE = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
MIDDLE |= {"num_attention_heads": 6, "num_key_value_heads": 2}
SEQUENCES, LENGTH, BATCH_TOKENS = 24, 128, 512
WORKERS = 64
PROBLEMS = 128
SPREAD = 0.1
"""Of the logarithm of the time that a job takes: machines and their neighbours differ."""
SHAPES = {"8B": (32, 32, 1.2), "70B": (80, 64, 0.6)}
"""Layers, heads per layer, and what the output head costs on half of the tokens, in layers (Llama 3)."""


def examples() -> Calibration:
    """Return random tokens to measure on."""
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, MIDDLE["vocab_size"], (SEQUENCES, LENGTH), generator=dice).tolist()
    rows = tuple(Example(tuple(row), LENGTH // 2, "random", str(i)) for i, row in enumerate(tokens))
    return Calibration(rows, tuple(i % 3 for i in range(SEQUENCES)))


def passes(folder: Path) -> Passes:
    """Build what a worker measures with."""
    how = Estimator(max_batch_tokens=BATCH_TOKENS)
    return Passes(planned(load(str(folder)), examples(), Question(effect="kl"), how))


def ray() -> dict[str, Any]:
    """Measure a random model serially, with one worker and with two, each of one thread; compare bits and speed.

    Speed is what is done between the first finished job and the last, in tokens forwarded: workers have started then.
    """
    os.environ["PYTHONPATH"] = str(BENCH)  # workers import this module
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**MIDDLE))
        model.save_pretrained(folder)
        with shown("serial") as progress:
            serial = exact(Measured(passes(folder)), progress)
        found = {str(workers): _on_ray(workers, folder, serial) for workers in (1, 2)}
    return {"workers": found, "cores": os.cpu_count()}


def _on_ray(workers: int, folder: Path, serial: Effects) -> dict[str, Any]:
    ledger, own, times = folder.with_name(f"{workers}.ledger"), passes(folder), list[float]()
    with shown(f"{workers} workers") as progress:

        def note(done: int, total: int) -> None:
            times.append(time.perf_counter())
            progress(done, total)

        fill(own.plan, ledger, partial(passes, folder), Cluster(workers), note)
    with own.plan.ledger(ledger) as book:
        keys, effects = list(book.rows), exact(Measured(own, book))
    names = ("masked_nats", "intact_nats", "kl_nats")
    return {
        "jobs": len(keys),
        "seconds": times[-1] - times[0],
        "tokens_per_second": _tokens(own.plan, keys[1:]) / (times[-1] - times[0]),
        "equal": all(torch.equal(getattr(effects, name), getattr(serial, name)) for name in names),
    }


def _tokens(plan: Plan, keys: list[str]) -> float:
    costs = {f"{number}:{layer}": cost for (number, layer), cost in exact_jobs(plan).items()}
    return sum(costs.get(key, plan.groups[int(key.partition(":")[0])].tokens.numel()) for key in keys)


class Clock:
    """A crew of simulated workers, each job of which takes its seconds."""

    def __init__(self, workers: int, seconds: Mapping[str, float]) -> None:
        self.now, self.busy_seconds = 0.0, 0.0
        self._idle, self._seconds = workers, seconds
        self._running: list[tuple[float, str]] = []

    @property
    def free(self) -> bool:
        """Whether a worker has nothing to do."""
        return self._idle > 0

    def begin(self, key: str) -> None:
        """Let a worker begin a job now."""
        self._idle -= 1
        heapq.heappush(self._running, (self.now + self._seconds[key], key))

    def finished(self) -> tuple[str, bool]:
        """Let the time pass until the next job ends."""
        self.now, key = heapq.heappop(self._running)
        self._idle += 1
        return key, True


def schedule() -> dict[str, Any]:
    """Hand out the jobs of models of 8 and 70 billion weights to 64 simulated workers, in the product's own order.

    The order comes from what the product expects a job to cost; the time that it takes also has the walk to its
    layer, the output head, and luck. Times are in passes of a whole batch of 2,048 tokens.
    """
    text = (data_folder() / "gsm8k" / "train.jsonl").read_text().splitlines()[:PROBLEMS]
    lengths = [len(row["question"] + row["answer"]) // 4 for row in map(json.loads, text)]
    rows = [Example((0,) * n, n // 2, "gsm8k", str(i)) for i, n in enumerate(lengths)]
    sizes = [batch.tokens.shape for batch in batches(rows, max_batch_tokens=2048)]
    found: dict[str, Any] = {"workers": WORKERS, "batches": len(sizes), "tokens": sum(lengths)}
    for name, (depth, heads, head) in SHAPES.items():
        costs = {
            (number, layer): heads * shape[0] * shape[1] * (depth - layer) / depth
            for number, shape in enumerate(sizes)
            for layer in range(depth)
        }
        for luck in (0.0, SPREAD):
            dice, seconds = random.Random(0), {}
            for key, job in in_order(costs).items():
                number, layer = (job, 0) if isinstance(job, int) else job
                passes = sizes[number][0] * sizes[number][1] / 2048
                done = 1 if isinstance(job, int) else heads
                walk = 0 if isinstance(job, int) else layer / depth
                took = passes * (done * (depth - layer + head) / depth + walk)
                seconds[key] = took * dice.lognormvariate(0, luck)
            crew = Clock(WORKERS, seconds)
            assert sorted(hand_out(in_order(costs), crew)) == sorted(seconds)
            bound = max(sum(seconds.values()) / WORKERS, *seconds.values())
            found[f"{name}, spread {luck:g}"] = {
                "jobs": len(seconds),
                "makespan": crew.now,
                "bound": bound,
                "longest": max(seconds.values()),
                "over_bound": crew.now / bound,
            }
    return found


def figures(done: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that claims rest on, from the steps that are done."""
    found: dict[str, float] = {}
    if (one := done.get("ray")) is not None:
        found["ray_equals_serial"] = float(all(own["equal"] for own in one["workers"].values()))
        rates = [one["workers"][name]["tokens_per_second"] for name in ("1", "2")]
        found["ray_speedup_2_workers"] = rates[1] / rates[0]
    if (one := done.get("schedule")) is not None:
        over = [own["over_bound"] for own in one.values() if isinstance(own, dict)]
        found["makespan_over_bound_64_workers"] = max(over)
    return found
