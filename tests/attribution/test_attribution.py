"""Effects are those of the naive loop over heads, and survive any interruption bit for bit."""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import micro
import pytest
import torch
from families import FAMILIES, N_LAYERS
from reference import ROUNDING, calibration, fresh, nats, shared, without_head
from torch import Tensor

from causalprune.attribution import measuring
from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question
from causalprune.calibration.examples import batches
from causalprune.core.errors import CheckpointError, MismatchError, ModelError
from causalprune.core.types import Calibration, Effects, Unit
from causalprune.models.anatomy import inspect_model

FIELDS = ("masked_nats", "intact_nats", "tokens", "subset")
ROOM = 28  # tokens in a batch: two batches of two sequences, two heads of the shorter one at once


def identical(one: Effects, other: Effects) -> bool:
    same = all(torch.equal(getattr(one, f), getattr(other, f)) for f in FIELDS)
    return same and one.units == other.units and one.description == other.description


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the list of jobs that are really computed."""
    jobs: list[str] = []

    def counting(name: str, compute: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            jobs.append(name)
            return compute(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Passes, "joint", counting("masked", measuring.Passes.joint))
        yield jobs


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_those_of_the_naive_loop(family: str) -> None:
    decoder, examples = shared(family), calibration(((14, 5), (13, 9)), subsets=2)  # one batch, padded
    effects = attribute(decoder, examples, estimator=Estimator(max_batch_tokens=64))
    units, rows = [], []
    for layer in decoder.layers:
        for head in range(4):
            units.append(Unit(layer.index, head))
            with without_head(layer, head):
                rows.append([nats(decoder.model, e) for e in examples.examples])
    masked = torch.tensor(rows, dtype=torch.float64)
    intact = torch.tensor([nats(decoder.model, e) for e in examples.examples], dtype=torch.float64)
    assert effects.units == tuple(units)
    torch.testing.assert_close(effects.masked_nats, masked, **ROUNDING)
    torch.testing.assert_close(effects.intact_nats, intact, **ROUNDING)
    assert (masked - intact).abs().max(1).values.min() > 1e-3, "a head does nothing: the test is blind"


def test_effects_of_the_micro_model_by_hand() -> None:
    effects = attribute(micro.decoder(), micro.CALIBRATION)
    expected = torch.tensor(micro.delta_nats(), dtype=torch.float64)
    torch.testing.assert_close(effects.delta_nats(), expected, rtol=1e-5, atol=1e-5)
    for i, unit in enumerate(effects.units):
        losses = [
            micro.nats(micro.weights(), e, micro.Masked(unit.layer, unit.index))
            for e in micro.CALIBRATION.examples
        ]
        torch.testing.assert_close(
            effects.masked_nats[i], torch.tensor(losses, dtype=torch.float64), **ROUNDING
        )


def test_what_is_known_about_the_examples_is_kept() -> None:
    examples = Calibration(calibration().examples, (0, 1, 2, 0), {"sources": {"random": 4}, "seed": 3})
    decoder = shared("llama2")
    effects = attribute(decoder, examples)
    assert effects.tokens.tolist() == [9, 4, 8, 1]
    assert effects.subset.tolist() == [0, 1, 2, 0]
    assert effects.model_fingerprint == decoder.fingerprint
    assert effects.calibration_fingerprint == examples.fingerprint
    assert effects.description["sources"] == {"random": 4}
    assert effects.description["estimator"]["name"] == "exact"
    assert effects.description["naive_tokens"] == (14 + 13 + 9 + 4) * (12 + 1)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_batches_and_order_do_not_matter(family: str) -> None:
    decoder, examples = shared(family), calibration()
    expected = attribute(decoder, examples)
    for room in (1, 28):
        effects = attribute(decoder, examples, estimator=Estimator(max_batch_tokens=room))
        torch.testing.assert_close(effects.masked_nats, expected.masked_nats, **ROUNDING)
        torch.testing.assert_close(effects.intact_nats, expected.intact_nats, **ROUNDING)
    order = [3, 1, 2, 0]  # the longest come last: rows of a batch are not in the order of the examples
    shuffled = Calibration(
        tuple(examples.examples[i] for i in order), tuple(examples.subset[i] for i in order)
    )
    effects = attribute(decoder, shuffled)
    torch.testing.assert_close(effects.masked_nats, expected.masked_nats[:, order], **ROUNDING)
    torch.testing.assert_close(effects.intact_nats, expected.intact_nats[order], **ROUNDING)
    torch.testing.assert_close(effects.delta_nats(), expected.delta_nats(), **ROUNDING)


def test_progress_reaches_its_end_in_steps() -> None:
    seen: list[tuple[int, int]] = []
    attribute(
        shared("llama2"),
        calibration(),
        estimator=Estimator(max_batch_tokens=ROOM),
        on_progress=lambda *now: seen.append(now),
    )
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert done[-1] == totals[-1]
    tokens = [b.tokens.numel() for b in batches(calibration().examples, max_batch_tokens=ROOM)]
    costs = [4 * size * (N_LAYERS - layer) / N_LAYERS for size in tokens for layer in range(N_LAYERS)]
    assert done == tuple(round(float(sum(costs[: i + 1]))) for i in range(len(costs)))


@pytest.mark.thorough
def test_a_resumed_run_is_the_undisturbed_one_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, examples = shared("llama3"), calibration(((14, 5), (13, 9), (4, 3)))
    undisturbed = attribute(decoder, examples, estimator=Estimator(max_batch_tokens=ROOM))
    n_batches = len(batches(examples.examples, max_batch_tokens=ROOM))
    assert n_batches == 2
    n_jobs = n_batches * N_LAYERS
    for stop in range(n_jobs + 1):
        path = tmp_path / f"{stop}.jsonl"
        left = iter(range(stop))

        def interrupt(done: int, total: int, left: Iterator[int] = left) -> None:
            del done, total
            if next(left, None) is None:
                raise KeyboardInterrupt

        with counted(monkeypatch) as first:
            if stop < n_jobs:
                with pytest.raises(KeyboardInterrupt):
                    attribute(
                        decoder,
                        examples,
                        ledger=path,
                        estimator=Estimator(max_batch_tokens=ROOM),
                        on_progress=interrupt,
                    )
            else:
                attribute(
                    decoder,
                    examples,
                    ledger=path,
                    estimator=Estimator(max_batch_tokens=ROOM),
                    on_progress=interrupt,
                )
        with counted(monkeypatch) as second:
            resumed = attribute(decoder, examples, ledger=path, estimator=Estimator(max_batch_tokens=ROOM))
        assert identical(resumed, undisturbed)
        assert len(first) == min(stop + 1, n_jobs)
        assert len(first) + len(second) == n_jobs
        assert len(path.read_text().splitlines()) == 1 + n_jobs + n_batches


def test_a_finished_ledger_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, path = shared("llama2"), tmp_path / "ledger.jsonl"
    first = attribute(decoder, calibration(), ledger=path)
    calls: list[int] = []
    handle = decoder.model.register_forward_pre_hook(lambda *_: calls.append(1))
    seen: list[tuple[int, int]] = []
    again = attribute(decoder, calibration(), ledger=path, on_progress=lambda *now: seen.append(now))
    handle.remove()
    assert identical(first, again)
    assert not calls
    assert seen[-1][0] == seen[-1][1]


def test_a_ledger_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    decoder, examples = shared("llama2"), calibration()
    first = attribute(decoder, examples, ledger=path)
    content = path.read_bytes()
    other = fresh("llama2")
    other.model.lm_head.weight.data[3, 3] += 1e-3
    with pytest.raises(MismatchError, match="the model is another"):
        attribute(inspect_model(other.model, None, name="llama2"), examples, ledger=path)
    with pytest.raises(MismatchError, match="the set of examples"):
        attribute(decoder, calibration(seed=1), ledger=path)
    with pytest.raises(MismatchError, match="the set of examples"):  # other subsets, same examples
        attribute(decoder, calibration(subsets=2), ledger=path)
    with pytest.raises(MismatchError, match=r"tokens of a batch \(--batch-tokens\) was 2048 and is now 1"):
        attribute(decoder, examples, ledger=path, estimator=Estimator(max_batch_tokens=1))
    assert path.read_bytes() == content
    assert identical(attribute(decoder, examples, ledger=path), first)


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any

from reference import calibration, fresh
from causalprune.attribution.estimators import attribute
from causalprune.attribution.questions import Estimator, Question

decoder, calls = fresh("llama3"), 0

def kill(*_):
    global calls
    calls += 1
    if calls == 17:  # in the middle of a forward pass in the middle of a job
        os.kill(os.getpid(), signal.SIGKILL)

decoder.layers[-1].attention.output.register_forward_hook(kill)
attribute(decoder, calibration(), ledger=Path(sys.argv[1]), estimator=Estimator(max_batch_tokens=28))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    folders = [str(Path(__file__).parents[1]), str(Path(str(measuring.__file__)).parents[2])]
    same = {"OMP_NUM_THREADS": "1"}  # as here: other threads round differently
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | same
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], env=environment, timeout=120, check=False
    )
    assert died.returncode == -signal.SIGKILL
    rows = path.read_text().splitlines()
    jobs = [json.loads(row)["key"] for row in rows[1:]]
    assert jobs == ["0:intact", "0:0", "0:1", "0:2", "1:intact", "1:0"]
    with path.open("a") as file:  # and had the kill hit a write:
        file.write(rows[-1][: len(rows[-1]) // 2])
    with counted(monkeypatch) as computed:
        resumed = attribute(
            shared("llama3"), calibration(), ledger=path, estimator=Estimator(max_batch_tokens=ROOM)
        )
    assert len(computed) == 9 - 4
    assert identical(
        resumed, attribute(shared("llama3"), calibration(), estimator=Estimator(max_batch_tokens=ROOM))
    )


def effects_of(
    masked: list[list[float]], intact: list[float], tokens: list[int], subset: list[int]
) -> Effects:
    units = tuple(Unit(0, head) for head in range(len(masked)))
    nats_of, counts = torch.tensor(masked, dtype=torch.float64), torch.tensor(tokens)
    return Effects(
        units, nats_of, torch.tensor(intact, dtype=torch.float64), counts, torch.tensor(subset), "m", "c"
    )


@pytest.mark.parametrize(
    ("subset", "delta"),
    [
        ([0, 0, 0, 0], [30 / 10 - 23 / 10, 21 / 10 - 23 / 10]),
        ([0, 1, 0, 1], [(21 / 5 + 9 / 5) / 2 - 2.3, (3 / 5 + 18 / 5) / 2 - 2.3]),
        ([0, 0, 1, 1], [(7 / 3 + 23 / 7) / 2 - 85 / 42, (2 / 3 + 19 / 7) / 2 - 85 / 42]),
        ([0, 1, 2, 2], [3 - 40 / 21, 2 - 40 / 21]),
        ([0, 1, 2, 3], [(2 + 3) / 2 - 2, (1 + 2) / 2 - 2]),
    ],
)
def test_delta_by_hand(subset: list[int], delta: list[float]) -> None:
    effects = effects_of(
        masked=[[3 * 2, 1 * 1, 5 * 3, 2 * 4], [0 * 2, 2 * 1, 1 * 3, 4 * 4]],  # loss per token · tokens
        intact=[1 * 2, 2 * 1, 1 * 3, 4 * 4],
        tokens=[2, 1, 3, 4],
        subset=subset,
    )
    torch.testing.assert_close(effects.delta_nats(), torch.tensor(delta, dtype=torch.float64))


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    decoder = fresh("llama2")
    decoder.layers[1].projections[-1].parameter.data[0, 0] = float("nan")
    for ledger in (None, tmp_path / "ledger.jsonl"):
        with pytest.raises(ModelError, match="not finite"):
            attribute(decoder, calibration(), ledger=ledger)


def test_a_ledger_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"

    def again(done: int, total: int) -> None:
        del done, total
        attribute(shared("llama2"), calibration(), ledger=path)

    with pytest.raises(CheckpointError, match="in use"):
        attribute(shared("llama2"), calibration(), ledger=path, on_progress=again)


def test_effects_are_kept_in_double_precision() -> None:
    effects = attribute(shared("llama2"), calibration())
    found: list[Tensor] = [effects.masked_nats, effects.intact_nats, effects.delta_nats()]
    assert {values.dtype for values in found} == {torch.float64}


def test_a_head_that_does_nothing_has_no_paired_effect() -> None:
    tokens, subset = torch.tensor([10, 20, 30]), torch.arange(3)
    intact = torch.tensor([10.0, 60.0, 45.0], dtype=torch.float64)
    masked = torch.stack([intact, intact + torch.tensor([5.0, -2.0, 3.0])])
    effects = Effects((Unit(0, 0), Unit(0, 1)), masked, intact, tokens, subset, "model", "calibration")
    assert effects.paired_delta_nats().tolist() == [0.0, 6.0 / 60]
    assert float(effects.delta_nats()[0]) == pytest.approx(1.5 - (1.0 + 3.0 + 1.5) / 3)  # the method's offset


def test_without_memory_batches_are_halved_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attribute(shared("llama3"), calibration())
    own, most = measuring.Passes._losses, 3

    def losses(passes: measuring.Passes, number: int, layer: int, cells: Any, *rest: Any) -> torch.Tensor:
        if len(cells) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(passes, number, layer, cells, *rest)

    monkeypatch.setattr(measuring.Passes, "_losses", losses)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = attribute(shared("llama3"), calibration())
        messages = [str(warning.message) for warning in said]
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            attribute(shared("llama3"), calibration())
    assert messages[:2] == [
        "out of memory with 8 sequences at once: going on with 4",
        "out of memory with 4 sequences at once: going on with 2",
    ]
    torch.testing.assert_close(found.masked_nats, whole.masked_nats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["exact", "adaptive"])
def test_divergences_of_resumed_and_revisited_batches_are_from_the_intact_model(
    estimator: str, tmp_path: Path
) -> None:
    question, path = Question(effect="kl"), tmp_path / "ledger"
    how = Estimator("exact", max_batch_tokens=ROOM)
    truth = attribute(shared("llama3"), calibration(), question, how)
    if estimator == "adaptive":  # comes back to the same batches in every round
        how = Estimator("adaptive", budget=1.2, max_batch_tokens=ROOM)
        found = attribute(shared("llama3"), calibration(), question, how)
        assert found.kl_nats is not None
        assert bool(found.kl_nats.isfinite().double().mean() > 0.3), "hardly anything was measured"
    else:
        attribute(shared("llama3"), calibration(), question, how, ledger=path)
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(rows[:4]))  # stopped in the middle of a batch
        found = attribute(shared("llama3"), calibration(), question, how, ledger=path)
    assert found.kl_nats is not None
    assert truth.kl_nats is not None
    there = ~found.kl_nats.isnan()
    torch.testing.assert_close(found.kl_nats[there], truth.kl_nats[there], **ROUNDING)
