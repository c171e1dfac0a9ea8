"""Attribution jobs on a Ray cluster: one model in every worker, jobs handed out as workers get free.

The driver keeps the ledger, so that a run on a cluster is stopped and resumed like any other, and nothing is
counted twice. Values are those of a serial run bit for bit on equal machines with equal numbers of threads.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from causalprune.attribution.estimators import Job, cells_of, exact_jobs
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import Plan
from causalprune.core import CausalPruneError, Ledger, OptionError, Progress, say
from causalprune.interventions import grouped_by_effect

RETRIES = 3
"""Times that a job may take its worker down with it before the run ends."""


@dataclass(frozen=True)
class Cluster:
    """Where to work: the address of a running cluster (None: one on this machine), workers, and threads of each."""

    workers: int
    address: str | None = None
    threads: int = 1
    gpus: float = 0.0


@runtime_checkable
class Crew(Protocol):
    """Workers that each do one job at a time."""

    @property
    def free(self) -> bool:
        """Whether a worker has nothing to do."""

    def begin(self, key: str) -> None:
        """Give a job to a free worker."""

    def finished(self) -> tuple[str, bool]:
        """Wait for any job to end; return it, and whether it is done: else it was lost with its worker."""


def in_order(costs: Mapping[Job, float]) -> dict[str, Job | int]:
    """Return the jobs of a run by their keys in the ledger: the intact model on every batch, then the longest first."""
    wanted: dict[str, Job | int] = {f"{number}:intact": number for number in sorted({n for n, _ in costs})}
    longest = sorted((job for job in costs if costs[job]), key=lambda job: -costs[job])
    return wanted | {f"{number}:{layer}": (number, layer) for number, layer in longest}


def hand_out(keys: Iterable[str], crew: Crew) -> Iterator[str]:
    """Give each worker the next job as soon as it has none, and yield each that is done; a lost one is the next."""
    waiting, running = deque(keys), 0
    while waiting or running:
        while waiting and crew.free:
            crew.begin(waiting.popleft())
            running += 1
        key, done = crew.finished()
        running -= 1
        if done:
            yield key
        else:
            waiting.appendleft(key)


class _Worker:
    """Holds a model and measures jobs on it; lives in a process of its own."""

    def __init__(self, make: Callable[[], Passes], threads: int) -> None:
        torch.set_num_threads(threads)
        self._passes = make()

    def run(self, job: Job | int) -> dict[str, Any]:
        """Return the row of a job, or of the intact model on a batch."""
        plan = self._passes.plan
        if isinstance(job, int):
            return self._passes.intact_row(job)
        cells = [(plan.units[unit], row) for unit, row in cells_of(plan, job)]
        return self._passes.joint(*job, cells)


def fill(plan: Plan, path: Path, make: Callable[[], Passes], cluster: Cluster, on_progress: Progress) -> None:
    """Do every job of `exact` that the ledger at `path` lacks, so that `exact` finds them all there.

    `make` builds what a worker measures with, for the same plan. A worker that dies is replaced, and its job done again.

    Raises:
        OptionError: Ray is not installed, or the cluster cannot be reached.
        CausalPruneError: a job failed, or took its worker down again and again.
    """
    if plan.estimator.name != "exact":
        raise OptionError(f"only the estimator 'exact' runs on a cluster, not {plan.estimator.name!r}")
    if grouped_by_effect(plan.question.units):
        raise OptionError(
            "every worker would group neurons by effects of its own: take neurons:64 in a row, or no cluster"
        )
    wanted = in_order(exact_jobs(plan))
    say(on_progress, unit="jobs")
    with plan.ledger(path) as book:
        missing = {key: job for key, job in wanted.items() if key not in book.rows}
        if not missing:
            return
        ray = _ray(cluster)
        try:
            crew = _Actors(ray, missing, book, make, cluster)
            for done, _ in enumerate(hand_out(missing, crew), 1):
                on_progress(done, len(missing))
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
    except Exception as cause:  # Ray itself raises plain ones, for a slow start for example
        what = f"no Ray cluster at {cluster.address!r}"
        if cluster.address is None:
            what = "Ray does not start on this machine (is it busy? try again, or --executor serial)"
        raise OptionError(f"{what}: {cause}") from cause
    return ray


class _Actors:
    """A `Crew` of Ray actors, whose results go into the ledger."""

    def __init__(
        self,
        ray: Any,
        jobs: Mapping[str, Job | int],
        book: Ledger,
        make: Callable[[], Passes],
        cluster: Cluster,
    ) -> None:
        self._ray, self._jobs, self._book = ray, jobs, book
        self._kind = ray.remote(num_cpus=cluster.threads, num_gpus=cluster.gpus)(_Worker)
        self._make, self._threads = make, cluster.threads
        self._idle = [self._hire() for _ in range(min(cluster.workers, len(jobs)))]
        self._running: dict[Any, tuple[str, Any]] = {}
        self._tries = dict.fromkeys(jobs, 0)

    def _hire(self) -> Any:
        return self._kind.remote(self._make, self._threads)

    @property
    def free(self) -> bool:
        return bool(self._idle)

    def begin(self, key: str) -> None:
        worker = self._idle.pop()
        self._running[worker.run.remote(self._jobs[key])] = key, worker

    def finished(self) -> tuple[str, bool]:
        """Write down the next result; a worker that died is replaced."""
        errors = self._ray.exceptions
        (ready, *_), _rest = self._ray.wait(list(self._running))
        key, worker = self._running.pop(ready)
        try:
            self._book.append(key, self._ray.get(ready))
        except errors.RayActorError as cause:
            self._tries[key] += 1
            if self._tries[key] == RETRIES:
                raise CausalPruneError(f"job {key} took {RETRIES} workers down: {cause}") from cause
            self._idle.append(self._hire())
            return key, False
        except errors.RayTaskError as cause:
            raise CausalPruneError(f"job {key} failed: {cause.cause!r}") from cause
        self._idle.append(worker)
        return key, True
