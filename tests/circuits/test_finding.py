"""Circuits that are known because they were built are found, and what is missed is known too."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constructed import TRUE, constructed, problems
from reference import calibration, shared

import causalprune as cp
from causalprune.attribution.estimators import balanced
from causalprune.calibration.examples import batches
from causalprune.circuits import Checks, Circuit, examined, finding, save_circuit
from causalprune.circuits.behaviour import Trials, behaviour, scored
from causalprune.circuits.checking import random_like
from causalprune.core.errors import DataError, MismatchError, OptionError
from causalprune.core.resuming import State
from causalprune.core.types import Calibration, Decoder, Unit
from causalprune.interventions.ablation import gated
from causalprune.interventions.losses import target_nats
from causalprune.interventions.units import closing, list_units, sites
from causalprune.pruning.closing import close

PROBLEMS = calibration(tuple((12 + i % 3, 5) for i in range(20)))


def find(decoder: Decoder, score: Calibration, decide: Calibration | None = None, **own: object) -> Circuit:
    how = {"rescore": 1} if own.get("estimator") == cp.Estimator("exact") else {}
    return cp.circuit(decoder, score, decide=decide, stage=cp.quiet, **{**how, **own})  # type: ignore[arg-type]


@pytest.mark.thorough
@pytest.mark.parametrize("name", TRUE)
def test_the_default_returns_exactly_what_was_built(name: str) -> None:
    found = find(constructed(name), problems(name, 24), problems(name, 24, 1))
    assert set(found.members) == TRUE[name]
    assert abs(found.chosen.nats.value) < 0.105
    assert {unit for unit, share in found.membership.items() if share > 0.5} == TRUE[name]
    assert found.curve.empty.value > 0.5
    shares = [point.share for point in found.curve.points]
    assert shares == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert found.curve.points[-1].faithfulness.value == pytest.approx(1.0)
    assert found.curve.points[-1].kl.value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("name", TRUE)
def test_an_order_that_is_learned_by_the_loss_has_exactly_what_was_built_too(name: str) -> None:
    how = {"question": cp.Question(), "estimator": cp.Estimator("integrated", epochs=10)}
    found = find(constructed(name), problems(name, 24), problems(name, 24, 1), **how)
    assert set(found.members) == TRUE[name]


@pytest.mark.thorough
def test_removal_of_single_units_misses_what_either_of_two_will_do() -> None:
    decoder = constructed("or")
    effects = cp.attribute(
        decoder, problems("or", 12), estimator=cp.Estimator("exact"), on_progress=cp.silent
    )
    delta = dict(zip(effects.units, effects.paired_delta_nats().tolist(), strict=True))
    assert all(abs(delta[unit]) < 0.01 for unit in TRUE["or"])
    found = find(decoder, problems("or", 24), problems("or", 24, 1), estimator=cp.Estimator("exact"))
    assert set(found.members) != TRUE["or"]


@pytest.mark.thorough
def test_a_suppressor_does_not_help() -> None:
    decoder, both = constructed("suppressor"), (problems("suppressor", 24), problems("suppressor", 24, 1))
    helping = find(decoder, *both, rank="signed", question=cp.Question())
    assert set(helping.members) == {Unit(0, 6)}
    scores = dict(zip(helping.units, helping.score.tolist(), strict=True))
    assert scores[Unit(1, 2)] < -1 < 1 < scores[Unit(0, 6)]


def test_a_shorter_chain_of_estimators_agrees_with_effects() -> None:
    """One round by exact removal ranks as the effects do, on the same problems."""
    decoder = shared("llama2")
    how = {"estimator": cp.Estimator("exact"), "question": cp.Question()}
    found = find(decoder, PROBLEMS, PROBLEMS, keep=0.5, **how)
    effects = cp.attribute(decoder, PROBLEMS, estimator=cp.Estimator("exact"), on_progress=cp.silent)
    change = effects.change_nats() / effects.tokens
    torch.testing.assert_close(found.score, change.mean(1))
    assert found.order.tolist() == change.mean(1).abs().argsort(descending=True, stable=True).tolist()


def test_every_gate_counts_alike_unless_nothing_is_worth_anything_at_it() -> None:
    scores = torch.tensor([[500.0, 500.0], [6.0, 4.0], [1e-6, 9e-6]]).double()[:, :, None].expand(-1, -1, 3)
    found = balanced(scores)[:, 0]
    weights = torch.tensor([1 / 1000, 1 / 10, 1 / 10]).double()  # the last is at 1 % of the largest sum
    expected = (weights[:, None] * scores[:, :, 0]).sum(0) / weights.sum()
    torch.testing.assert_close(found, expected)
    shares = found / found.sum()
    assert float(shares[0]) == pytest.approx(0.55, abs=1e-3), "a half at one gate and 0.6 at the other"
    closed = scores.clone()
    closed[:, 1] = torch.nan
    assert balanced(closed).isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_losses_are_those_of_gates(ablation: str) -> None:
    decoder = shared("llama3")
    own = behaviour(
        decoder,
        PROBLEMS.examples[:5],
        cp.Question(("heads", "mlp"), ablation=ablation),
        cp.Estimator("gradient"),
    )  # type: ignore[arg-type]
    keep = torch.tensor([number % 3 > 0 for number in range(len(own.units))])
    nats, kl = Trials(own).both([keep, torch.ones_like(keep)])
    parts = [
        parts
        for parts, stays in zip(list_units(decoder, ["heads", "mlp"]).values(), keep, strict=True)
        if not stays
    ]
    together: dict = {}
    for part in parts:
        for site, index in part.items():
            together[site] = torch.cat([together[site], index]) if site in together else index
    expected = torch.zeros(5, dtype=torch.float64)
    for batch in own.plan.groups:
        gates = {
            site: gate.expand(len(batch.tokens), -1)
            for site, gate in closing([together], sites(decoder)).items()
        }
        with gated(decoder, gates, own.instead(batch)):
            expected[list(batch.indices)] = target_nats(decoder, batch)
    tokens = torch.tensor([example.target_tokens for example in PROBLEMS.examples[:5]])
    torch.testing.assert_close(nats[0], expected / tokens, rtol=1e-5, atol=1e-5)
    (whole,) = (target_nats(decoder, b) for b in batches(PROBLEMS.examples[:1], max_batch_tokens=64))
    assert float(nats[1, 0]) == pytest.approx(float(whole) / int(tokens[0]), rel=1e-5)
    assert float(kl[1].max()) == pytest.approx(0.0, abs=1e-6)
    assert float(kl[0].min()) > 0


def test_units_of_several_kinds_are_ordered_by_score_a_weight_and_those_of_one_by_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, given = shared("llama3"), list[tuple]()
    for name in ("membership", "stability"):
        own = getattr(finding, name)
        monkeypatch.setattr(finding, name, lambda *words, own=own: given.append(words[1:]) or own(*words))
    for units, by in ((("heads", "mlp"), finding.PER_WEIGHT), (("heads",), "score")):
        found = find(decoder, PROBLEMS, PROBLEMS, question=cp.Question(units), rescore=1, keep=0.01)
        values = found.score / found.weights if len(units) > 1 else found.score
        assert found.order.tolist() == values.abs().argsort(descending=True, stable=True).tolist()
        assert found.description["ordered_by"] == by
        sizes = found.weights if len(units) > 1 else torch.ones_like(found.weights)
        (one, share), (other,) = given[-2:]
        assert (one.tolist(), other.tolist(), share) == (sizes.tolist(), sizes.tolist(), found.chosen.share)


def test_adaptive_with_a_budget_is_an_estimator_too() -> None:
    how = cp.Estimator("adaptive", budget=2.0)
    own = behaviour(shared("llama2"), PROBLEMS.examples[:9], cp.Question(), how)
    assert own.plan.estimator.name == "gradient"


def test_random_circuits_have_the_same_kinds_in_the_same_layers() -> None:
    units = [Unit(layer, i, kind) for layer in range(3) for kind in ("head", "mlp") for i in range(4)]  # type: ignore[arg-type]
    like = torch.tensor([(number * 7) % 3 == 0 for number in range(len(units))])
    other = random_like(units, like, torch.Generator().manual_seed(3))
    count = [
        [(unit.layer, unit.kind) for unit, own in zip(units, keep, strict=True) if own]
        for keep in (like, other)
    ]
    assert sorted(count[0]) == sorted(count[1])
    assert not torch.equal(like, other)


CALL = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
import causalprune as cp
from causalprune.circuits import Checks, Circuit, examined, save_circuit
from constructed import constructed, problems
decoder, scored = constructed("and"), problems("and", 24)
found = cp.circuit(decoder, scored, cp.Question(ablation="mean"), decide=problems("and", 24, 1), folder={folder!r}, stage=cp.quiet)
save_circuit(examined(found, decoder, scored, Checks(10), folder={folder!r}, stage=cp.quiet), Path({folder!r}) / "circuit.json")
"""


