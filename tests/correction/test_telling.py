"""What is said of a correction, and of the halves that it was decided on."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCAB, tiny
from planted import built, samples
from reference import calibration, fresh, shared
from transformers import LlamaConfig

import causalprune as cp
from causalprune.circuits import Value
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Calibration, Decoder
from causalprune.correction.candidates import Units
from causalprune.correction.correcting import candidates_of, check_contrast, correct
from causalprune.correction.evidence import Looking
from causalprune.correction.records import Contrast, Point
from causalprune.correction.samples import halves
from causalprune.correction.telling import for_good, sentences, short
from causalprune.evaluation.results import paired_difference
from causalprune.interventions.units import list_units
from causalprune.models.anatomy import inspect_model
from causalprune.pruning import close
from causalprune.runs.undesired import changed
from causalprune.shrinking import Shares, Shrinking, looks, shrink

PROBLEMS = calibration(tuple((12 + i % 3, 5) for i in range(24)))


def wide(neurons: int) -> Decoder:
    """Return a tiny model with so many neurons in a layer."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=neurons,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return inspect_model(tiny(config), None, name="wide")


def test_samples_of_one_prompt_are_in_one_half() -> None:
    bad = [replace(one, content=f"prompt {i // 2}") for i, one in enumerate(PROBLEMS.examples[:12])]
    good = [
        replace(one, content=f"prompt {i}", source="other") for i, one in enumerate(PROBLEMS.examples[12:20])
    ]
    prompts = [{one.content for one in (*half.undesired, *half.preserve)} for half in halves(bad, good)]
    assert not prompts[0] & prompts[1]
    assert [len(half.undesired) for half in halves(bad, good)] == [6, 6]
    torn = Calibration(tuple(bad), tuple(int(0 < i < 10) for i in range(12)))  # the first of a prompt decides
    first, second = halves(torn, good)
    assert [one.content for one in first.undesired] == ["prompt 0", "prompt 0", "prompt 5", "prompt 5"]
    assert len(second.undesired) == 8


def test_sources_are_named_by_their_files_alone() -> None:
    assert short("examples/train.jsonl") == "train.jsonl"
    assert short("/a/b/train.jsonl") == "train.jsonl"
    assert short("clean: data/p.jsonl") == "clean: p.jsonl"
    assert short("own:data/p.jsonl") == "own:p.jsonl"
    assert short("gsm8k") == "gsm8k"


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(("zeros", "takes"), [(31, 0), (32, 32), (70, 64)])
def test_what_is_said_to_cost_nothing_costs_nothing(zeros: int, takes: int, rows: bool) -> None:
    """The command that is printed is carried out: the smaller model computes what the one with zeros does."""
    decoder = wide(128)
    units = {(u.layer, u.index): parts for u, parts in list_units(decoder, ["neurons:1"]).items()}
    if rows:
        close(decoder, [units[layer.index, i] for layer in decoder.layers for i in range(zeros)])
    else:
        for p in decoder.projections:
            weight = p.read()
            if p.role == "down":
                weight[:, :zeros] = 0
            elif p.place == "mlp":
                weight[:zeros] *= 9
    said = for_good(SimpleNamespace(contrast=Contrast()), decoder, Path("a b"))  # type: ignore[arg-type]
    words = said.partition("shrink 'a b' -o 'a b-small' --neurons ")[2].split()
    assert bool(words) == bool(takes)
    if takes:
        tokens = torch.tensor([PROBLEMS.examples[0].tokens])
        before = decoder.model(tokens).logits  # as `shrink` changes the model
        how = Shrinking("magnitude", "none")
        shares, nothing = Shares(neurons=float(words[0])), Calibration((), ())
        assert not looks(shares, how)
        found = shrink(decoder, shares, nothing, how, stage=cp.quiet)
        assert found.decoder.model.config.intermediate_size == 128 - takes
        torch.testing.assert_close(found.decoder.model(tokens).logits, before)


def test_one_sample_has_no_interval() -> None:
    decoder, planting = built(2)
    bad, good = samples(planting)
    found = correct(decoder, bad, good[:6:2], Contrast(budget=2, harm=math.inf), stage=cp.quiet)
    assert [own for own in sentences(found) if "(one example: no interval) nats per token" in own]
    (odds, loss), (after, _) = found.pairs
    assert (len(odds.values), len(loss.values)) == (6, 1)
    own = paired_difference(after, odds)
    assert own.difference == pytest.approx(-found.after.benefit.value)
    one, other = (
        replace(odds, values=own.values[:1], weights=(1.0,), examples=("a",)) for own in (odds, after)
    )
    assert "(one example: no interval) on the 1 prompts" in changed(one, other)


