"""On a cluster, with workers that die or dawdle, effects are those of a serial run, bit for bit."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import calibration, fresh

from causalprune.attribution.estimators import attribute, exact
from causalprune.attribution.measured import Measured
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import Plan, planned
from causalprune.attribution.questions import Estimator, Question
from causalprune.core.errors import CausalPruneError, OptionError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install causalprune[ray]")
from causalprune.attribution.cluster import Cluster, fill  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EXAMPLES = calibration()
HOW = Estimator(max_batch_tokens=28)


class Fatal(Passes):
    """Passes whose process is killed at its n-th job, once."""

    def joint(self, number: int, layer: int, cells: Any) -> dict[str, list[float]]:
        if (number, layer) == (0, 1) and not self.scar.exists():
            self.scar.parent.exists() and self.scar.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().joint(number, layer, cells)


class Uneven(Passes):
    """Passes that write down who does what; the first process to come is slow, the second is killed once."""

    def joint(self, number: int, layer: int, cells: Any) -> dict[str, list[float]]:
        if not hasattr(self, "place"):
            self.place = len(list(self.scar.glob("*")))
        with (self.scar / str(os.getpid())).open("a") as file:
            file.write(f"{number}:{layer}\n")
        if self.place == 0:
            time.sleep(1)
        elif self.place == 1 and not (self.scar.parent / "died").exists():
            (self.scar.parent / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().joint(number, layer, cells)


def plan() -> Plan:
    return planned(fresh("llama3"), EXAMPLES, Question(effect="kl"), HOW)


def passes(kind: type[Passes], scar: Path | None = None) -> Passes:
    made = kind(plan())
    made.scar = scar  # type: ignore[attr-defined]
    return made


def nobody() -> Passes:
    raise AssertionError("no worker is wanted")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    here = Path(__file__).parent
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(here), str(here.parent)])
    )  # workers import this module
    return Cluster(workers=3)


def filled(cluster: Cluster, make: Any, ledger: Path, done: list[int] | None = None) -> Any:
    own = plan()
    fill(own, ledger, make, cluster, lambda now, _total: (done if done is not None else []).append(now))
    with own.ledger(ledger) as book:
        return exact(Measured(Passes(own), book)), dict(book.rows)


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("masked_nats", "intact_nats", "kl_nats")
    )


def test_a_cluster_measures_what_a_serial_run_does(local: Cluster, tmp_path: Path) -> None:
    serial = attribute(fresh("llama3"), EXAMPLES, Question(effect="kl"), HOW)
    done: list[int] = []
    found, rows = filled(local, partial(passes, Passes), tmp_path / "ledger", done)
    assert same(found, serial)
    assert done == list(range(1, len(rows) + 1))
    again, _ = filled(local, nobody, tmp_path / "ledger")  # nothing is left to do: no cluster is started
    assert same(again, serial)


def test_a_worker_that_is_killed_is_replaced(local: Cluster, tmp_path: Path) -> None:
    serial = attribute(fresh("llama3"), EXAMPLES, Question(effect="kl"), HOW)
    scar = tmp_path / "scar"
    found, _ = filled(local, partial(passes, Fatal, scar), tmp_path / "ledger")
    assert scar.exists(), "no worker died: the test is blind"
    assert same(found, serial)


def test_a_slow_worker_gets_less_to_do_and_no_job_counts_twice(local: Cluster, tmp_path: Path) -> None:
    serial = attribute(fresh("llama3"), EXAMPLES, Question(effect="kl"), HOW)
    scars = tmp_path / "scars"
    scars.mkdir()
    found, rows = filled(local, partial(passes, Uneven, scars), tmp_path / "ledger")
    assert same(found, serial)
    assert (tmp_path / "died").exists(), "no worker died: the test is blind"
    by_worker = [path.read_text().split() for path in sorted(scars.iterdir(), key=os.path.getctime)]
    began = [job for jobs in by_worker for job in jobs]
    wanted = [key for key in rows if "intact" not in key]
    assert sorted(set(began)) == sorted(wanted)
    assert len(began) == len(wanted) + 1, "the job of the worker that died is done twice, and no other"
    assert min(map(len, by_worker)) < max(map(len, by_worker)) / 2, "nobody was slow: the test is blind"


def test_a_job_that_kills_every_worker_ends_the_run(local: Cluster, tmp_path: Path) -> None:
    with pytest.raises(CausalPruneError, match="job 0:1 took 3 workers down"):
        filled(local, partial(passes, Fatal, tmp_path / "nowhere" / "scar"), tmp_path / "ledger")


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        filled(Cluster(1, "127.0.0.1:1"), nobody, tmp_path / "ledger")
