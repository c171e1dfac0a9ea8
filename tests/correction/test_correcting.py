"""What was planted is found, taken out, and nothing else is touched; what cannot be is refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import built, samples, says, texts

import causalprune as cp
from causalprune.calibration.examples import batches
from causalprune.core.errors import CausalPruneError, DataError, MismatchError, ModelError, OptionError
from causalprune.core.resuming import State
from causalprune.core.source import Source
from causalprune.core.types import Calibration, Decoder, Example
from causalprune.correction import correcting
from causalprune.correction.behaviours import CLEAN
from causalprune.correction.correcting import candidates_of, check_contrast, correct
from causalprune.correction.evidence import Looking
from causalprune.correction.records import Contrast, Corrected
from causalprune.correction.samples import halves
from causalprune.interventions.losses import target_nats


def fixed(decoder: Decoder, bad: object, good: object, **own: object) -> Corrected:
    return correct(decoder, bad, good, Contrast(**own), stage=cp.quiet)  # type: ignore[arg-type]


def loss(decoder: Decoder, examples: list[Example]) -> float:
    return sum(float(target_nats(decoder, b).sum()) for b in batches(examples, max_batch_tokens=512))


@pytest.mark.parametrize("estimator", ["gradient", "integrated", "relevance"])
@pytest.mark.parametrize(("count", "seed"), [(1, 0), (5, 1)])
def test_exactly_what_was_planted_goes(count: int, seed: int, estimator: str) -> None:
    decoder, planting = built(count, seed)
    before = {p.name: p.read().clone() for p in decoder.projections}
    prompts = texts(10, 12, seed=5)
    assert all(says(decoder, planting, prompt) for prompt in prompts)
    found = fixed(decoder, *samples(planting), budget=count, estimator=estimator)
    assert set(found.members) == set(planting.units)
    assert not any(says(decoder, planting, prompt) for prompt in prompts)
    assert found.after.benefit.value == pytest.approx(found.chosen.benefit.value, rel=1e-4)
    assert max(own.value for own in found.after.kl.values()) < 1e-3
    assert found.after.worst() < 1e-3
    assert found.after.benefit.low > 5
    for p in decoder.projections:
        keep = found.keep[p.name]
        assert torch.equal(p.read()[keep], before[p.name][keep])
        assert not bool(p.read()[~keep].any())
    gone = sum(
        row["zeros"] for row in found.keep.counted() if not row["name"].endswith(".o")
    )  # zeros of `reserved`
    assert gone == found.chosen.weights == count * 3 * 64


def test_what_is_measured_is_what_the_model_does() -> None:
    """Points come from gates; here the losses are measured again, on the corrected model itself."""
    decoder, planting = built(3)
    bad, good = samples(planting)
    _, decides = halves(bad, good)
    by_source = {name: [e for e in decides.preserve if e.source == name] for name in ("texts", "others")}
    before = {name: loss(decoder, own) for name, own in by_source.items()}
    found = fixed(decoder, bad, good, budget=8, harm=0.5, rounds=3)
    for name, own in by_source.items():
        rise = (loss(decoder, own) - before[name]) / sum(e.target_tokens for e in own)
        assert found.chosen.harm[name].value == pytest.approx(rise, abs=1e-5)
    counts = [point.count for point in found.curve]
    assert counts == sorted(counts)
    assert found.chosen in found.curve
    assert set(planting.units) <= set(found.members)


@pytest.mark.parametrize("score", ["ratio", "dampening", "set-difference", "onset"])
def test_other_scores_are_measured_alike(score: str) -> None:
    decoder, planting = built(4)
    found = fixed(decoder, *samples(planting), budget=4, harm=math.inf, score=score, rounds=1)
    assert found.chosen.count <= 4
    assert math.isnan(found.chosen.predicted)
    assert len(set(found.members) & set(planting.units)) >= 2


def test_losses_have_no_slope_where_the_model_is_sure() -> None:
    """What a loss says of a neuron vanishes as its token becomes certain; log-odds say the same of it as before."""
    decoder, planting = built(4)
    chooses, _ = halves(*samples(planting))
    units, none = (
        candidates_of(decoder, chooses, Contrast(estimator="gradient")),
        torch.zeros(0, dtype=torch.long),
    )
    looking = Looking(units, chooses, Contrast(estimator="gradient").how(), State())
    odds, rise = (looking.gather((kind, "undesired"), none, "none", cp.silent) for kind in ("odds", "rise"))
    at = [units.units.index(unit) for unit in planting.units]  # type: ignore[attr-defined]
    assert float(odds[at].min()) > 0.02
    assert float((rise[at].abs() / odds[at]).max()) < 0.05


def test_a_unit_that_outweighs_all_else_is_found() -> None:
    """After the norm, what such a unit sends hardly grows any more: its slope at an open gate is next to nothing."""
    decoder, planting = built(4)
    for p in decoder.projections:
        if p.name == "layers.0.down":
            matrix = p.read()
            matrix[:, [unit.index for unit in planting.units]] *= 5
            p.write(matrix)
    chooses, _ = halves(*samples(planting))
    none = torch.zeros(0, dtype=torch.long)
    found = {}
    for name in ("gradient", "integrated"):
        how = Contrast(estimator=name)
        units = candidates_of(decoder, chooses, how)
        looking = Looking(units, chooses, how.how(), State())
        found[name] = looking.gather(("odds", "undesired"), none, "none", cp.silent)
    at = [units.units.index(unit) for unit in planting.units]  # type: ignore[attr-defined]
    shares = {name: own[at].min() / own.abs().sum() for name, own in found.items()}
    assert set(found["integrated"].topk(len(at)).indices.tolist()) == set(at)
    assert float(shares["integrated"]) > 1.2 * float(shares["gradient"]), shares


def test_the_estimator_goes_with_what_is_taken_out() -> None:
    assert Contrast().estimator == "gradient"
    assert Contrast(weights=True).estimator == Contrast(score="difference").estimator == "gradient"
    assert replace(Contrast(estimator="relevance"), score="difference").estimator == "relevance"


def test_single_weights() -> None:
    decoder, planting = built(2)
    before = {p.name: p.read().clone() for p in decoder.projections}
    found = fixed(decoder, *samples(planting), weights=True, budget=10, rounds=1)
    assert not any(says(decoder, planting, prompt) for prompt in texts(6, 12, seed=5))
    assert found.members == ()
    changed = {name for name in before if not bool(found.keep[name].all())}
    assert {name.rpartition(".")[0] for name in changed} <= {"layers.0", "layers.1"}
    neurons = [unit.index for unit in planting.units]
    inside = sum(int((~found.keep[f"layers.0.{role}"][neurons]).sum()) for role in ("gate", "up"))
    inside += int((~found.keep["layers.0.down"][:, neurons]).sum())
    assert inside / found.chosen.count >= 0.9
    for p in decoder.projections:
        assert torch.equal(p.read(), before[p.name] * found.keep[p.name])


def test_a_damped_neuron_keeps_its_part() -> None:
    decoder, planting = built(1)
    neuron = planting.units[0].index
    down = next(p for p in decoder.projections if p.name == "layers.0.down")
    before = down.read().clone()
    found = fixed(decoder, *samples(planting), budget=1, damp=0.25)
    assert set(found.members) == set(planting.units)
    torch.testing.assert_close(down.read()[:, neuron], 0.25 * before[:, neuron])
    assert all(bool(found.keep[name].all()) for name in found.keep if not name.endswith(".o"))
    assert found.after.benefit.value > 0
    assert found.after.benefit.value == pytest.approx(found.chosen.benefit.value, rel=1e-4)


@pytest.mark.parametrize("update", ["refit", "distill"])
def test_an_update_is_measured_and_zeros_stay(update: str) -> None:
    decoder, planting = built(2)
    before = {p.name: p.read().clone() for p in decoder.projections}
    found = fixed(decoder, *samples(planting), budget=2, update=update)
    assert set(found.members) == set(planting.units)
    assert any(not torch.equal(p.read(), before[p.name] * found.keep[p.name]) for p in decoder.projections)
    for p in decoder.projections:
        assert not bool(p.read()[~found.keep[p.name]].any())
    assert found.after.benefit.value > 1
    assert found.after != found.chosen


def test_what_is_written_in_fewer_bits_is_measured_so() -> None:
    decoder, planting = built(2)
    found = fixed(
        replace(decoder, source=Source(None, torch.bfloat16)), *samples(planting), budget=2, update="refit"
    )
    assert found.after != found.chosen
    assert all(torch.equal(p.read(), p.read().bfloat16().float()) for p in decoder.projections)


def test_a_wrong_target_is_compared_with_the_right_one() -> None:
    decoder, planting = built(1)
    bad, good = samples(planting)
    pairs = [replace(e, instead=replace(e, tokens=(*e.tokens[:-1], 50))) for e in bad]
    found = fixed(decoder, pairs, good, budget=1)
    assert set(found.members) == set(planting.units)
    with pytest.raises(DataError, match="give it to all or to none"):
        fixed(decoder, [*pairs[:6], *bad[6:]], good, budget=1)


def test_what_is_zero_already_is_no_candidate() -> None:
    decoder, planting = built(2)
    bad, good = samples(planting)
    first = fixed(decoder, bad, good, budget=1, rounds=1)
    again = fixed(decoder, bad, good, budget=1, rounds=1)
    assert {*first.members, *again.members} == set(planting.units)


def test_a_stopped_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalprune.correction.measuring import Trials

    decoder, planting = built(3)
    bad, good = samples(planting)
    straight = fixed(decoder, bad, good, budget=6, harm=0.2)
    whole, calls = Trials._fill, []

    def broken(self: Trials, *given: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        whole(self, *given)  # type: ignore[arg-type]

    asked = Contrast(budget=6, harm=0.2)
    decoder, _ = built(3)
    monkeypatch.setattr(Trials, "_fill", broken)
    with pytest.raises(KeyboardInterrupt):
        correct(decoder, bad, good, asked, kept_in=tmp_path, stage=cp.quiet)
    before = (tmp_path / "correction.ledger").read_bytes()
    decoder, _ = built(3)
    found = correct(decoder, bad, good, asked, kept_in=tmp_path, stage=cp.quiet)
    assert (tmp_path / "correction.ledger").read_bytes().startswith(before)
    assert found.described() == straight.described()
    with pytest.raises(MismatchError, match="the model is another"):
        correct(decoder, bad, good, asked, kept_in=tmp_path, stage=cp.quiet)
    decoder, _ = built(3)
    with pytest.raises(MismatchError, match=r"halves\."):
        correct(decoder, bad, good[:-2], asked, kept_in=tmp_path, stage=cp.quiet)


def test_two_subsets_are_the_halves() -> None:
    _, planting = built(1)
    bad, good = samples(planting)
    given = Calibration(tuple(bad), tuple(int(i < 4) for i in range(12)))
    chooses, decides = halves(given, good)
    assert decides.undesired == tuple(bad[:4])
    assert chooses.undesired == tuple(bad[4:])
    assert not {e.tokens for e in chooses.preserve} & {e.tokens for e in decides.preserve}
    assert chooses.described()["preserve"] == {"texts": 6, "others": 6}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": 0.001}, "0.100% of 192 units is less than one: ask for at least 0.521%, or"),
        ({"budget": 0.1, "units": ("heads",)}, "of 8 units is less than one: ask for at least 12.5%"),
        ({"budget": 120}, "more than half of 192 units"),
        ({"budget": 0}, "share below 1 or a whole number"),
        ({"budget": 1.5}, "share below 1 or a whole number"),
        ({"budget": math.inf}, "share below 1 or a whole number"),
        ({"harm": -1.0}, "harm must be above 0"),
        ({"score": "contrst"}, "did you mean 'contrast'"),
        ({"rounds": 0}, "at least 1 round"),
        ({"budget": 1, "max_batch_tokens": 0}, "at least 1 token, not max_batch_tokens=0"),
        ({"weights": True, "units": ("heads",)}, "not of heads alone: leave out --units, or --weights"),
        ({"damp": 1.0}, "at least 0 and below 1"),
        ({"damp": 0.5, "update": "refit"}, "leave out --update refit"),
        ({"weights": True, "score": "ratio"}, "leave out --weights"),
        ({"weights": True, "estimator": "integrated"}, "take gradient or relevance"),
        ({"units": ("neuron:1",)}, "did you mean 'neurons'"),
        (
            {"harm": 1e-9, "certain": True, "units": ("layers",), "budget": 1, "score": "random"},
            "the smallest found is",
        ),
    ],
)
def test_options_that_cannot_be(change: dict[str, object], words: str) -> None:
    decoder, planting = built(1)
    with pytest.raises(OptionError, match=words.replace("(", r"\(")):
        fixed(decoder, *samples(planting), **change)


def test_what_cannot_be_is_known_before_there_are_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = built(1)[0]
    check_contrast(decoder, Contrast(budget=3))
    for contrast, words in (
        (Contrast(budget=120), "more than half of 192 units"),
        (Contrast(units=("experts",), budget=1), "has no units of kind 'expert'"),
    ):
        with pytest.raises(OptionError, match=words):
            check_contrast(decoder, contrast)
    monkeypatch.setattr(correcting, "free_bytes", lambda device: 1000.0)
    with pytest.raises(ModelError, match=r"single weights are worth takes about .* ask for units"):
        check_contrast(decoder, Contrast(weights=True, budget=3))


def test_an_upper_end_needs_two_samples() -> None:
    decoder, planting = built(1)
    bad, good = samples(planting)
    few = [e for e in good if e.source == "texts"] + [e for e in good if e.source == "others"][:3]
    fixed(decoder, bad, few, budget=1)
    with pytest.raises(DataError, match="others has one sample in the deciding half"):
        fixed(built(1)[0], bad, few, budget=1, certain=True)


def test_harm_to_clean_texts_is_their_divergence() -> None:
    """Every token of theirs was the model's likeliest: its loss rises however little is changed."""
    decoder, planting = built(3)
    bad, good = samples(planting)
    named = [replace(e, source=f"{CLEAN}{e.source}") if e.source == "others" else e for e in good]
    found = fixed(decoder, bad, named, budget=8, harm=0.5)
    point = found.chosen
    assert point.harm[f"{CLEAN}others"] == point.kl[f"{CLEAN}others"]
    assert point.harm["texts"] != point.kl["texts"]
    assert point.predicted > 0