def test_weights_are_those_that_become_zero() -> None:
    """Of two heads that share keys and values, one takes those along only with the other."""
    decoder = fresh("llama3")
    both = candidates_of(
        decoder, halves(PROBLEMS.examples[:8], PROBLEMS.examples[8:])[0], Contrast(("heads",))
    )
    assert isinstance(both, Units)
    before = sum(int(p.read().count_nonzero()) for p in decoder.projections)
    counted = both.weights(torch.tensor([0, 5]))
    both.write(torch.tensor([0, 5]))
    assert before - sum(int(p.read().count_nonzero()) for p in decoder.projections) == counted


def test_units_that_are_parts_of_others_are_refused_before_there_are_samples() -> None:
    with pytest.raises(OptionError, match="units of heads and kv_groups share parts at layer 0"):
        check_contrast(shared("llama3"), Contrast(("heads", "kv_groups")))


def test_a_model_in_float16_is_not_trained() -> None:
    decoder = fresh("llama3")
    decoder.model.half()
    with pytest.raises(OptionError, match="float16"):
        check_contrast(decoder, Contrast(update="distill"))
    check_contrast(decoder, Contrast(budget=2, update="refit"))


def test_a_part_of_what_closing_does_is_predicted_where_a_part_is_left() -> None:
    predicted = []
    for damp in (0.0, 0.5):
        decoder, planting = built(2)
        predicted.append(correct(decoder, *samples(planting), Contrast(budget=2, damp=damp), stage=cp.quiet))
    whole, half = (found.chosen.predicted for found in predicted)
    assert predicted[0].members == predicted[1].members
    assert half == pytest.approx(whole / 4, rel=0.05)


@pytest.mark.parametrize("how", [{"harm": 1e-12, "rounds": 2}, {"harm": 0.5, "rounds": 3}])
def test_nothing_is_scored_twice(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first round takes out nothing, the second has its scores already; later ones have second orders."""
    asked: list[str] = []
    gather = Looking.gather

    def noted(self: Looking, need: tuple, closed: object, name: str, tell: object) -> object:
        asked.append(f"{need}-{name}")
        return gather(self, need, closed, name, tell)

    monkeypatch.setattr(Looking, "gather", noted)
    decoder, planting = built(2)
    found = correct(decoder, *samples(planting), Contrast(budget=2, **how), stage=cp.quiet)
    assert found.chosen.round == 2 or how["rounds"] > 2
    assert len(asked) == len(set(asked)) > 0
    assert sum("harm" in name for name in asked) == 1
    assert any("drift" in name for name in asked) == (how["harm"] == 0.5)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("score", ["contrast", "magnitude"])
def test_what_is_not_finite_is_refused_as_such(score: str, kept: bool, tmp_path: Path) -> None:
    decoder, planting = built(1)
    bad, good = samples(planting)
    next(p for p in decoder.projections if p.role == "down").read()[0, 0] = math.inf
    how = Contrast(budget=1, score=score)
    with pytest.raises(ModelError, match="not finite in float32: a wider --dtype may do"):
        correct(decoder, bad, good, how, kept_in=tmp_path / "kept" if kept else None, stage=cp.quiet)


def test_the_worst_of_what_is_not_known_is_not_known() -> None:
    harm = {"one": Value(0.001, 0.0, 0.002), "two": Value(math.nan, math.nan, math.nan)}
    point = Point(1, 0.1, 1, 1, Value(1.0, 1.0, 1.0), harm, harm, 0.0)
    assert math.isnan(point.worst())
    assert math.isnan(point.worst(certain=True))
    assert replace(point, harm={**harm, "two": Value(math.inf, 0.0, math.inf)}).worst() == math.inf
    assert replace(point, harm={}).worst() == 0.0


def test_zeros_that_do_more_harm_than_gates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where rows are erased that other units see."""

    def everything(own: Units, chosen: torch.Tensor) -> None:
        close(own.decoder, own._parts(torch.arange(own.count)))

    monkeypatch.setattr(Units, "write", everything)
    decoder, planting = built(1)
    with pytest.raises(ModelError, match=r"zeros in the weights of .* do more harm"):
        correct(decoder, *samples(planting), Contrast(budget=1), stage=cp.quiet)
