"""On a cluster, with workers that die or dawdle, effects are those of a serial run, bit for bit."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import calibration, fresh

from causalprune.attribution import attribute, exact
from causalprune.errors import CausalPruneError, OptionError
from causalprune.measuring import Workbench
from causalprune.questions import Estimator, Question

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install causalprune[ray]")
from causalprune.cluster import Cluster, fill  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EXAMPLES = calibration()
HOW = Estimator(max_batch_tokens=28)


class Fatal(Workbench):
    """A workbench whose process is killed at its n-th job, once."""

    def joint(self, number: int, layer: int, cells: Any) -> dict[str, list[float]]:
        if (number, layer) == (0, 1) and not self.scar.exists():
            self.scar.parent.exists() and self.scar.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().joint(number, layer, cells)


def bench(kind: type[Workbench], scar: Path | None = None) -> Workbench:
    work = kind(fresh("llama3"), EXAMPLES, Question(effect="kl"), HOW)
    work.scar = scar  # type: ignore[attr-defined]
    return work


def nobody() -> Workbench:
    raise AssertionError("no worker is wanted")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import this module
    return Cluster(workers=3)


def filled(cluster: Cluster, make: Any, ledger: Path, done: list[int] | None = None) -> Any:
    work = bench(Workbench)
    fill(work, ledger, make, cluster, lambda now, _total: (done if done is not None else []).append(now))
    with work.ledger(ledger) as book:
        return exact(work), dict(book.rows)


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("masked_nats", "intact_nats", "kl_nats")
    )


def test_a_cluster_measures_what_a_serial_run_does(local: Cluster, tmp_path: Path) -> None:
    serial = attribute(fresh("llama3"), EXAMPLES, Question(effect="kl"), HOW)
    done: list[int] = []
    found, rows = filled(local, partial(bench, Workbench), tmp_path / "ledger", done)
    assert same(found, serial)
    assert done == list(range(1, len(rows) + 1))
    again, _ = filled(local, nobody, tmp_path / "ledger")  # nothing is left to do: no cluster is started
    assert same(again, serial)


def test_a_worker_that_is_killed_is_replaced(local: Cluster, tmp_path: Path) -> None:
    serial = attribute(fresh("llama3"), EXAMPLES, Question(effect="kl"), HOW)
    scar = tmp_path / "scar"
    found, _ = filled(local, partial(bench, Fatal, scar), tmp_path / "ledger")
    assert scar.exists(), "no worker died: the test is blind"
    assert same(found, serial)


def test_a_job_that_kills_every_worker_ends_the_run(local: Cluster, tmp_path: Path) -> None:
    with pytest.raises(CausalPruneError, match="job 0:1 took 3 workers down"):
        filled(local, partial(bench, Fatal, tmp_path / "nowhere" / "scar"), tmp_path / "ledger")


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        filled(Cluster(1, "127.0.0.1:1"), nobody, tmp_path / "ledger")