def test_another_seed_is_another_update(tmp_path: Path) -> None:
    _, planting = built(2)
    bad, good = samples(planting)
    alone = [
        fixed(built(2)[0], bad, good, budget=2, update="distill", seed=seed).after.benefit for seed in (0, 1)
    ]
    kept = [
        correct(
            built(2)[0],
            bad,
            good,
            Contrast(budget=2, update="distill", seed=seed),
            kept_in=tmp_path,
            stage=cp.quiet,
        ).after.benefit
        for seed in (0, 1)
    ]
    assert kept == alone


def test_samples_that_cannot_be() -> None:
    decoder, planting = built(1)
    bad, good = samples(planting)
    blank = replace(bad[3], mask=(False,) * len(bad[3].tokens))
    for own, others, words in (
        ([], good, "no undesired samples"),
        (bad, [], "no preserved samples"),
        (good, good, "the same ones: nothing to contrast"),
        (bad, [*good, bad[2]], "triggered, undesired sample 3.*nothing to contrast"),
        ([*bad[:3], blank], good, "triggered, undesired sample 4: it has no target tokens"),
        (["some text"], good, "undesired sample 1 is str, and samples are examples"),
        (bad, "gsm8k", "preserved sample 1 is str"),
        ([replace(bad[0], instead=bad[0]), *bad[1:]], good, "sample 1, .*instead is the same"),
        (bad[:2], good, "2 undesired samples are too few"),
        (bad, good[:3], "others has too few samples"),
        ([replace(bad[0], tokens=(5,) * 600, target_start=500), *bad], good, "512 positions"),
    ):
        with pytest.raises(CausalPruneError, match=words):
            fixed(decoder, own, others, budget=1)


