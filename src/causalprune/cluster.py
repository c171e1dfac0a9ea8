"""Attribution jobs on a Ray cluster: one model in every worker, jobs handed out as workers get free.

The driver keeps the ledger, so that a run on a cluster is stopped and resumed like any other, and nothing is
counted twice. Values are those of a serial run bit for bit on equal machines with equal numbers of threads.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causalprune.attribution import Job, cells_of, exact_jobs
from causalprune.errors import CausalPruneError, OptionError
from causalprune.ledger import Ledger
from causalprune.measuring import Workbench
from causalprune.types import Progress

RETRIES = 3
"""Times that a job may take its worker down with it before the run ends."""


@dataclass(frozen=True)
class Cluster:
    """Where to work: the address of a running cluster (None: one on this machine), workers, and threads of each."""

    workers: int
    address: str | None = None
    threads: int = 1
    gpus: float = 0.0


class _Worker:
    """Holds a model and measures jobs on it; lives in a process of its own."""

    def __init__(self, make: Callable[[], Workbench], threads: int) -> None:
        torch.set_num_threads(threads)
        self._work = make()

    def run(self, job: Job | int) -> dict[str, Any]:
        """Return the row of a job, or of the intact model on a batch."""
        work = self._work
        if isinstance(job, int):
            return work.intact_row(job)
        cells = [(work.units[unit], row) for unit, row in cells_of(work, job)]
        return work.joint(*job, cells)


def fill(
    work: Workbench, path: Path, make: Callable[[], Workbench], cluster: Cluster, on_progress: Progress
) -> None:
    """Do every job of `exact` that the ledger at `path` lacks, so that `exact` finds them all there.

    `make` builds a worker's own workbench. A worker that dies is replaced, and its job done again.

    Raises:
        OptionError: Ray is not installed, or the cluster cannot be reached.
        CausalPruneError: a job failed, or took its worker down again and again.
    """
    if work.estimator.name != "exact":
        raise OptionError(f"only the estimator 'exact' runs on a cluster, not {work.estimator.name!r}")
    costs = exact_jobs(work)
    wanted: dict[str, Job | int] = {f"{number}:intact": number for number in range(len(work.groups))}
    longest = sorted((job for job in costs if costs[job]), key=lambda job: -costs[job])
    wanted |= {f"{number}:{layer}": (number, layer) for number, layer in longest}
    with work.ledger(path) as book:
        missing = {key: job for key, job in wanted.items() if key not in book.rows}
        if not missing:
            return
        ray = _ray(cluster)
        try:
            _hand_out(ray, missing, book, make, cluster, on_progress)
        finally:
            ray.shutdown()


def _ray(cluster: Cluster) -> Any:
    try:
        import ray  # noqa: PLC0415
    except ImportError as cause:
        raise OptionError("the executor 'ray' needs Ray: install causalprune[ray]") from cause
    host, _, port = (cluster.address or "").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        cpus = None if cluster.address else cluster.workers * cluster.threads
        ray.init(
            address=cluster.address,
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as cause:
        raise OptionError(f"no Ray cluster at {cluster.address!r}: {cause}") from cause
    return ray


def _hand_out(
    ray: Any,
    missing: Mapping[str, Job | int],
    book: Ledger,
    make: Callable[[], Workbench],
    cluster: Cluster,
    on_progress: Progress,
) -> None:
    """Give each worker a job as soon as it has none, the longest first, and write down what comes back."""
    kind = ray.remote(num_cpus=cluster.threads, num_gpus=cluster.gpus)(_Worker)
    waiting, tries = deque(missing), dict.fromkeys(missing, 0)
    running: dict[Any, tuple[str, Any]] = {}
    idle = [kind.remote(make, cluster.threads) for _ in range(min(cluster.workers, len(missing)))]
    while waiting or running:
        while waiting and idle:
            worker, key = idle.pop(), waiting.popleft()
            running[worker.run.remote(missing[key])] = key, worker
        (ready, *_), _rest = ray.wait(list(running))
        key, worker = running.pop(ready)
        try:
            book.append(key, ray.get(ready))
            idle.append(worker)
        except ray.exceptions.RayActorError as cause:
            tries[key] += 1
            if tries[key] == RETRIES:
                raise CausalPruneError(f"job {key} took {RETRIES} workers down: {cause}") from cause
            waiting.appendleft(key)
            idle.append(kind.remote(make, cluster.threads))
        except ray.exceptions.RayTaskError as cause:
            raise CausalPruneError(f"job {key} failed: {cause.cause!r}") from cause
        on_progress(len(missing) - len(waiting) - len(running), len(missing))