@pytest.mark.thorough
def test_a_killed_search_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    decoder, scored = constructed("and"), problems("and", 24)

    def work(folder: Path) -> bytes:
        own = {"folder": folder, "stage": cp.quiet, "decide": problems("and", 24, 1)}
        found = cp.circuit(decoder, scored, cp.Question(ablation="mean"), **own)  # type: ignore[arg-type]
        found = examined(found, decoder, scored, Checks(10), folder=folder, stage=cp.quiet)
        save_circuit(found, folder / "circuit.json")
        return (folder / "circuit.json").read_bytes()

    expected = work(whole)
    lines = (whole / "circuit.ledger").read_bytes().splitlines(keepends=True)
    scores = sorted((whole / "scores").iterdir())
    for cut in (0, len(lines) // 2, len(lines) - 1):
        folder = tmp_path / f"cut{cut}"
        (folder / "scores").mkdir(parents=True)
        for path in scores[: cut and None]:  # none, or all of them
            (folder / "scores" / path.name).write_bytes(path.read_bytes())
        (folder / "circuit.ledger").write_bytes(b"".join(lines[: cut + 1])[:-7])
        assert work(folder) == expected


@pytest.mark.slow
def test_a_search_survives_kills(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent.parent)
    folders = [tmp_path / name for name in ("whole", "killed")]
    commands = [[sys.executable, "-c", CALL.format(tests=tests, folder=str(folder))] for folder in folders]
    subprocess.run(commands[0], check=True)
    for wait in (6, 7, 8, 9, 60):
        process = subprocess.Popen(commands[1])
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert (folders[0] / "circuit.json").read_bytes() == (folders[1] / "circuit.json").read_bytes()


@pytest.mark.thorough
def test_another_question_does_not_continue_a_ledger(tmp_path: Path) -> None:
    decoder, own = constructed("and"), (problems("and", 24), problems("and", 24, 1))
    find(decoder, *own, folder=tmp_path, rescore=1)
    find(decoder, *own, folder=tmp_path, rescore=2, keep=0.8)  # which changes nothing that is kept
    with pytest.raises(MismatchError, match="ablation was 'zero' and is now 'mean'"):
        find(decoder, *own, question=cp.Question(ablation="mean"), folder=tmp_path)
    with pytest.raises(MismatchError, match=r"the set of problems that decides .* is another"):
        find(decoder, own[0], own[0], folder=tmp_path)
    with pytest.raises(MismatchError, match="the model is another"):
        find(constructed("or"), *own, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keep": 0.0}, OptionError, "above 0 and at most 1, not 0"),
        ({"keep": 1.5}, OptionError, "above 0 and at most 1, not 1.5"),
        ({"rescore": 0}, OptionError, "at least 1 round"),
        ({"rank": "size"}, OptionError, "rank 'size'"),
        ({"estimator": cp.Estimator("adaptive")}, OptionError, "ask for 1 round"),
        ({"question": cp.Question(("experts",))}, OptionError, "has no units of kind 'expert'"),
        (
            {"decide": Calibration(PROBLEMS.examples[:7], (0,) * 7)},
            DataError,
            r"7 problems to decide on \(--on\) are too few",
        ),
        (
            {"question": cp.Question(ablation="counterfactual")},
            OptionError,
            "needs a counterfactual of every example",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict, error: type[Exception], words: str) -> None:
    own = {"decide": PROBLEMS} | ({"rescore": 3} if "estimator" in options else {}) | options
    with pytest.raises(error, match=words):
        cp.circuit(shared("llama2"), PROBLEMS, stage=cp.quiet, **own)


def test_experts_can_only_be_removed() -> None:
    with pytest.raises(OptionError, match="experts can only be ablated with 'zero'"):
        find(shared("mixtral"), PROBLEMS, PROBLEMS, question=cp.Question(("experts",), ablation="mean"))


def test_problems_without_targets_are_refused() -> None:
    from causalprune.core.types import Example

    empty = Calibration((*PROBLEMS.examples, Example((3, 4, 5), 3, "own", "x")), (0,) * 21)
    with pytest.raises(DataError, match="own: an example has no target tokens"):
        find(shared("llama2"), empty, PROBLEMS)


@pytest.mark.thorough
def test_a_share_that_only_everything_keeps_says_how_near_it_came() -> None:
    with pytest.raises(
        OptionError, match=r"no circuit short of all 16 units keeps 1 .* 15 units keep \d\.\d+"
    ):
        find(constructed("suppressor"), problems("suppressor", 24), problems("suppressor", 24, 1), keep=1.0)


@pytest.mark.thorough
def test_a_record_comes_back(tmp_path: Path) -> None:
    decoder, scored = constructed("chain"), problems("chain", 24)
    found = find(decoder, scored, problems("chain", 24, 1))
    found = examined(found, decoder, scored, Checks(5, tests=True), stage=cp.quiet)
    save_circuit(found, tmp_path / "circuit.json")
    again = cp.load_circuit(tmp_path)
    assert again.members == found.members
    assert again.membership == found.membership
    for name in ("curve", "chosen", "problems", "checks", "stability", "remarks"):
        assert getattr(again, name) == getattr(found, name)
    save_circuit(again, tmp_path / "again.json")
    own, other = (json.loads((tmp_path / name).read_text()) for name in ("circuit.json", "again.json"))
    assert own == other
    assert "Circuit(2 of 16 units, 12.5%" in repr(again)
    (tmp_path / "again.json").write_text(json.dumps(own | {"units": {}}))
    from causalprune.core.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"is no circuit of .*, or damaged"):
        cp.load_circuit(tmp_path / "again.json")


@pytest.mark.thorough
def test_checks_tell_a_circuit_from_chance() -> None:
    decoder, scored = constructed("chain"), problems("chain", 24)
    found = examined(
        find(decoder, scored, problems("chain", 24, 1)),
        decoder,
        scored,
        Checks(20, tests=True),
        stage=cp.quiet,
    )
    assert found.checks["controls"]["worse"] > 0.9
    assert found.checks["necessity"]["nats"]["low"] > 1
    assert found.checks["necessity"]["random_nats"]["value"] < found.checks["necessity"]["nats"]["value"] / 2
    assert found.checks["completeness"]["random_max"] < 0.1
    assert found.tests["sufficiency"]["holds"]
    assert 12 < found.tests["equivalence"]["of"] <= 24  # those on which both are level say nothing
    other = examined(
        find(constructed("or"), problems("or", 24), problems("or", 24, 1)),
        constructed("or"),
        problems("or", 24),
        Checks(0),
        stage=cp.quiet,
    )
    assert other.checks["controls"] == {"count": 0, "asked": 0}
    with pytest.raises(MismatchError, match="on another calibration"):
        examined(found, decoder, problems("chain", 24, 5), stage=cp.quiet)


@pytest.mark.thorough
def test_half_of_a_circuit_of_alternatives_is_incomplete() -> None:
    decoder, scored = constructed("or"), problems("or", 24)
    whole = find(decoder, scored, problems("or", 24, 1))
    half = replace(whole, size=1)
    gaps = [
        examined(own, decoder, scored, Checks(0), stage=cp.quiet).checks["completeness"]
        for own in (whole, half)
    ]
    assert gaps[0]["random_max"] < 0.1
    assert gaps[1]["random_max"] > 0.9


def test_what_is_out_is_closed_while_the_others_are_scored() -> None:
    """Slopes with a whole layer's heads closed are those of a model in which they are zero."""
    from reference import fresh

    names, how = ("heads", "neurons:10"), cp.Estimator("gradient", draws=0, gates=(0.6, 1.0))
    one, other = fresh("llama3"), fresh("llama3")
    own = behaviour(one, PROBLEMS.examples[:6], cp.Question(names), how)
    keep = torch.tensor([not (unit.layer == 0 and unit.kind == "head") for unit in own.units])
    found = scored(own, keep, how, State())
    assert bool(found[~keep].isnan().all())
    close(other, [parts for parts, stays in zip(own.plan.units.values(), keep, strict=True) if not stays])
    expected = scored(
        behaviour(other, PROBLEMS.examples[:6], cp.Question(names), how), keep | True, how, State()
    )
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found[keep], scored(own, keep | True, how, State())[keep], rtol=1e-2)