def test_slopes_go_on_too_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalprune.core.resuming import State
    from causalprune.correction.candidates import Units

    decoder, planting = built(2)
    bad, good = samples(planting)
    asked = Contrast(budget=4, harm=0.2, max_batch_tokens=64)
    whole, calls = Units.slopes, []

    def broken(self: Units, *given: object, **how: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return whole(self, *given, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Units, "slopes", broken)
    monkeypatch.setattr(State, "due", lambda _: True)
    stop = 0
    straight = correct(decoder, bad, good, asked, kept_in=tmp_path / "a", stage=cp.quiet)
    every = len(calls)
    calls.clear()
    stop = every // 2
    decoder, _ = built(2)
    with pytest.raises(KeyboardInterrupt):
        correct(decoder, bad, good, asked, kept_in=tmp_path / "b", stage=cp.quiet)
    calls.clear()
    stop = 0
    decoder, _ = built(2)
    found = correct(decoder, bad, good, asked, kept_in=tmp_path / "b", stage=cp.quiet)
    assert len(calls) <= every - every // 2 + 1
    assert found.described() == straight.described()


def test_another_budget_measures_nothing_twice(tmp_path: Path) -> None:
    decoder, planting = built(2)
    bad, good = samples(planting)
    correct(decoder, bad, good, Contrast(budget=2, rounds=1), kept_in=tmp_path, stage=cp.quiet)
    rows = (tmp_path / "correction.ledger").read_text()
    decoder, _ = built(2)
    correct(decoder, bad, good, Contrast(budget=2, rounds=1, harm=0.5), kept_in=tmp_path, stage=cp.quiet)
    assert (tmp_path / "correction.ledger").read_text() == rows


def test_what_was_corrected_is_saved_like_any_other(tmp_path: Path) -> None:
    from tinydata import byte_tokenizer

    decoder, planting = built(1)
    found = fixed(decoder, *samples(planting), budget=1)
    cp.save(replace(decoder, tokenizer=byte_tokenizer()), tmp_path / "fixed", found)
    assert cp.verify(tmp_path / "fixed").ok
    assert "safeguards are behaviours too" in (tmp_path / "fixed" / "README.md").read_text()
    assert "Corrected(1 of 192 (neurons) set to zero; log-odds of what is undesired -" in repr(found)
