"""Choosing what goes for good: exact counts, honest choices, and what stays makes up for the rest."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import FAMILIES
from reference import problems
from tinydata import tiny_decoder, write_jsonl, write_model
from transformers import AutoModelForCausalLM

from causalprune.attribution.measured import Measured
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import planned
from causalprune.checkpoints.saving import read_manifest
from causalprune.core import resuming
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import Calibration, Decoder, Example, quiet, silent
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import paired_difference
from causalprune.models.anatomy import inspect_model
from causalprune.pruning import begun, training
from causalprune.shrinking.removal import Shares, Shrunk, _left, leftovers, shrink
from causalprune.shrinking.worth import BY, Shrinking, worth_of


def decoder_of(name: str) -> Decoder:
    return inspect_model(FAMILIES[name](), None, name=name)


def shrunk(
    name: str, shares: Shares, by: str = "effect", update: str = "refit", ledger: Path | None = None
) -> Shrunk:
    how = Shrinking(by, update)
    return shrink(decoder_of(name), shares, problems(), how, ledger=ledger, stage=quiet)


def loss(decoder: Decoder, calibration: Calibration) -> float:
    work = Measured(Passes(planned(decoder, calibration)))
    for number in range(len(work.plan.groups)):
        work.measure_intact(number)
    return float(work.intact.sum())


@pytest.mark.parametrize("by", BY)
def test_every_choice_removes_what_was_asked(by: str) -> None:
    with pytest.warns(UserWarning, match="llama.cpp was not found to run a qwen2 with fewer KV groups"):
        found = shrunk("qwen2", Shares(neurons=0.3, kv_groups=0.5), by=by)
    mlp, attention = (
        12 * 32 * 3,
        2 * 32 * 16 + 2 * 32 * 8 + 16 + 2 * 8,
    )  # weights and biases of a layer that go
    assert found.parameters_before - found.parameters_after == 3 * (mlp + attention)
    assert all(len(index) == 28 for index in found.kept.neurons.values())


def test_layers_go_by_effect() -> None:
    decoder = decoder_of("llama3")
    for p in decoder.layers[1].projections:
        if p.role in ("o", "down"):
            p.write(torch.zeros(p.shape))
    before = loss(decoder, problems())
    found = shrink(decoder, Shares(layers=0.34), problems(), Shrinking(update="none"), stage=quiet)
    assert found.kept.layers == (0, 2)
    assert loss(found.decoder, problems()) == pytest.approx(before, rel=1e-6)


def test_neurons_without_effect_go_first() -> None:
    decoder = decoder_of("mistral")
    for layer in decoder.layers:
        down = layer.projections[-1]
        weight = down.read().clone()
        weight[:, layer.index : layer.index + 10] = 0
        down.write(weight)
    tokens = torch.tensor([problems(1, seed=5).examples[0].tokens])
    before = decoder.model(tokens).logits
    found = shrink(decoder, Shares(neurons=0.25), problems(), Shrinking(update="none"), stage=quiet)
    for i, index in found.kept.neurons.items():
        assert set(index.tolist()) == set(range(40)) - set(range(i, i + 10))
    torch.testing.assert_close(found.decoder.model(tokens).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update", ["none", "refit"])
def test_kv_groups_that_do_nothing_go_first(update: str) -> None:
    decoder = decoder_of("llama3")
    for layer in decoder.layers:
        own, n = layer.attention, layer.attention.n_kv_heads
        (o,) = [p for p in layer.projections if p.role == "o"]
        weight = o.read().clone()
        width = weight.shape[1] // n
        idle = layer.index % n
        weight[:, idle * width : (idle + 1) * width] = 0
        o.write(weight)
        assert own.n_heads % n == 0
    tokens = torch.tensor([problems(1, seed=5).examples[0].tokens])
    before = decoder.model(tokens).logits
    found = shrink(decoder, Shares(kv_groups=0.5), problems(), Shrinking(update=update), stage=quiet)
    for i, index in found.kept.kv_groups.items():
        assert i % decoder.layers[i].attention.n_kv_heads not in index.tolist()
    torch.testing.assert_close(found.decoder.model(tokens).logits, before, rtol=1e-4, atol=1e-4)


def test_what_stays_makes_up_for_what_goes() -> None:
    tokens, error = torch.tensor([problems().examples[0].tokens]), {}
    for update in ("none", "refit"):
        decoder = decoder_of("llama2")
        for layer in decoder.layers:  # twins: what half of the neurons do, the other half can do
            for p in layer.projections:
                if p.role in ("gate", "up"):
                    p.write(torch.cat([p.read()[:20], p.read()[:20]]))
        before = decoder.model(tokens).logits
        worth = Shares(neurons=0.5)
        found = shrink(decoder, worth, problems(40), Shrinking("random", update, seed=3), stage=quiet)
        error[update] = float((found.decoder.model(tokens).logits - before).norm())
    assert error["refit"] < 0.7 * error["none"]


@pytest.mark.parametrize("update", ["none", "refit", "distill"])
def test_what_was_pruned_before_stays_zero(update: str) -> None:
    decoder = decoder_of("llama2")
    for p in decoder.projections:
        p.erase(torch.rand(p.shape, generator=torch.Generator().manual_seed(p.size)) < 0.5)
    found = shrink(decoder, Shares(neurons=0.25), problems(), Shrinking(update=update), stage=quiet).decoder
    for p in found.projections:
        assert 0.45 < float((p.read() == 0).double().mean()) < 0.55


def test_experts_go_and_unreached_ones_are_not_free() -> None:
    decoder = decoder_of("qwen3_moe")
    few = Calibration((Example((5, 5, 5), 1, "random", "0"),), (0,))  # tokens that go the same way
    found = shrink(decoder, Shares(experts=0.3), few, Shrinking(update="none"), stage=quiet)
    assert {layer.n_experts for layer in found.decoder.layers} == {0, 2}
    assert set(found.kept.experts) == {0, 2}
    for layer, kept in found.kept.experts.items():
        unrouted = {int(n.split(".")[3]) for n in found.unrouted if n.startswith(f"layers.{layer}.")}
        assert unrouted <= set(kept.tolist())
    assert found.unrouted, "every expert got a token: the test is blind"


def test_training_makes_up_for_experts_that_go_and_nothing_else_does() -> None:
    shares, tokens, error = Shares(experts=0.3), torch.tensor([problems(1, seed=5).examples[0].tokens]), {}
    for update in ("none", "refit", "distill"):
        decoder = decoder_of("qwen3_moe")
        before = decoder.model(tokens).logits
        found = shrink(decoder, shares, problems(40), Shrinking("random", update), stage=quiet)
        assert found.update == ("distill" if update == "distill" else "none")
        error[update] = float((found.decoder.model(tokens).logits - before).norm())
    assert error["refit"] == error["none"]
    assert error["distill"] < error["none"]


@pytest.mark.parametrize("shares", [Shares(0.5), Shares(kv_groups=0.5), Shares(layers=0.34)])
def test_training_brings_a_smaller_model_back_to_the_whole_one(shares: Shares) -> None:
    data, before = problems(40), decoder_of("llama3").model
    tokens, far = torch.tensor([data.examples[0].tokens]), {}
    whole = before(tokens).logits.log_softmax(-1)
    for update in ("refit", "distill"):
        found = shrink(decoder_of("llama3"), shares, data, update=update, stage=quiet)
        own = found.decoder.model(tokens).logits.log_softmax(-1)
        far[update] = float((whole.exp() * (whole - own)).sum(-1).mean())
    assert far["distill"] < far["refit"]
    assert found.update == Shrinking().update == "distill"


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    shares, path = Shares(neurons=0.5, kv_groups=0.5), tmp_path / "small.attribution"
    first = shrunk("llama3", shares, ledger=path)
    names = ("neurons", "kv_groups", "update")
    assert {p.name for p in tmp_path.iterdir()} == {leftovers(path)[name].name for name in names}
    before = [p.read_bytes() for p in leftovers(path).values() if p.is_file()]
    again = shrunk("llama3", shares, ledger=path)
    assert [p.read_bytes() for p in leftovers(path).values() if p.is_file()] == before
    assert all(torch.equal(a, again.kept.kv_groups[i]) for i, a in first.kept.kv_groups.items())


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "shares"), [("llama3", Shares(0.5)), ("qwen3_moe", Shares(experts=0.5))])
def test_a_stopped_update_goes_on(
    name: str, shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "RARELY", 0.0)
    calm = shrunk(name, shares, update="distill").decoder.model.state_dict()
    steps = Counter[str]()

    def stops(at: int, *given: Any) -> Any:
        steps["taken"] += 1
        if steps["taken"] == at:
            raise KeyboardInterrupt
        return own(*given)

    own = training._last_slope
    for at in (2, 5, 0):
        monkeypatch.setattr(training, "_last_slope", partial(stops, at))
        try:
            found = shrunk(name, shares, update="distill", ledger=tmp_path / "small")
        except KeyboardInterrupt:
            assert steps["taken"] == at
            said = begun(leftovers(tmp_path / "small")["update"])
            assert said.endswith(f"done, {1 if at == 2 else 3} of 6 steps of training")
    assert steps["taken"] == 6 + 2
    assert all(torch.equal(weight, calm[key]) for key, weight in found.decoder.model.state_dict().items())


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_experts_by_activation_are_ranked_as_reap_does(name: str) -> None:
    decoder, calibration = decoder_of(name), problems()
    found = worth_of(decoder, "experts", calibration, Shrinking("activation"), silent, None)
    layer, calls = decoder.layers[1], []
    assert layer.experts is not None
    handle = layer.experts.register_forward_pre_hook(lambda _module, args: calls.append(args))
    with torch.inference_mode():
        for example in calibration.examples:
            decoder.model(torch.tensor([example.tokens]), use_cache=False)
    handle.remove()
    for expert in range(layer.n_experts):
        gate, up, down = (p.read() for p in layer.projections if f"experts.{expert}." in p.name)
        values = []
        for hidden, chosen, weights in calls:
            for token in range(len(hidden)):
                for slot in (chosen[token] == expert).nonzero().flatten().tolist():
                    inner = torch.nn.functional.silu(gate @ hidden[token]) * (up @ hidden[token])
                    values.append(float(weights[token, slot] * (down @ inner).norm()))
        expected = sum(values) / len(values) if values else float("nan")
        assert float(found[1][expert]) == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert sum(bool(own.isfinite().any()) for own in found.values()) == len(found)


@pytest.mark.parametrize(
    ("name", "shares", "message"),
    [
        ("llama3", {"kv_groups": 0.1}, "less than one step of 1: ask for 0.5"),
        ("llama3", {"experts": 0.5}, "has no experts"),
        ("mixtral", {"neurons": 0.5}, "has no neurons"),
    ],
)
def test_what_cannot_go_is_refused(name: str, shares: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        shrunk(name, Shares(**shares))


def test_of_one_unit_none_can_go() -> None:
    with pytest.raises(OptionError, match="of 1 none can go"):
        _left(1, "kv_groups", 0.5, 1)


def test_what_cannot_be_is_refused_before_anything_is_measured() -> None:
    stages: list[str] = []

    def seen(label: str) -> object:
        stages.append(label)
        return quiet(label)

    with pytest.raises(ModelError, match="cannot lose such units"):
        shrink(decoder_of("olmoe"), Shares(kv_groups=0.5), problems(), stage=seen)  # type: ignore[arg-type]
    assert not stages


def test_weights_that_cannot_be_trained_are_refused_before_anything_is_measured() -> None:
    decoder = inspect_model(FAMILIES["llama3"]().half(), None, name="llama3")
    with pytest.raises(OptionError, match="float16, in which gradients of training become zero"):
        shrink(decoder, Shares(0.5), problems(), stage=pytest.fail)


@pytest.mark.parametrize("shares", [{}, {"neurons": 1.0}, {"layers": -0.1}])
def test_senseless_shares_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        Shares(**shares)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(OptionError, match="effect"):
        shrunk("llama3", Shares(neurons=0.5), by="taste")
    with pytest.raises(OptionError, match="refit"):
        shrunk("llama3", Shares(neurons=0.5), update="hope")
    with pytest.raises(OptionError, match="cannot be chosen by activation"):
        shrunk("llama3", Shares(layers=0.5), by="activation")


def test_activations_are_those_of_the_calibration() -> None:
    decoder, sent = decoder_of("llama2"), torch.zeros(40)
    for example in problems().examples:
        handle = decoder.layers[0].module.mlp.down_proj.register_forward_pre_hook(
            lambda _, args: sent.add_(args[0][0].square().sum(0))
        )
        decoder.model(torch.tensor([example.tokens]))
        handle.remove()
    found = shrunk("llama2", Shares(neurons=0.5), by="activation")
    assert set(found.kept.neurons[0].tolist()) == set(sent.topk(20).indices.tolist())


def test_the_command_leaves_a_model_that_loads(run: Run, tmp_path: Path) -> None:
    decoder, model = tiny_decoder(), tmp_path / "model"
    write_model(model, decoder)
    lines = [{"prompt": f"{i} plus {i}?", "target": f"It is {2 * i}."} for i in range(8)]
    task = write_jsonl(tmp_path / "own.jsonl", lines)
    common = ("-t", task, "-n", 6, "--kv-groups", "0.5", "--layers", "0.5")
    code, out, err = run("shrink", model, "-o", tmp_path / "small", *common)
    assert code == 0, err
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.num_parameters() < decoder.model.num_parameters()
    assert f"size: {small.num_parameters():,} parameters in" in out
    assert "tokens/s" in out
    (then,) = (line.removeprefix("next: ") for line in out.splitlines() if line.startswith("next: "))
    assert (
        then == f"causalprune evaluate {tmp_path / 'small'} --on TEST.jsonl_nll -o {tmp_path / 'small'}.json"
    )
    assert run("verify", tmp_path / "small")[0] == 0
    assert read_manifest(tmp_path / "small")["base"]["fingerprint"] == decoder.fingerprint
    said = read_manifest(tmp_path / "small")["run"]["shrink"]
    assert len(said["kept"]["layers"]) == small.config.num_hidden_layers
    assert said["parameters_after"] == small.num_parameters()
    code, _, err = run("shrink", model, "-o", tmp_path / "other", *common, "--parameters", "0.1")
    assert (code, "leave the other shares out" in err) == (2, True)


@pytest.mark.thorough
def test_a_smaller_model_is_measured_on_the_text_of_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decoder, tasks = tiny_decoder(), ("own_ppl:64", "own_kl:64")
    whole = evaluate(decoder, tasks)
    how = Shrinking("magnitude", "none")
    small = shrink(decoder, Shares(layers=0.5, neurons=0.5), problems(), how, stage=quiet).decoder
    for one, other in zip(whole, evaluate(small, tasks), strict=True):
        assert paired_difference(other, one).n == len(one.values)
        assert all(b > 0 for b in other.values)
